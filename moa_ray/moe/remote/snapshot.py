"""Versioned snapshots of experts, and the other places that a worker may get them from.

A snapshot is one safetensors file, `NAME-v00000012.safetensors`: the weights of some experts and, once
they have trained, Adam's moments, each stacked by expert; its metadata say which experts, after how many
steps, and which messages of each caller are in it. Any set of workers can be built from any set of files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moa_ray.moe.errors import CheckpointError
from moa_ray.moe.experts import Activation
from moa_ray.moe.optim import MOMENTS, WEIGHTS

_KEEP = 2  # newest files of a worker: one may have been written just before others died


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all experts of a pool have in common.

    Attributes:
        num_experts: E.
        d_model: D.
        d_hidden: H.
        activation: `relu` or `swiglu`.
        dtype: Name of torch's dtype of weights and rows.
    """

    num_experts: int
    d_model: int
    d_hidden: int
    activation: Activation = "relu"
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def shape(self, name: str) -> tuple[int, int]:
        """Shape of one expert's part of a weight."""
        d_in = 2 * self.d_hidden if self.activation == "swiglu" else self.d_hidden
        return (self.d_model, d_in) if name.startswith("w_in") else (self.d_hidden, self.d_model)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Some experts at one version.

    Attributes:
        tensors: Weights, and moments by `NAME.FIELD` where the experts have trained; stacked by expert.
        version: Optimizer steps that are in them.
        seen: Number of the last message of each caller that is in them, by the caller's rank.
        lives: Which life of each caller these numbers are of.
    """

    tensors: dict[str, Tensor]
    version: int = 0
    seen: dict[int, int] = field(default_factory=dict[int, int])
    lives: dict[int, str] = field(default_factory=dict[int, str])

    @property
    def trained(self) -> bool:
        """Whether the moments are here, too."""
        return f"{WEIGHTS[0]}.{MOMENTS[0]}" in self.tensors


class Source(Protocol):
    """Where experts come from before they have trained here."""

    def check(self, sizes: Sizes) -> None:
        """Refuses, before anything is started, what `load` would refuse."""
        ...

    def load(self, sizes: Sizes, experts: Sequence[int]) -> Loaded:
        """Some experts, ascending; a worker calls this for its own alone."""
        ...


@dataclass(frozen=True, slots=True)
class Fresh:
    """New experts, each drawn from its own random state, so that they do not depend on the shards."""

    seed: int = 0

    def check(self, sizes: Sizes) -> None:
        """Experts of any size can be drawn."""

    def load(self, sizes: Sizes, experts: Sequence[int]) -> Loaded:
        """Normal weights with deviation (inputs)^-1/2."""
        tensors: dict[str, Tensor] = {}
        for place, name in enumerate(WEIGHTS):
            d_in, d_out = sizes.shape(name)
            drawn: list[Tensor] = []
            for expert in experts:
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (2 * expert + place + 1))
                drawn.append(torch.randn(d_in, d_out, generator=generator) * d_in**-0.5)
            tensors[name] = torch.stack(drawn).to(sizes.torch_dtype)
        return Loaded(tensors)


@dataclass(frozen=True, slots=True)
class Snapshots:
    """A directory of snapshots, as `write` leaves them.

    Attributes:
        directory: The directory; on a file system that all nodes see, unless there is one node only.
    """

    directory: str

    def write(self, name: str, experts: Sequence[int], loaded: Loaded) -> None:
        """Writes a snapshot, whole or not at all, and removes the older ones of the same name."""
        directory = Path(self.directory)
        directory.mkdir(parents=True, exist_ok=True)
        facts = {
            "experts": json.dumps(list(experts)),
            "version": str(loaded.version),
            "seen": json.dumps(loaded.seen),
            "lives": json.dumps(loaded.lives),
        }
        target = directory / f"{name}-v{loaded.version:08d}.safetensors"
        temporary = target.with_suffix(".partial")
        save_file({n: t.detach().cpu().contiguous() for n, t in loaded.tensors.items()}, temporary, metadata=facts)
        temporary.rename(target)
        for old in sorted(directory.glob(f"{name}-v*.safetensors"))[:-_KEEP]:
            with suppress(FileNotFoundError):
                old.unlink()

    def check(self, sizes: Sizes) -> None:
        """Finds all experts of a pool; reads no tensor.

        Raises:
            CheckpointError: Some are missing, a file is damaged, or of experts of other sizes.
        """
        homes = self._newest(range(sizes.num_experts))
        for name in WEIGHTS:
            with safe_open(homes[0].path, "pt") as opened:
                shape = tuple(opened.get_slice(name).get_shape()[1:])
            if shape != sizes.shape(name):
                message = f"{name} has experts of shape {shape}, the pool {sizes.shape(name)}"
                raise CheckpointError(f"{self.directory}: {message}")

    def load(self, sizes: Sizes, experts: Sequence[int]) -> Loaded:
        """Some experts at the newest version at which all of them are here.

        Raises:
            CheckpointError: Some are missing, or a file is damaged.
        """
        homes = self._newest(experts)
        newest = homes[experts[0]]
        parts: dict[str, list[Tensor]] = {name: [] for name in newest.names}
        for expert in experts:
            home = homes[expert]
            with safe_open(home.path, "pt") as opened:
                for name in newest.names:
                    parts[name].append(opened.get_slice(name)[home.experts.index(expert)])
        tensors = {name: torch.stack(rows) for name, rows in parts.items()}
        return Loaded(tensors, newest.version, dict(newest.seen), dict(newest.lives))

    def _newest(self, experts: Sequence[int]) -> dict[int, _File]:
        files = _index(Path(self.directory))
        homes: dict[int, dict[int, _File]] = {}
        for file in files:
            homes.setdefault(file.version, {}).update(dict.fromkeys(file.experts, file))
        whole = [version for version, held in homes.items() if held.keys() >= set(experts)]
        if not whole:
            missing = sorted(set(experts) - {expert for file in files for expert in file.experts})
            what = f"experts {missing}" if missing else "a version of all experts"
            raise CheckpointError(f"{self.directory}: the checkpoint lacks {what}")
        return homes[max(whole)]


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    experts: list[int]
    version: int
    names: tuple[str, ...]
    seen: dict[int, int]
    lives: dict[int, str]


def _index(directory: Path) -> list[_File]:
    found: list[_File] = []
    for path in sorted(directory.glob("*-v*.safetensors")):
        try:
            with safe_open(path, "pt") as opened:
                facts = opened.metadata()
                found.append(
                    _File(
                        path,
                        json.loads(facts["experts"]),
                        int(facts["version"]),
                        tuple(opened.keys()),
                        {int(rank): seq for rank, seq in json.loads(facts["seen"]).items()},
                        {int(rank): life for rank, life in json.loads(facts["lives"]).items()},
                    )
                )
        except FileNotFoundError:  # a worker has just removed it
            continue
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged snapshot: {error}") from error
    return found

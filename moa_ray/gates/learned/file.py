"""What training leaves for a learned gate: one safetensors file, and how a gate that runs takes up a newer one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moa_ray.errors import SpecError

_FORMAT = "moa-ray gate 1"


@dataclass(frozen=True, slots=True)
class GateFile:
    """A trained gate.

    Args:
        kind: The gate kind that it is for.
        agents: Its E agents, in the order of its columns.
        embedding: The embedding model that it was trained on.
        arrays: Its numbers, by name; what they are, the kind says.
    """

    kind: str
    agents: tuple[str, ...]
    embedding: str
    arrays: Mapping[str, NDArray[np.float32]]

    def write(self, path: Path) -> None:
        """Write it in one piece: a gate that runs sees the old file or the new one, never half of it.

        Raises:
            SpecError: If it cannot be written there.
        """
        said = {"format": _FORMAT, "kind": self.kind, "agents": json.dumps(self.agents), "embedding": self.embedding}
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}  # it takes no strides
        half = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            half.write_bytes(save(arrays, metadata=said))
            half.replace(path)
        except OSError as error:
            raise SpecError(f"the gate file {path} cannot be written: {error.strerror}") from None


def read(path: Path, kind: str, agents: Sequence[str], embedding: str) -> GateFile:
    """The gate in `path`.

    Raises:
        SpecError: If it is missing or broken, or was made for another kind, other agents, or another embedding model.
    """
    again = "`moa-ray gate train SPEC OUTCOMES` makes one for this graph"
    try:
        with safe_open(path, framework="numpy") as file:
            said: dict[str, Any] = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no mapping
    except FileNotFoundError:
        raise SpecError(f"there is no gate file {path}", hint=again) from None
    except (OSError, SafetensorError) as error:
        raise SpecError(f"the gate file {path} cannot be read: {error}", hint=again) from None
    if said.get("format") != _FORMAT:
        raise SpecError(f"{path} is no gate file of this version", hint=again)
    made_for = tuple(json.loads(said["agents"]))
    for what, has, wanted in (
        ("the gate kind", said["kind"], kind),
        ("the agents", ", ".join(sorted(made_for)), ", ".join(sorted(agents))),
        ("the embedding model", said["embedding"], embedding),
    ):
        if has != wanted:
            raise SpecError(f"the gate file {path} was made for {what} {has}, not {wanted}", hint=again)
    if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values()):
        raise SpecError(f"the gate file {path} holds numbers that are none", hint=again)
    return GateFile(kind, made_for, embedding, arrays)


class Watched:
    """The newest good version of a gate file. Looked at for each question: a `stat` costs a few microseconds.

    Args:
        path: The file.
        kind, agents, embedding: As `read` wants them.

    Attributes:
        trouble: Why the newest version is not used, "" where it is.
    """

    def __init__(self, path: Path, kind: str, agents: Sequence[str], embedding: str) -> None:
        self.trouble = ""
        self._path, self._made_for = path, (kind, tuple(agents), embedding)
        self._seen: tuple[int, ...] | None = None
        self._file: GateFile | None = None

    def newest(self) -> GateFile:
        """The file, read again where it has changed; one that cannot be used changes nothing but `trouble`.

        Raises:
            SpecError: If there never was a version that can be used.
        """
        if (stamp := _stamp(self._path)) != self._seen:
            self._seen = stamp
            try:
                self._file, self.trouble = read(self._path, *self._made_for), ""
            except SpecError as error:
                self.trouble = error.message
        if self._file is None:
            raise SpecError(self.trouble)
        return self._file


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino

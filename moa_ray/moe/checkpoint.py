"""Checkpoints of a training run: safetensors for tensors, JSON for the rest, written atomically.

A checkpoint is a directory `step-00000500` with

    model.safetensors   weights and buffers
    run.safetensors     Adam's moments by parameter, recurrent state, random state
    run.json            step, model configuration, vocabulary, layout of the text

which is everything that the next step depends on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moa_ray.moe.errors import CheckpointError
from moa_ray.moe.text import Vocabulary

CHECKPOINTS = "checkpoints"
"""Where a run keeps its checkpoints, below its output directory."""

_PREFIX = "step-"
_MODEL, _RUN, _JSON = "model.safetensors", "run.safetensors", "run.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One moment of a run.

    Attributes:
        step: Optimizer steps done.
        model_config: The `model` part of the training file, as JSON values.
        vocabulary: Numbering of words.
        reads: Layout of the training text, in which `step` is a place.
        model: The model's state dict.
        run: The run's other tensors by name.
    """

    step: int
    model_config: dict[str, Any]
    vocabulary: Vocabulary
    reads: str
    model: dict[str, Tensor]
    run: dict[str, Tensor]


def save_checkpoint(directory: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint below `directory` and removes all but the `keep` newest; returns its path."""
    target = directory / f"{_PREFIX}{checkpoint.step:08d}"
    temporary = directory / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in checkpoint.model.items()}, temporary / _MODEL)
    save_file({name: t.contiguous() for name, t in checkpoint.run.items()}, temporary / _RUN)
    facts = {
        "step": checkpoint.step,
        "model": checkpoint.model_config,
        "level": checkpoint.vocabulary.level,
        "words": list(checkpoint.vocabulary.words),
        "reads": checkpoint.reads,
    }
    (temporary / _JSON).write_text(json.dumps(facts), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints below a directory, the oldest first."""
    return sorted(directory.glob(f"{_PREFIX}*"))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, or the newest one below a run's directory.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if not (path / _JSON).is_file():
        found = list_checkpoints(path) or list_checkpoints(path / CHECKPOINTS)
        if not found:
            raise CheckpointError(f"{path}: no checkpoint here", hint=f"a directory with {_PREFIX}* in it")
        path = found[-1]
    try:
        facts = json.loads((path / _JSON).read_text(encoding="utf-8"))
        vocabulary = Vocabulary(facts["level"], tuple(facts["words"]))
        model, run = load_file(path / _MODEL), load_file(path / _RUN)
        return Checkpoint(facts["step"], facts["model"], vocabulary, facts["reads"], model, run)
    except KeyError as error:
        raise CheckpointError(f"{path / _JSON}: damaged checkpoint: it lacks {error}") from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {error}") from error


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies a checkpoint's tensors into a model.

    Raises:
        CheckpointError: A tensor is missing, unknown, or of another shape; the message names it.
    """
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"the checkpoint lacks {name}")
        if name not in wanted:
            raise CheckpointError(f"the checkpoint has {name}, which the model lacks")
        if wanted[name].shape != tensors[name].shape:
            have, want = tuple(tensors[name].shape), tuple(wanted[name].shape)
            raise CheckpointError(f"{name} has shape {have} in the checkpoint, {want} in the model")
    model.load_state_dict(tensors)

"""A training file for a tiny model, shared by the tests that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TEXT = "the cat sat on the mat and the dog sat on the cat\nthe mat was flat and that was that\n" * 60


def write_config(directory: Path, **changes: Any) -> Path:
    """Writes corpus and training file into a directory; keywords replace whole top-level keys."""
    corpus = directory / "corpus.txt"
    corpus.write_text(TEXT)
    moe = {"kind": "moe", "gate": {"kind": "noisy_top_k", "experts": 4, "k": 2}, "d_hidden": 8}
    config: dict[str, Any] = {
        "data": {"train": str(corpus), "level": "byte", "streams": 4, "window": 8, "valid_fraction": 0.1},
        "model": {"d_model": 8, "dropout": 0.1, "middle": moe},
        "optim": {"lr": 0.01, "warmup_steps": 10},
        "steps": 12,
        "log_every": 4,
        "eval_every": 6,
        "checkpoint_every": 5,
        "output": str(directory / "run"),
    }
    path = directory / "train.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.moe.configs import write_config


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models as small as these get slower with threads, and a hundred times so where other work runs beside them."""
    torch.set_num_threads(1)


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    """`write_config` into the test's own directory."""
    return partial(write_config, tmp_path)

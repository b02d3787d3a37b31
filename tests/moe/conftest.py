from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.moe.configs import write_config


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    """`write_config` into the test's own directory."""
    return partial(write_config, tmp_path)

"""The command line as its users have it: a process; and other people's programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_TOOLS = ROOT / ".tools" / "usr" / "bin"
COMMAND = [sys.executable, "-m", "moa_ray.cli"]


def environment() -> dict[str, str]:
    """This process's, without what would join a test's cluster."""
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**kept, "COLUMNS": "120", "RAY_USAGE_STATS_ENABLED": "0"}


def moa_ray(*args: str, cwd: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `moa-ray` to its end; bounded."""
    return subprocess.run(
        [*COMMAND, *args], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=180, env=environment()
    )


def tool(name: str) -> str:
    """Where `make setup` put it, or where this machine has it."""
    found = shutil.which(name, path=str(_TOOLS)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here")
    return found

"""The page on experts in actors runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "experts.md").read_text(encoding="utf-8")


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_python_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "docs/experts.md", "exec"), {})
    assert "shard-1.0" in capsys.readouterr().out

from __future__ import annotations

from pathlib import Path

import pytest

from moa_ray.errors import MoARayError
from moa_ray.integrations.needs import need


def test_an_engine_that_is_new_enough_is_imported() -> None:
    assert need("pytest", "pytest", "9.0", "test") is pytest


@pytest.mark.parametrize("version", ["10.0", "9.0.1"])
def test_an_engine_that_is_too_old_is_told_with_its_version_and_the_extra(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moa_ray.integrations.needs.version", lambda _: "9.0.0rc1")
    with pytest.raises(MoARayError, match=rf"(?s)pytest {version} or newer.* 9.0.0rc1 is .*'moa-ray\[x\]'"):
        need("pytest", "pytest", version, "x")


def test_an_engine_that_is_missing_is_told_with_the_extra() -> None:
    with pytest.raises(MoARayError, match=r"(?s)nothing 1.0 or newer is needed, and is not inst.*moa-ray\[none\]"):
        need("no_such_engine", "nothing", "1.0", "none")


def test_what_an_installed_engine_misses_is_its_own_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_engine.py").write_text("import no_such_part")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        need("broken_engine", "broken", "1", "x")

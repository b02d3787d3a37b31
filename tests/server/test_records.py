from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moa_ray.errors import RequestError
from moa_ray.runtime.records import Records
from moa_ray.server import ServerSettings
from tests.commands import ROOT
from tests.conftest import until
from tests.server.local import metric_kinds, serving


def recording(path: Path, **settings: Any) -> ServerSettings:
    return ServerSettings(records=path, **settings)


def recorded(path: Path, count: int) -> Records:
    def written() -> bool:
        with suppress(RequestError):  # not made yet
            return len(Records(path).latest(9)) == count
        return False

    until(written)
    return Records(path)


@pytest.mark.parametrize("stream", [False, True])
def test_every_run_of_a_request_is_recorded(tmp_path: Path, stream: bool) -> None:
    with serving(2, settings=recording(tmp_path / "r")) as served:
        assert served.ask(stream=stream, n=2).status_code == 200
        rows = recorded(tmp_path / "r", 2).latest(9)
    assert {row.state for row in rows} == {"finished"} and rows[0].asked == ({"role": "user", "content": "why?"},)


def test_a_run_that_its_caller_left_is_recorded_as_that(tmp_path: Path) -> None:
    question = {"model": "panel", "messages": [{"role": "user", "content": "why?"}], "stream": True}
    with serving(2, settings=recording(tmp_path / "r"), itl_s=0.05, reply_tokens=100) as served:
        with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=question, timeout=30) as response:
            next(response.iter_lines())
        (row,) = recorded(tmp_path / "r", 1).latest(9)
    assert row.state == "left"


def test_records_that_cannot_be_written_fail_no_request_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serving(2, settings=recording(tmp_path / "file" / "r")) as served:
        assert [served.ask().status_code for _ in range(3)] == [200] * 3
        until(lambda: "moa_ray_records_lost 3.0" in httpx2.get(f"{served.url}/metrics").text)


def test_off_is_off_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_RAY_RECORDS", str(tmp_path / "r"))
    for off in ("off", False):
        with serving(2, settings=ServerSettings(records=off)) as served:
            assert served.ask().status_code == 200
    assert not list(tmp_path.iterdir())
    with serving(2, settings=ServerSettings()) as served:
        assert served.ask().status_code == 200
        recorded(tmp_path / "r", 1)


def test_every_metric_is_in_the_docs(tmp_path: Path) -> None:
    told = metric_kinds(recording(tmp_path / "r"))
    page = (ROOT / "docs" / "observability.md").read_text()
    assert {name for name in told if not name.endswith("_created") and f"`{name}`" not in page} == set()

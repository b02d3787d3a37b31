from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from moa_ray.runtime import AgentDelta, RunFinished, RunStarted, from_json
from moa_ray.server import ServerSettings
from tests.server.local import serving


def told(url: str, **body: Any) -> list[dict[str, Any]]:
    """What a run tells, line by line."""
    question = {"model": "panel", "messages": [{"role": "user", "content": "why?"}], **body}
    with httpx2.stream("POST", f"{url}/v1/runs", json=question, timeout=30) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_run_tells_its_events_and_drafts_as_they_are_written() -> None:
    with serving(2, itl_s=0.02, reply_tokens=30) as served:
        first, *rest = told(served.url)
    assert first["event"] == "request.started" and first["id"].startswith("run_") and not first["feedback"]
    events = [from_json(line) for line in rest]
    assert isinstance(events[0], RunStarted) and isinstance(events[-1], RunFinished)
    drafts = [event for event in events if isinstance(event, AgentDelta) and event.call == "1/a1"]
    assert len(drafts) > 1 and drafts[0].t < events[-1].t


def test_a_run_that_fails_tells_its_end_and_then_the_error() -> None:
    with serving(2, faults=[{"agent": "chief"}]) as served:
        body = {"model": "panel", "messages": [{"role": "user", "content": "why?"}]}
        lines = httpx2.post(f"{served.url}/v1/runs", json=body, timeout=30).text.split("\n\n")
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert told[-2]["event"] == "run.finished" and told[-2]["error"] == "EngineUnavailable"
    assert told[-1]["error"]["message"] and "data: [DONE]" not in lines


def test_a_graphs_shape_has_its_calls_and_no_prompts() -> None:
    with serving(2, 2, agents={"a1": {"system": "be secret"}}) as served:
        answer = httpx2.get(f"{served.url}/v1/graphs/panel")
        assert httpx2.get(f"{served.url}/v1/graphs/none").status_code == 404
    shape = answer.json()
    assert [call["id"] for call in shape["calls"]] == ["1/a1", "1/a2", "2/a1", "2/a2"]
    assert shape["answer"]["inputs"] == ["2/a1", "2/a2"] and "secret" not in answer.text


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/graphs/panel"])
def test_both_need_a_key_where_one_is_needed(path: str) -> None:
    with serving(2, settings=ServerSettings(api_keys=(SecretStr("sk-1"),))) as served:
        method = "POST" if path == "/v1/runs" else "GET"
        assert httpx2.request(method, f"{served.url}{path}", json={}).status_code == 401


def test_more_than_one_run_at_a_time_is_refused() -> None:
    with serving(2) as served:
        body = {"model": "panel", "messages": [{"role": "user", "content": "why?"}], "n": 2}
        assert httpx2.post(f"{served.url}/v1/runs", json=body).status_code == 400

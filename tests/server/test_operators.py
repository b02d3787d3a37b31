"""Models, health, metrics, version, and the description of the interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moa_ray import __version__
from tests.server.local import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(2, reply="one two") as served:
        yield served


def _get(served: Served, path: str) -> httpx2.Response:
    return httpx2.get(served.url + path)


def _totals(served: Served) -> Callable[..., float]:
    """What the metrics tell now: the sum of a metric over all labels but those given."""
    families = text_string_to_metric_families(_get(served, "/metrics").text)
    samples = [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def total(name: str, **labels: str) -> float:
        return sum(value for each, own, value in samples if each == name and labels.items() <= own.items())

    return total


def test_every_graph_and_every_agent_is_a_model(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["panel", "panel/a1", "panel/a2", "panel/chief"]
    assert client.models.retrieve("panel").owned_by == "moa-ray"
    assert _get(served, "/v1/models/panel/a1").json()["id"] == "panel/a1"
    for unknown in ("panel/nobody", "nothing"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(unknown)


def test_health_version_and_readiness(served: Served) -> None:
    assert _get(served, "/health").json() == {"status": "ok"}
    assert _get(served, "/version").json() == {"version": __version__}
    assert _get(served, "/ready").status_code == 200
    served.backend.down = ["panel"]
    try:
        unready = _get(served, "/ready")
        assert unready.status_code == 503 and "not ready: panel" in unready.json()["error"]["message"]
    finally:
        served.backend.down = []


def test_metrics_count_requests_calls_and_tokens() -> None:
    with serving(2, reply="one two") as served:
        body = {"model": "panel", "messages": [{"role": "user", "content": "why?"}]}
        for wanted in (body, {**body, "stream": True}, {**body, "moa": {"k": 9, "policy": {"quorum": 9}}}):
            httpx2.post(f"{served.url}/v1/chat/completions", json=wanted)
        total = _totals(served)
    assert total("moa_ray_requests_total", model="panel", status="200") == 2
    assert total("moa_ray_requests_total", model="panel", status="400") == 1
    assert total("moa_ray_runs_total", model="panel", state="finished") == 2
    assert total("moa_ray_calls_total", agent="a1", state="finished", model="panel", layer="1", engine="script") == 2
    assert total("moa_ray_tokens_total", agent="chief", kind="completion", model="panel", layer="2") == 4
    assert total("moa_ray_ttft_seconds_count", model="panel") == 2
    assert total("moa_ray_requests_running") == 0


def test_metrics_and_the_account_of_the_answers_agree_where_calls_fail() -> None:
    faults = [{"agent": "a1", "first": 2, "times": 1}, {"agent": "chief", "first": 1, "times": 1, "after_tokens": 1}]
    with serving(2, reply="one two three", faults=faults) as served:
        body = {"model": "panel", "messages": [{"role": "user", "content": "why?"}]}
        answers = [httpx2.post(f"{served.url}/v1/chat/completions", json=body).json() for _ in range(3)]
        total = _totals(served)
    rows = [row for answer in answers for row in answer["moa"]["agents"]]
    for agent in ("a1", "a2", "chief"):
        own = [row for row in rows if row["agent"] == agent]
        for kind in ("prompt", "completion", "cached"):
            told = total("moa_ray_tokens_total", agent=agent, kind=kind, model="panel")
            assert told == sum(row[f"{kind}_tokens"] for row in own)
        assert total("moa_ray_calls_total", agent=agent, state="finished", model="panel") == len(own)
        retries = sum(row["attempts"] - 1 for row in own)
        assert total("moa_ray_repeats_total", agent=agent, model="panel", kind="retries") == retries
    assert sum(row["attempts"] - 1 for row in rows) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_metrics_and_the_account_agree_on_hedges_cut_calls_and_prefill_ahead(stream: bool) -> None:
    agents = {f"a{n}": {"engine": "script", "max_tokens": 40} for n in (1, 2, 3)} | {"chief": {"engine": "script"}}
    policy = {"quorum": 2, "grace_s": 0.05, "deadline_s": 20, "streaming": "overlap", "hedge": {"budget": 1.0}}
    slow: dict[str, Any] = {"itl_s": 0.001, "ttft_s": 0.05, "reply_tokens": 40, "slowdown": {"a3": 30.0}}
    with serving(3, spec={"agents": agents, "policy": policy, "prompt": "woven"}, **slow, replicas=2) as served:
        ends = []
        for _ in range(12):
            body = {"model": "panel", "messages": [{"role": "user", "content": "why? " * 50}], "stream": stream}
            if stream:
                body["stream_options"] = {"include_usage": True}
            answer = httpx2.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)
            events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
            ends.append(json.loads(events[-1] if stream else answer.text))
        total = _totals(served)

    rows = [row for end in ends for row in end["moa"]["agents"]]
    for kind, field in (("prompt", "prompt_tokens"), ("completion", "completion_tokens")):
        assert total("moa_ray_tokens_total", kind=kind) == sum(end["usage"][field] for end in ends)
    cached = sum(end["usage"]["prompt_tokens_details"]["cached_tokens"] for end in ends)
    assert total("moa_ray_tokens_total", kind="cached") == cached > 0
    for kind in ("hedges", "retries", "cancelled"):
        assert total("moa_ray_repeats_total", kind=kind) == sum(row[kind] for row in rows)
    for state in ("finished", "cancelled", "failed"):
        assert total("moa_ray_calls_total", state=state) == sum(row["state"] == state for row in rows)
    assert sum(row["hedges"] for row in rows) > 0 and sum(row["cancelled"] for row in rows) > 0


def test_metrics_and_the_account_tell_what_the_gate_did() -> None:
    gate = {
        "kind": "rules",
        "k": 1,
        "rules": [{"when": {"matches": "law"}, "agents": ["a2"]}],
        "otherwise": ["a1", "a2"],
    }
    with serving(2, spec={"gate": gate}, reply="one two") as served:
        answers = [
            httpx2.post(
                f"{served.url}/v1/chat/completions",
                json={"model": "panel", "messages": [{"role": "user", "content": text}]},
            ).json()
            for text in ("what is the law?", "why?", "is it law?")
        ]
        families = text_string_to_metric_families(_get(served, "/metrics").text)
        samples = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    assert [answer["moa"]["gates"][0]["layers"] for answer in answers] == [[["a2"]], [["a1"]], [["a2"]]]
    assert (
        samples["moa_ray_gate_load_total", "a2", "panel"]
        == samples["moa_ray_gate_importance_total", "a2", "panel"]
        == 2
    )
    assert samples["moa_ray_gate_load_total", "a1", "panel"] == 1
    assert samples["moa_ray_gate_seconds_count", "panel"] == 3
    assert ("moa_ray_gate_failures_total", "panel") not in samples

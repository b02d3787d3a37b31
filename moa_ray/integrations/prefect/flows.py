"""A whole graph as a flow, and what a flow leaves behind for its readers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from prefect import allow_failure, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from moa_ray.client import Answer
from moa_ray.graph import ANSWER, Graph, load
from moa_ray.integrations.prefect.export import version
from moa_ray.integrations.prefect.tasks import MoAServer, ask
from moa_ray.integrations.steps import step_by_step

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import State
    from prefect.futures import PrefectFuture

_BAR = 60
"""Characters of the timeline's bars."""


def moa_flow(spec: Graph | str | PathLike[str], server: MoAServer) -> Flow[[str], str]:
    """A flow that answers a question as the graph does: a task run for each call, in parallel where they can be.

    Args:
        spec: The graph, or its YAML file.
        server: Who serves it.

    Returns:
        The flow, of the graph's name; it takes the question and returns the answer.

    Raises:
        SpecError: If the file is wrong.
    """
    graph = spec if isinstance(spec, Graph) else load(spec)
    steps, lost = step_by_step(graph)
    name, made_from = graph.spec.name, version(graph)

    def answer(question: str) -> str:
        said: dict[str, PrefectFuture[Answer]] = {}
        for step in steps:
            asking = ask.with_options(retries=step.retries, timeout_seconds=step.timeout_s)
            shown = seen(said, *step.inputs)
            said[step.id] = asking.submit(
                server, name, step.id, question, shown, needed=step.needed, required=step.required, version=made_from
            )
        return publish(name, said)

    notes = "".join(f"\n- {each}" for each in lost)
    return flow(answer, name=name, description=f"{graph.spec.description}\n\nNot as the graph has it:{notes}".strip())


def seen(said: Mapping[str, PrefectFuture[Answer]], *calls: str) -> dict[str, Any]:
    """What a call is shown: the answers of `calls`, and of those that failed the reason."""
    return {call: allow_failure(said[call]) for call in calls}


def publish(graph: str, said: Mapping[str, PrefectFuture[Answer]]) -> str:
    """Wait for every call of a graph, and write the run's artifacts: its answer, its ledger and its timeline.

    Args:
        graph: The graph's name; the artifacts' keys begin with it.
        said: The submitted calls by their ids, that of `answer` among them.

    Returns:
        The answer.

    Raises:
        MoARayError: If the answer's call failed.
    """
    for future in said.values():
        future.wait()
    states = {call: future.state for call, future in said.items()}
    key = re.sub("[^a-z0-9]+", "-", graph.lower()).strip("-")
    create_table_artifact([_row(call, state) for call, state in states.items()], f"{key}-ledger", "What each call took")
    create_markdown_artifact(f"```text\n{_timeline(states)}\n```", f"{key}-timeline", "When each call was at work")
    answer: Answer = said[ANSWER].result()
    create_markdown_artifact(answer.text, f"{key}-answer", answer.note or "The answer")
    return answer.text


def _found(state: State[Any]) -> Answer | None:
    """The answer of a call, None where it failed."""
    result = state.result(raise_on_failure=False) if state.is_completed() else None
    return result if isinstance(result, Answer) else None


def _kept(state: State[Any]) -> bool:
    """Whether an earlier run had the answer already."""
    return bool(state.name == "Cached")


def _row(call: str, state: State[Any]) -> dict[str, Any]:
    """A call in the ledger; a vote asks no agent."""
    answer = _found(state)
    if answer is None:
        return {"call": call, "state": "failed", "error": state.message or state.name}
    agent = answer.agents[0] if answer.agents else None
    return {
        "call": call,
        "agent": agent.agent if agent else "",
        "engine": agent.engine if agent else "",
        "state": "kept" if _kept(state) else "finished",
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "cached_tokens": answer.usage.cached_tokens,
        "seconds": round(answer.total_s or 0.0, 3),
    }


def _timeline(states: Mapping[str, State[Any]]) -> str:
    """A line a call, with a bar from its last attempt's beginning to its end."""
    ends = {call: state.timestamp.timestamp() for call, state in states.items()}
    spans = {call: (end - _seconds(states[call]), end) for call, end in ends.items()}
    first, last = min(begin for begin, _ in spans.values()), max(ends.values())
    wide, scale = max(map(len, states)), (_BAR - 1) / (last - first or 1.0)
    lines = []
    for call, (begin, end) in spans.items():
        start, stop = round((begin - first) * scale), round((end - first) * scale)
        bar = " " * start + _mark(states[call]) * (stop - start + 1)
        lines.append(f"{call:{wide}}  {bar:{_BAR}}  {end - first:.2f} s")
    return "\n".join([*lines, "", "█ at work  ↺ kept from an earlier run  × failed"])


def _seconds(state: State[Any]) -> float:
    answer = None if _kept(state) else _found(state)
    return answer.total_s or 0.0 if answer else 0.0


def _mark(state: State[Any]) -> str:
    return "↺" if _kept(state) else "█" if state.is_completed() else "×"

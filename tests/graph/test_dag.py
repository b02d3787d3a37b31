from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.errors import SpecError
from moa_ray.graph import Graph, from_dict

ENGINE = {"kind": "scripted", "model": "m"}


def graph(agents: str | dict[str, Any] = "a b chief", **spec: Any) -> Graph:
    given: dict[str, Any] = {
        "version": 1,
        "name": "g",
        "engines": {"s": ENGINE},
        "agents": {name: {"engine": "s"} for name in agents.split()} if isinstance(agents, str) else agents,
        "aggregator": "chief",
        **spec,
    }
    return from_dict(given)


@pytest.mark.parametrize(("layers", "calls"), [([6, 6], 13), ([6], 7), ([3, 3, 3, 3], 13)])
def test_a_layered_graph_plans_one_call_an_agent_and_layer_and_one_for_the_answer(
    layers: list[int], calls: int
) -> None:
    names = [f"a{n}" for n in range(max(layers))]
    built = graph(" ".join([*names, "chief"]), layers=[names[:count] for count in layers])
    assert len(built.calls) + 1 == calls
    assert built.depth == len(layers)
    for call in built.calls:
        before = tuple(c.id for c in built.calls if c.layer == call.layer - 1)
        assert call.inputs == before
    assert built.answer is not None and len(built.answer.inputs) == layers[-1]


def test_samples_are_calls_of_their_own_and_all_are_seen_by_the_next_layer() -> None:
    built = graph(
        {"a": {"engine": "s", "samples": 3}, "b": {"engine": "s"}, "chief": {"engine": "s"}},
        layers=[["a"], ["b"]],
    )
    assert [call.id for call in built.calls] == ["1/a#1", "1/a#2", "1/a#3", "2/b"]
    assert built.calls[-1].inputs == ("1/a#1", "1/a#2", "1/a#3")


def test_a_free_graph_keeps_the_users_order_of_inputs_and_ends_with_the_nodes_that_nobody_sees() -> None:
    nodes = {
        "late": {"agent": "b", "inputs": ["second", "first"]},
        "first": {"agent": "a"},
        "second": {"agent": "a"},
        "lone": {"agent": "b"},
    }
    built = graph(nodes=nodes)
    calls = {call.id: call for call in built.calls}
    assert calls["late"].inputs == ("second", "first") and calls["late"].layer == 2
    assert built.finals == ("late", "lone")
    order = list(calls)
    assert order.index("late") > max(order.index("first"), order.index("second"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"nodes": {"x": {"agent": "a", "inputs": ["y"]}, "y": {"agent": "b", "inputs": ["x"]}}}, "x -> y -> x"),
        ({"nodes": {"x": {"agent": "a", "inputs": ["x"]}, "y": {"agent": "b"}}}, "wait for each other: x -> x"),
        ({"nodes": {"x": {"agent": "a", "inputs": ["z"]}, "y": {"agent": "b"}}}, r"nodes\.x\.inputs\[0\]: there is no"),
        ({"nodes": {"x": {"agent": "a"}, "y": {"agent": "b", "inputs": ["x", "x"]}}}, "'x' stands twice"),
        ({"nodes": {"x": {"agent": "a"}}, "layers": [["b"]]}, "either layers or nodes"),
        ({}, "there is nobody to aggregate"),
        ({"layers": [["a"]]}, "agents.b: no layer, node, aggregator or gate asks this agent"),
        ({"layers": [["a", "b"]], "engines": {"s": ENGINE, "t": ENGINE}}, "engines.t: no agent uses this engine"),
        ({"layers": [["a", "b"]], "aggregator": {"vote": {"extract": "regex"}}}, "regex and pattern go together"),
        ({"layers": [["a", "b"]], "aggregator": {"vote": {"extract": "regex", "pattern": "("}}}, "no regular"),
        ({"layers": [["a", "b"]], "aggregator": {"rank": {"agent": "zed"}}}, r"aggregator\.rank\.agent: there is"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_graph_is_told(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        graph(**spec)


def test_an_aggregator_with_samples_and_an_own_engine_with_a_taken_name_are_told() -> None:
    with pytest.raises(SpecError, match=r"agents\.chief\.samples: an aggregator answers once"):
        graph({"a": {"engine": "s"}, "chief": {"engine": "s", "samples": 2}}, layers=[["a"]])
    with pytest.raises(SpecError, match="would be called 's', which is taken"):
        graph({"s": {"engine": ENGINE}, "chief": {"engine": "s"}}, layers=[["s"]])


def test_an_inline_engine_is_an_engine_of_the_agents_name() -> None:
    built = graph({"a": {"engine": ENGINE}, "chief": {"engine": "s"}}, layers=[["a"]])
    assert set(built.engines) == {"s", "a"} and built.engine_of("a") == "a" and built.engine_of("chief") == "s"


@given(st.integers(1, 12).flatmap(lambda n: st.lists(st.sets(st.integers(0, n - 1)), min_size=n, max_size=n)))
def test_any_acyclic_graph_is_ordered_and_any_cyclic_one_refused(edges: list[set[int]]) -> None:
    nodes = {f"n{i}": {"agent": "a", "inputs": [f"n{j}" for j in sorted(seen)]} for i, seen in enumerate(edges)}
    try:
        built = graph("a chief", nodes=nodes)
    except SpecError as error:
        assert "wait for each other" in error.message
        assert any(_reaches(edges, i, i) for i in range(len(edges)))
        return
    place = {call.id: number for number, call in enumerate(built.calls)}
    assert all(place[given] < place[call.id] for call in built.calls for given in call.inputs)
    assert len(place) == len(edges)


def _reaches(edges: list[set[int]], start: int, goal: int) -> bool:
    seen, todo = set(), list(edges[start])
    while todo:
        node = todo.pop()
        if node == goal:
            return True
        if node not in seen:
            seen.add(node)
            todo += edges[node]
    return False

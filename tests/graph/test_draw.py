from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.graph import Graph, draw
from tests.graph.test_dag import graph

DIAMOND: dict[str, Any] = {
    "top": {"agent": "a"},
    "left": {"agent": "b", "inputs": ["top"]},
    "end": {"agent": "a", "inputs": ["top", "left"]},
}


def test_a_layered_graph_in_the_terminal() -> None:
    assert draw.terminal(graph(layers=[["a", "b"]])).splitlines() == [
        "            ┌─▶ a (s) ──┐",
        " question ──┤           ├─▶ chief (s) ────▶ answer",
        "            └─▶ b (s) ──┘",
    ]


def test_a_line_passes_by_the_layer_that_it_skips() -> None:
    picture = draw.terminal(graph(nodes=DIAMOND))
    assert "▶ top: a (s) " in picture and "▶ left: b (s) " in picture and "▶ end: a (s) " in picture
    assert draw.mermaid(graph(nodes=DIAMOND)).splitlines()[-5:] == [
        "    n1 --> n2",
        "    n1 --> n3",
        "    n2 --> n3",
        "    n3 --> n4",
        "    n4 --> n5",
    ]


@pytest.mark.parametrize(
    ("aggregator", "label"),
    [({"vote": {}}, "vote (majority)"), ({"rank": {"agent": "chief"}}, "chief picks (s)"), ("chief", "chief (s)")],
)
def test_every_aggregator_has_its_box(aggregator: Any, label: str) -> None:
    agents = "a b" if "vote" in aggregator else "a b chief"
    assert label in draw.terminal(graph(agents, layers=[["a", "b"]], aggregator=aggregator))


def test_samples_are_one_box_with_their_number() -> None:
    agents = {"a": {"engine": "s", "samples": 4}, "chief": {"engine": "s"}}
    assert "▶ a ×4 (s) " in draw.terminal(graph(agents, layers=[["a"]]))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(1, 8))
    nodes = {
        f"n{i}": {"agent": "a", "inputs": [f"n{j}" for j in sorted(draw(st.sets(st.integers(0, i - 1))))] if i else []}
        for i in range(count)
    }
    return graph("a chief", nodes=nodes)


@given(graphs())
def test_any_graph_is_drawn_with_every_node_once_and_no_loose_end(given_graph: Graph) -> None:
    picture = draw.terminal(given_graph)
    for call in given_graph.calls:
        assert len(re.findall(rf" {call.id}: a ", picture)) == 1
    lines = picture.splitlines()
    grid = [line.ljust(max(map(len, lines))) for line in lines]
    down, up = set("│┐┌┤├┬┼"), set("│┘└┤├┴┼")
    for above, below in pairwise(grid):
        for x, (one, other) in enumerate(zip(above, below, strict=True)):
            # A trunk goes on below, or another line bridges over it.
            assert one not in down or other in up | {"─"}, f"loose end in column {x}:\n{picture}"


@given(graphs())
def test_svg_is_well_formed_and_holds_every_node_and_edge(given_graph: Graph) -> None:
    root = ElementTree.fromstring(draw.svg(given_graph))
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(texts.count(f"{call.id}: a") == 1 for call in given_graph.calls)
    edges = draw.mermaid(given_graph).count("-->")
    assert edges == sum(max(1, len(call.inputs)) for call in given_graph.calls) + len(given_graph.finals) + 1

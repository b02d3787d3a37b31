from __future__ import annotations

import io
from xml.etree import ElementTree

from rich.console import Console

from moa_ray.cli import gantt
from moa_ray.runtime import Timeline
from tests.runtime.panels import panel
from tests.runtime.virtual import simulate


def _timeline() -> Timeline:
    spec = {"policy": {"streaming": "overlap"}, "prompt": "woven"}
    run, _ = panel(2, spec=spec, ttft_s=0.2, itl_s=0.01, reply_tokens=100, prefill_s_per_token=0.001)
    return Timeline(simulate(run.run("why?")).trace)


def test_the_terminal_shows_a_bar_for_each_call_and_where_the_answer_begins() -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    console.print(gantt.terminal(_timeline(), 100))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    bars = {line.split()[0]: line for line in lines if "█" in line and "decode" not in line}
    assert set(bars) == {"1/a1", "1/a2", "answer"}
    assert "░" in bars["answer"] and "▒" in bars["1/a1"]
    assert bars["1/a1"].index("█") < bars["answer"].index("█")
    mark = next(line for line in lines if "first token" in line)
    assert abs(mark.index("▲") - bars["answer"].index("█")) <= 1
    assert max(map(len, lines)) <= 100


def test_the_picture_is_well_formed_and_has_every_span() -> None:
    timeline = _timeline()
    root = ElementTree.fromstring(gantt.svg(timeline, "a <graph>"))
    bars = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    assert len(bars) == sum(len(row.spans) for row in timeline.rows)
    width = float(root.attrib["width"])
    assert all(float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width for bar in bars)


def test_a_run_without_calls_is_drawn_too() -> None:
    ElementTree.fromstring(gantt.svg(Timeline(), "nothing"))
    Console(file=io.StringIO()).print(gantt.terminal(Timeline(), 80))

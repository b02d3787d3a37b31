"""A graph as a picture: in the terminal, as Mermaid, as SVG.

All three draw the same layout: a column for the question, one for each layer, one for the aggregator. Where an answer
skips a column, a cell without a label carries its line through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from moa_ray.graph.dag import Call, Graph
from moa_ray.graph.spec import PluginAggregator, RankAggregator, VoteAggregator


@dataclass(frozen=True, slots=True)
class _Cell:
    """A place in a column.

    Args:
        id: Unique in the picture.
        inputs: Ids of cells in the column before.
        label: What stands there; "" for a line that passes through.
        detail: The second line, an engine most often.
    """

    id: str
    inputs: tuple[str, ...] = ()
    label: str = ""
    detail: str = ""


_Columns = list[list[_Cell]]


def terminal(graph: Graph) -> str:
    """The picture in box-drawing characters, as wide as it needs to be."""
    columns = _columns(graph)
    rows = _rows(columns)
    canvas = [""] * (2 * max(map(len, columns)) + 1)
    for number, column in enumerate(columns):
        if number:
            _draw_channel(canvas, column, rows)
        last = number + 1 == len(columns)
        width = max(len(_in_line(cell)) for cell in column) + 1
        at = {rows[cell.id]: cell for cell in column}
        for line in range(len(canvas)):
            text = _in_line(at[line]) if line in at else ""
            canvas[line] += text.ljust(width, "─" if line in at and not last else " ")
    return "\n".join(line.rstrip() for line in canvas if line.strip())


def mermaid(graph: Graph) -> str:
    """A Mermaid flowchart, as Markdown renderers show it."""
    lines = ["flowchart LR"]
    real = [cell for cell in _cells(graph) if cell.label]
    names = {cell.id: f"n{number}" for number, cell in enumerate(real)}
    for cell in real:
        detail = f"<br/><small>{escape(cell.detail)}</small>" if cell.detail else ""
        opening, closing = ("([", "])") if not cell.detail else ("[", "]")
        lines.append(f'    {names[cell.id]}{opening}"{escape(cell.label)}{detail}"{closing}')
    lines += [f"    {names[given]} --> {names[cell.id]}" for cell in real for given in cell.inputs]
    return "\n".join(lines)


_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 46, 70, 18, 16
_CHARACTER = 8.2
"""Pixels that a letter of a label takes, on the high side."""


def svg(graph: Graph) -> str:
    """A picture that stands alone; light or dark with its reader's preference."""
    columns = _columns(graph)
    tall = max(map(len, columns)) * (_HEIGHT + _GAP_Y) - _GAP_Y
    wide = round(28 + _CHARACTER * max(len(text) for cell in _cells(graph) for text in (cell.label, cell.detail)))
    places: dict[str, tuple[float, float]] = {}
    for number, column in enumerate(columns):
        top = _MARGIN + (tall - len(column) * (_HEIGHT + _GAP_Y) + _GAP_Y) / 2
        for index, cell in enumerate(column):
            places[cell.id] = (_MARGIN + number * (wide + _GAP_X), top + index * (_HEIGHT + _GAP_Y))
    cells = [cell for column in columns for cell in column]
    width = 2 * _MARGIN + len(columns) * (wide + _GAP_X) - _GAP_X
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall + 2 * _MARGIN}" '
            f'width="{width}" height="{tall + 2 * _MARGIN}" role="img">',
            f"<title>{escape(graph.spec.name)}</title>",
            _STYLE,
            *(
                _edge(places[given], places[cell.id], wide, arrow=bool(cell.label))
                for cell in cells
                for given in cell.inputs
            ),
            *(_box(places[cell.id], wide, cell) for cell in cells),
            "</svg>",
        ]
    )


# ---------------------------------------------------------------- layout


def _columns(graph: Graph) -> _Columns:
    """Cells column by column, lines that skip a column carried through it."""
    layer_of = {cell.id: layer for layer, cell in _placed(graph)}
    columns: _Columns = [[] for _ in range(max(layer_of.values()) + 1)]
    carried: set[str] = set()
    for layer, cell in _placed(graph):
        inputs = []
        for given in cell.inputs:
            previous = given
            for between in range(layer_of[given] + 1, layer):
                name = f"{given}>{between}"
                if name not in carried:
                    carried.add(name)
                    columns[between].append(_Cell(name, (previous,)))
                previous = name
            inputs.append(previous)
        columns[layer].append(_Cell(cell.id, tuple(inputs), cell.label, cell.detail))
    return columns


def _cells(graph: Graph) -> Iterator[_Cell]:
    return (cell for _, cell in _placed(graph))


def _placed(graph: Graph) -> Iterator[tuple[int, _Cell]]:
    """Every cell with its column; the samples of an agent are one cell."""
    yield 0, _Cell("?", label="question")
    seen: set[str] = set()
    for call in graph.calls:
        name = _base(call.id)
        if name not in seen:
            seen.add(name)
            yield (
                call.layer,
                _Cell(name, _bases(call.inputs) or ("?",), _label(graph, call), graph.engine_of(call.agent)),
            )
    finals, last = _bases(graph.finals), graph.depth + 1
    match graph.spec.aggregator:
        case VoteAggregator():
            yield last, _Cell("=", finals, "vote", "majority")
        case PluginAggregator(kind=kind):
            yield last, _Cell("=", finals, kind, "plug-in")
        case RankAggregator(rank=rank):
            yield last, _Cell("=", finals, f"{rank.agent} picks", graph.engine_of(rank.agent))
        case str(agent):
            yield last, _Cell("=", finals, agent, graph.engine_of(agent))
    yield last + 1, _Cell("!", ("=",), "answer")


def _label(graph: Graph, call: Call) -> str:
    samples = graph.spec.agents[call.agent].samples
    name = _base(call.id).partition("/")[2] or call.id.partition("#")[0]
    who = name if name == call.agent else f"{name}: {call.agent}"
    return f"{who} ×{samples}" if samples > 1 else who


def _base(call: str) -> str:
    return call.partition("#")[0]


def _bases(calls: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_base, calls)))


# ---------------------------------------------------------------- in the terminal


def _in_line(cell: _Cell) -> str:
    if not cell.label:
        return ""
    return f" {cell.label} ({cell.detail}) " if cell.detail and cell.detail != cell.label else f" {cell.label} "


def _rows(columns: _Columns) -> dict[str, int]:
    """Line of every cell.

    Neighbouring columns take even and odd lines in turn, so that the lines which leave a column never run into those
    that enter the next one; a line from one cell to one cell is straight.
    """
    rows: dict[str, int] = {}
    middle, parity, before = max(map(len, columns)), 0, 0
    for column in columns:
        if not len(column) == before == 1:
            parity = 1 - parity
        start = middle - len(column)
        start += (start + parity) % 2
        rows |= {cell.id: start + 2 * index for index, cell in enumerate(column)}
        before = len(column)
    return rows


_UP, _DOWN, _LEFT, _RIGHT = 1, 2, 4, 8
_BOX = {0: " ", 3: "│", 12: "─", 6: "┐", 5: "┘", 10: "┌", 9: "└", 7: "┤", 11: "├", 14: "┬", 13: "┴", 15: "┼"}


def _draw_channel(canvas: list[str], column: list[_Cell], rows: dict[str, int]) -> None:
    """The lines that lead into a column: one trunk for each distinct set of inputs."""
    joins: dict[tuple[str, ...], list[_Cell]] = {}
    for cell in column:
        joins.setdefault(cell.inputs, []).append(cell)
    width = 2 * len(joins) + 1
    grid = [[0] * width for _ in canvas]
    for number, (inputs, cells) in enumerate(joins.items()):
        trunk = 2 * number + 1
        sources, targets = [rows[name] for name in inputs], [rows[cell.id] for cell in cells]
        top, bottom = min(sources + targets), max(sources + targets)
        for row in range(top, bottom):
            grid[row][trunk] |= _DOWN
            grid[row + 1][trunk] |= _UP
        for row, start, end in [*((row, 0, trunk) for row in sources), *((row, trunk, width) for row in targets)]:
            _draw_across(grid[row], start, end, trunk)
    heads = {rows[cell.id]: "▶" if cell.label else "─" for cell in column}
    for row, bits in enumerate(grid):
        text = "".join(_BOX.get(value, "─" if value & (_LEFT | _RIGHT) else "│") for value in bits)
        canvas[row] += text + heads.get(row, " ")


def _draw_across(row: list[int], start: int, end: int, trunk: int) -> None:
    """A horizontal line, joined to its own trunk and bridging over every other."""
    for x in range(start, end):
        if x != trunk:
            row[x] = _LEFT | _RIGHT if row[x] in (0, _UP | _DOWN) else row[x] | _LEFT | _RIGHT
    row[trunk] |= _RIGHT if start == trunk else _LEFT


# ---------------------------------------------------------------- as SVG

_STYLE = """<style>
  svg { font-family: ui-sans-serif, system-ui, sans-serif; font-size: 14px }
  rect { fill: #fff; stroke: #4b5563 } text { fill: #111827; text-anchor: middle } .d { fill: #6b7280; font-size: 12px }
  path { fill: none; stroke: #9ca3af; stroke-width: 1.5 } .a { fill: #9ca3af; stroke: none }
  @media (prefers-color-scheme: dark) {
    rect { fill: #1f2937; stroke: #9ca3af } text { fill: #f9fafb } .d { fill: #9ca3af } path { stroke: #6b7280 }
  }
</style>"""


def _edge(start: tuple[float, float], end: tuple[float, float], wide: int, *, arrow: bool) -> str:
    x1, y1 = start[0] + wide, start[1] + _HEIGHT / 2
    x2, y2 = end[0], end[1] + _HEIGHT / 2
    bend = (x1 + x2) / 2
    head = f'<path class="a" d="M{x2 - 7} {y2 - 4} L{x2} {y2} L{x2 - 7} {y2 + 4} Z"/>' if arrow else ""
    return f'<path d="M{x1} {y1} C{bend} {y1} {bend} {y2} {x2} {y2}"/>{head}'


def _box(place: tuple[float, float], wide: int, cell: _Cell) -> str:
    x, y = place
    middle, half = x + wide / 2, y + _HEIGHT / 2
    if not cell.label:
        return f'<path d="M{x} {half} H{x + wide}"/>'
    if not cell.detail:
        return f'<text x="{middle}" y="{half + 5}">{escape(cell.label)}</text>'
    return (
        f'<rect x="{x}" y="{y}" width="{wide}" height="{_HEIGHT}" rx="8"/>'
        f'<text x="{middle}" y="{y + 20}">{escape(cell.label)}</text>'
        f'<text class="d" x="{middle}" y="{y + 37}">{escape(cell.detail)}</text>'
    )

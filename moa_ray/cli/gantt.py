"""A run's timeline as a picture: in the terminal, and as SVG."""

from __future__ import annotations

from html import escape

from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from moa_ray.runtime.timeline import KINDS, Kind, Row, Timeline

_LOOKS: dict[Kind, tuple[str, str]] = {
    "warm-up": ("░", "yellow"),
    "queue": ("·", "bright_black"),
    "prefill": ("▒", "blue"),
    "decode": ("█", "green"),
    "lost": ("×", "red"),
}
_COLOURS: dict[Kind, str] = {
    "warm-up": "#eab308",
    "queue": "#d1d5db",
    "prefill": "#3b82f6",
    "decode": "#22c55e",
    "lost": "#ef4444",
}


def terminal(timeline: Timeline, width: int) -> Table:
    """A table of bars, `width` characters wide in all."""
    rows = timeline.rows
    names = max((len(row.call) for row in rows), default=0)
    cells = max(20, width - names - 12)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("call", no_wrap=True)
    table.add_column(_legend(), no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.call, _bar(row, timeline.total_s, cells), f"{max(span.end for span in row.spans):.2f}")
    if timeline.ttft_s is not None:
        at = round(timeline.ttft_s / timeline.total_s * (cells - 1))
        table.add_row("", Text(_mark(at, cells)), f"{timeline.ttft_s:.2f}")
    return table


def _mark(at: int, cells: int) -> str:
    """What points at a cell, its words on the side that has room for them."""
    words = "first token"
    return f"{' ' * at}▲ {words}" if at + 2 + len(words) <= cells else f"{words} ▲".rjust(at + 1)


def _legend() -> Text:
    return Text("  ").join(Text(f"{_LOOKS[kind][0]} {kind}", _LOOKS[kind][1]) for kind in KINDS)


def _bar(row: Row, total_s: float, cells: int) -> Text:
    line: list[Segment] = [Segment(" ")] * cells
    for span in row.spans:
        character, style = _LOOKS[span.kind]
        first, last = (min(cells - 1, int(t / total_s * cells)) for t in (span.start, span.end))
        for cell in range(first, last + 1):
            line[cell] = Segment(character, Style.parse(style))
    return Text.assemble(*((segment.text, segment.style or "") for segment in line))


_ROW, _LABEL, _CHART, _MARGIN = 26, 150, 760, 16
_STYLE = """<style>
  svg { font: 13px ui-sans-serif, system-ui, sans-serif } text { fill: #111827 } .d { fill: #6b7280; font-size: 11px }
  line { stroke: #9ca3af; stroke-dasharray: 3 3 }
  @media (prefers-color-scheme: dark) { text { fill: #f9fafb } .d { fill: #9ca3af } }
</style>"""


def svg(timeline: Timeline, title: str) -> str:
    """A picture that stands alone; light or dark with its reader's preference."""
    rows, left = timeline.rows, _MARGIN + _LABEL
    bottom = _MARGIN + _ROW * (len(rows) + 1)
    width, height = left + _CHART + _MARGIN, bottom + _ROW

    def x(t: float) -> float:
        return round(left + (t / timeline.total_s if timeline.total_s else 0) * _CHART, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">',
        f"<title>{escape(title)}</title>",
        _STYLE,
    ]
    for number, kind in enumerate(KINDS):
        at = left + number * 90
        parts.append(f'<rect x="{at}" y="{_MARGIN}" width="12" height="12" fill="{_COLOURS[kind]}"/>')
        parts.append(f'<text class="d" x="{at + 17}" y="{_MARGIN + 10}">{kind}</text>')
    for number, row in enumerate(rows, start=1):
        y = _MARGIN + number * _ROW
        parts.append(f'<text x="{_MARGIN}" y="{y + 14}">{escape(row.call)}</text>')
        for span in row.spans:
            label = f"{row.call} on {row.engine}: {span.kind} {span.start:.2f}-{span.end:.2f} s"
            wide = max(1.0, x(span.end) - x(span.start))
            parts.append(
                f'<rect x="{x(span.start)}" y="{y}" width="{wide:.1f}" height="{_ROW - 8}" '
                f'fill="{_COLOURS[span.kind]}"><title>{escape(label)}</title></rect>'
            )
    marks = [(0.0, "0 s"), (timeline.total_s, f"{timeline.total_s:.2f} s")]
    if timeline.ttft_s is not None:
        first = x(timeline.ttft_s)
        parts.append(f'<line x1="{first}" x2="{first}" y1="{_MARGIN + _ROW}" y2="{bottom}"/>')
        marks.append((timeline.ttft_s, f"first token {timeline.ttft_s:.2f} s"))
    parts += [f'<text class="d" x="{x(t)}" y="{bottom + 14}" text-anchor="middle">{text}</text>' for t, text in marks]
    return "\n".join([*parts, "</svg>"])

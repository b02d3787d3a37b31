"""Results for people: a table for the terminal, and one HTML page that needs nothing else."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from html import escape
from math import isfinite, nan
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moa_ray.evaluate.results import ArmFigures, Results
from moa_ray.evaluate.statistics import Interval
from moa_ray.evaluate.tune import Panel, Tuned

_WIDTH = 110
_SHOWN_PROBLEMS = 5


def text(group: Group, width: int = _WIDTH) -> str:
    """What is for a terminal, as plain text."""
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(group)
    return file.getvalue().rstrip()


def rendered(results: Results) -> Group:
    """The report for a terminal."""
    remarks = [Text(line) for line in _remarks(results)]
    return Group(*_tables(results), *remarks, Text(results.verdict, style="bold"))


def _tables(results: Results) -> list[Table]:
    return [_arms(results), *([_comparisons(results)] if results.comparisons else [])]


def _arms(results: Results) -> Table:
    task = results.task
    how = f"scored by {task.scorer}" if task.scorer else "judged"
    table = _table(f"{task.name}: {len(task.items)} questions, {how}")
    table.add_column("arm", overflow="fold")
    for name in ("score, %", "tokens", "per right", "TTFT", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in results.arms:
        table.add_row(
            arm.name,
            _percent(arm.score),
            f"{arm.tokens:.0f}",
            _number(arm.tokens_per_correct.estimate if arm.tokens_per_correct else nan),
            _seconds(arm.ttft_s),
            _seconds(arm.total_s),
        )
    return table


def _comparisons(results: Results) -> Table:
    table = _table(f"{results.arms[0].name} beside")
    table.add_column("arm", overflow="fold")
    scored, judged = (
        any(getattr(each, name) is not None for each in results.comparisons) for name in ("difference", "win_rate")
    )
    names = [*(("points", "p") if scored else ()), *(("win rate, %", "length-controlled") if judged else ()), "tokens"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for each in results.comparisons:
        scores = (_percent(each.difference, sign=True), "–" if each.p is None else f"{each.p:.2g}")
        wins = (_percent(each.win_rate), _percent(each.win_rate_length_controlled))
        table.add_row(
            each.arm, *(scores if scored else ()), *(wins if judged else ()), _number(each.tokens_ratio, 2, "x")
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _remarks(results: Results) -> list[str]:
    """What a reader should know before believing the figures."""
    remarks = [f"{len(results.task.problems)} lines left out" for _ in results.task.problems[:1]]
    remarks += [f"  {problem}" for problem in results.task.problems[:_SHOWN_PROBLEMS]]
    for arm in results.arms:
        if arm.failed:
            first = next(trial for trial in results.trials[arm.name] if trial.error)
            remarks.append(f"{arm.name} failed on {arm.failed} questions, which count as wrong: {first.error}")
    for each in results.comparisons:
        if each.undecided:
            remarks.append(f"beside {each.arm}: {each.undecided} times a judge gave no verdict, counted as a tie")
        if each.first_place is not None:
            share = f"{100 * each.first_place:.0f} %"
            remarks.append(f"beside {each.arm}: where a judge's verdict followed the order, it liked the first {share}")
    remarks += [f"{one} and {two} agree on {100 * alike:.0f} %" for (one, two), alike in results.agreement.items()]
    return remarks


def tuned(found: Tuned, agreement: Mapping[str, float]) -> Group:
    """What was chosen, and why, for a terminal."""
    roles = _table("mean score on the questions that choose, %")
    roles.add_column("model", overflow="fold")
    for name in ("alone", "proposer", "aggregator", "agrees"):
        roles.add_column(name, justify="right", no_wrap=True)
    for model, role in found.roles.items():
        worth = (f"{100 * value:.1f}" for value in (role.alone, role.proposer, role.aggregator))
        roles.add_row(model, *worth, f"{100 * agreement[model]:.0f}" if model in agreement else "–")
    steps = _table("proposers, one more each time")
    steps.add_column("panel", overflow="fold")
    for name in ("chosen on", "held out", "tokens", "total"):
        steps.add_column(name, justify="right", no_wrap=True)
    for step in found.steps:
        scores = (f"{100 * value:.1f}" for value in (step.chosen_on, step.held_out))
        chosen = "*" if step.panel == found.panel else " "
        steps.add_row(f"{chosen} {_panel(step.panel)}", *scores, f"{step.tokens:.0f}", _seconds(step.total_s))
    return Group(roles, steps, Text(_chosen(found), style="bold"))


def _panel(panel: Panel) -> str:
    proposers, chief = panel
    names = [name if count == 1 else f"{name} x {count}" for name, count in Counter(proposers).items()]
    return names[0] if chief is None else f"{' + '.join(names)} > {chief}"


def _chosen(found: Tuned) -> str:
    if found.gain is None:
        return f"{_panel(found.panel)} alone: no panel within the budget is better on the questions that are held out"
    gain = _percent(found.gain, sign=True)
    surely = "" if found.gain.low > 0 else ", which may be chance"
    return f"{_panel(found.panel)}: {gain} points over {_panel(found.steps[0].panel)} alone{surely}"


def _percent(interval: Interval | None, *, sign: bool = False) -> str:
    if interval is None or not isfinite(interval.estimate):
        return "–"
    plus = "+" if sign else ""
    low, high = (f"{100 * end:{plus}.1f}" for end in (interval.low, interval.high))
    return f"{100 * interval.estimate:{plus}.1f} [{low}, {high}]"


def _number(value: float, digits: int = 0, unit: str = "") -> str:
    return f"{value:.{digits}f}{unit}" if isfinite(value) else "–"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"


# ---------------------------------------------------------------- HTML

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }}
table {{ border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #d8dee4 }}
th:first-child, td:first-child {{ text-align: left }}
.verdict {{ font-size: 1.2rem; padding: .8rem 1rem; background: #eef4ff; border-left: 4px solid #2f6feb }}
figure {{ margin: 1.5rem 0 }} svg {{ max-width: 100%; height: auto }} figcaption, .remarks {{ color: #57606a }}
</style></head><body><h1>{title}</h1><p class="verdict">{verdict}</p>{body}</body></html>
"""


def html(results: Results) -> str:
    """The report as one self-contained page, with plots as SVG."""
    parts = [_html_table(table) for table in _tables(results)]
    for caption, draw in _PLOTS:
        if (picture := draw(results)) is not None:
            parts.append(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
    remarks = "".join(f"<li>{escape(line.strip())}</li>" for line in _remarks(results))
    parts.append(f'<ul class="remarks">{remarks}</ul>' if remarks else "")
    title = f"{results.arms[0].name} on {results.task.name}"
    return _PAGE.format(title=escape(title), verdict=escape(results.verdict), body="".join(parts))


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(str(column.header))}</th>" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{escape(str(table.title))}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _svg(draw: Callable[[Any], None], *, height: float = 3.6) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    draw(figure.add_subplot())
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    told = out.getvalue()
    return told[told.index("<svg") :]


def _quality_against_cost(results: Results) -> str | None:
    scored = [(arm, arm.score) for arm in results.arms if arm.score is not None]
    if not scored:
        return None

    def draw(axes: Any) -> None:
        for arm, score in scored:
            low, high = score.estimate - score.low, score.high - score.estimate
            bar = axes.errorbar(
                [arm.tokens], [100 * score.estimate], yerr=[[100 * low], [100 * high]], fmt="o", capsize=3
            )
            axes.annotate(
                arm.name, (arm.tokens, 100 * score.estimate), (6, 4), textcoords="offset points", fontsize=8,
                color=bar[0].get_color(),
            )  # fmt: skip
        axes.set(xlabel="tokens of a question, prompt and completion", ylabel="score, %", xscale="log")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("{x:.0f}")
        axes.margins(x=0.2)
        axes.grid(alpha=0.3)

    return _svg(draw)


def _by_category(results: Results) -> str | None:
    return _bars(results, lambda arm: arm.by_category)


def _by_layer(results: Results) -> str | None:
    return _bars(results, lambda arm: arm.by_layer if len(arm.by_layer) > 1 else {})


def _bars(results: Results, values: Callable[[ArmFigures], Mapping[str, float]]) -> str | None:
    shown = {arm.name: values(arm) for arm in results.arms if values(arm)}
    names = list(dict.fromkeys(name for each in shown.values() for name in each))
    if not names:
        return None

    def draw(axes: Any) -> None:
        width = 0.8 / len(shown)
        for number, (arm, each) in enumerate(shown.items()):
            places = [index + (number - (len(shown) - 1) / 2) * width for index in range(len(names))]
            axes.bar(places, [100 * each.get(name, nan) for name in names], width * 0.9, label=arm)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("score, %")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    return _svg(draw)


def _agreement(results: Results) -> str | None:
    names = list(dict.fromkeys(name for pair in results.agreement for name in pair))
    if not names:
        return None

    def draw(axes: Any) -> None:
        grid = [[_alike(results, one, two) for two in names] for one in names]
        axes.imshow([[100 * each for each in row] for row in grid], vmin=0, vmax=100, cmap="Blues")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        for y, row in enumerate(grid):
            for x, each in enumerate(row):
                if isfinite(each):
                    axes.text(x, y, f"{100 * each:.0f}", ha="center", va="center", color="w" if each > 0.6 else "k")

    return _svg(draw, height=1.5 + 0.5 * len(names))


def _alike(results: Results, one: str, two: str) -> float:
    found = results.agreement.get((one, two), results.agreement.get((two, one)))
    return found if found is not None else 1.0 if one == two else nan


_PLOTS: tuple[tuple[str, Callable[[Results], str | None]], ...] = (
    ("Quality against cost, with 95 % intervals. Up and to the left is better.", _quality_against_cost),
    ("By category.", _by_category),
    ("By layer: what its agents said on average, and the answer that was made of it.", _by_layer),
    ("Agreement between the agents of the first layer, in percent.", _agreement),
)

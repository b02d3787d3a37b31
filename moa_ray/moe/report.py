"""What a training run shows: a progress bar with live statistics, a CSV log, a plot of the loss."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_COLUMNS: tuple[str, ...] = (
    "step",
    "loss",
    "valid_perplexity",
    "learning_rate",
    "tokens_s",
    "cv_importance",
    "cv_load",
    "max_over_mean_load",
    "max_vio",
    "entropy",
    "dropped",
)
_SHOWN = {
    "loss": "loss {:.3f}",
    "valid_perplexity": "valid ppl {:.4g}",
    "tokens_s": "{:,.0f} tok/s",
    "max_over_mean_load": "load x{:.2f}",
}
"""Figures beside the bar; the load is max / mean. All of it fits a terminal of 80 columns."""


class Report:
    """Progress bar and CSV log of one run, as a context manager.

    Args:
        path: The CSV file. Rows up to `first_step` are kept, later ones belong to work that is done again.
        first_step: Steps that are already done.
        steps: Steps of the whole run.
        show: Whether to draw the bar.
    """

    def __init__(self, path: Path, first_step: int, steps: int, *, show: bool) -> None:
        self._path = path
        self._shown: dict[str, float] = {}
        kept = [row for row in _cells(path) if int(row["step"]) <= first_step] if first_step else []
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        columns = (BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, disable=not show)
        self._task = self._progress.add_task("", total=steps, completed=first_step)

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """One step is done."""
        self._progress.advance(self._task)

    def row(self, values: Mapping[str, float]) -> None:
        """Logs a row and shows its main figures beside the bar."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, _COLUMNS).writerow(values)
        self._shown |= values
        text = "  ".join(form.format(self._shown[key]) for key, form in _SHOWN.items() if key in self._shown)
        self._progress.update(self._task, description=text)


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a run's CSV log; empty cells are left out."""
    return [{key: float(value) for key, value in row.items() if value} for row in _cells(path)]


def _cells(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def plot_losses(log: Path, picture: Path) -> None:
    """Draws training loss, validation loss and load balance over the steps.

    Needs matplotlib, which is imported here because nothing else in the room needs it.
    """
    from matplotlib.figure import Figure

    rows = read_log(log)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="nats per token")
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label="training loss")
    checked = [r for r in rows if "valid_perplexity" in r]
    axes.plot(
        [r["step"] for r in checked],
        [math.log(r["valid_perplexity"]) for r in checked],
        "o-",
        label="validation loss",
    )
    loads = [r for r in rows if "max_over_mean_load" in r]
    if loads:
        right = axes.twinx()
        right.set_ylabel("max / mean load")
        right.plot([r["step"] for r in loads], [r["max_over_mean_load"] for r in loads], color="0.7")
        axes.plot([], [], color="0.7", label="max / mean load (right)")
    axes.legend(loc="upper right")
    figure.savefig(picture)

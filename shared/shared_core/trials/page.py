"""Parts of a sweep's page: a table of settings, a table of differences, a plot of a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_core.runs.report import Report
from shared_core.trials.differences import Difference
from shared_core.trials.results import Metric, Trials, spread

COLOURS = ("#9ecae1", "#08519c")  # the mean, single seeds
EXPLAINED = (
    "Differences are paired by seed, with Student's 95 % interval of the mean: one that contains 0 "
    "shows nothing."
)


def add_arms(
    report: Report, trials: Trials, metrics: Mapping[str, Metric], *, first: str = "setting"
) -> None:
    """A table with a line for each setting: mean and deviation of each number, values by seed.

    Args:
        metrics: label and number; the values by seed are those of the first.
        first: heading of the first column.
    """
    lines: list[list[object]] = []
    for name in trials.names:
        if not trials.seeds(name):
            lines.append([name, *([None] * len(metrics)), "not run"])
            continue
        cells = {label: spread(trials.values(name, m)) for label, m in metrics.items()}
        values = next(iter(cells.values()))["values"]
        lines.append([name, *map(mean_text, cells.values()), ", ".join(f"{v:.4f}" for v in values)])
    report.table([first, *metrics, "by seed"], lines)


def mean_text(found: Mapping[str, Any]) -> str:
    """``0.9123 ± 0.0045`` of a :func:`spread`."""
    deviation = "" if found["std"] is None else f" ± {found['std']:.4f}"
    return f"{found['mean']:.4f}{deviation}"


def add_differences(
    report: Report, differences: Sequence[Difference], *, verdicts: Sequence[str] | None = None
) -> None:
    """A table with a line for each difference, and what it says where that is claimed."""
    said = verdicts if verdicts is not None else [None] * len(differences)
    lines = [
        [one.name, ", ".join(f"{100 * value:+.1f}" for value in one.values), one.text, word]
        for one, word in zip(differences, said, strict=True)
    ]
    columns = ["a - b", "by seed, points", "difference", "verdict"]
    width = 4 if verdicts is not None else 3
    report.table(columns[:width], [line[:width] for line in lines])
    report.text(EXPLAINED)


def draw_arms(
    path: Path, trials: Trials, metric: Metric, *, label: str, floor: float | None = None
) -> Path:
    """Mean of each setting and the values of its seeds, as a PNG.

    Args:
        floor: what needs no network, drawn as a line.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in trials.names if trials.seeds(name)]
    figure = Figure(figsize=(7.5, 0.4 * len(names) + 1.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        values = trials.values(name, metric)
        axes.barh(place, sum(values) / len(values), color=COLOURS[0])
        axes.plot(values, [place] * len(values), "o", color=COLOURS[1], ms=4)
    if floor is not None:
        axes.axvline(floor, color="#a63603", ls="--", lw=1, label="without a network")
        axes.legend(loc="lower right", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)
    return path

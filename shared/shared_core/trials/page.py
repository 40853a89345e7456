"""The page of a sweep: a table of settings, a table of differences, a plot of each number."""

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


def add_figures(
    report: Report,
    folder: Path,
    trials: Trials,
    metrics: Mapping[str, Metric],
    *,
    floors: Mapping[str, float] | None = None,
) -> None:
    """A plot for each number; without matplotlib the tables say it all."""
    for number, (label, metric) in enumerate(metrics.items()):
        path = folder / f"trials-{number + 1}.png"
        try:
            draw_arms(path, trials, metric, label=label, floor=(floors or {}).get(label))
        except ImportError:
            return
        report.figure(path, f"{label}: mean and single seeds.")


def write_page(
    folder: str | Path,
    title: str,
    trials: Trials,
    *,
    headline: str,
    rehearsal: bool,
    metrics: Mapping[str, Metric],
    differences: Sequence[Difference] = (),
    verdicts: Sequence[str] | None = None,
    floors: Mapping[str, float] | None = None,
    facts: Sequence[tuple[str, object]] = (),
) -> Path:
    """Write ``report.md`` and ``report.html`` of a whole sweep. Returns the page's path.

    Args:
        folder: of the sweep.
        headline: what was run on what.
        rehearsal: the numbers are no result, which must not be overlooked.
        metrics: label and number of what is shown, the main one first; fractions.
        differences: what is compared.
        verdicts: of the differences, where something is claimed of them.
        floors: by label, what needs no network.
        facts: how it was done.
    """
    report = Report(title)
    (report.note if rehearsal else report.text)(headline)
    report.heading("Results")
    add_arms(report, trials, metrics)
    for label, floor in (floors or {}).items():
        report.text(f"{label} without a network: {floor:.4f}.")
    if differences:
        report.heading("Differences")
        add_differences(report, differences, verdicts=verdicts)
    add_figures(report, Path(folder), trials, metrics, floors=floors)
    if facts:
        report.heading("How")
        report.table(["what", "value"], [[key, value] for key, value in facts])
    return report.write(folder)[1]

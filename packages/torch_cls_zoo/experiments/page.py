"""The record and page of an experiment: means, paired differences, the published column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_core.metrics import paired_difference, summarize
from shared_core.runs import Report
from torch_cls_zoo.experiments.rows import NO_DATA, TITLES, Row

Cells = Mapping[str, Mapping[int, Mapping[str, Any]]]  # row name -> seed -> numbers


def summarize_rows(rows: Sequence[Row], cells: Cells, *, scale: str) -> dict[str, Any]:
    """What was measured, row by row; the first row that ran is what others are compared with.

    Returns:
        By row: ``accuracy`` with mean, std, n and values by seed, the paired difference to the
        first row, ``published``, and for a row that was not run the reason.
    """
    found: dict[str, Any] = {}
    first: str | None = None
    for row in rows:
        reason = dict(row.skip).get(scale)
        mine = cells.get(row.name, {})
        if not mine:
            found[row.name] = {"published": row.published, "not_run": reason or "not run"}
            continue
        first = row.name if first is None else first
        seeds = sorted(mine)
        values = [float(mine[seed]["accuracy"]) for seed in seeds]
        summary = summarize(values)
        entry: dict[str, Any] = {
            "published": row.published,
            "accuracy": {"mean": summary.mean, "std": summary.std, "n": summary.n},
            "values": values,
            "seeds": seeds,
        }
        for key in ("macro_f1", "val_accuracy", "seconds", "best_epoch", "parameters"):
            entry[key] = summarize([float(mine[seed][key]) for seed in seeds]).mean
        both = [seed for seed in seeds if seed in cells[first]]
        if row.name != first and len(both) > 1:
            gap = paired_difference(
                [mine[seed]["accuracy"] for seed in both],
                [cells[first][seed]["accuracy"] for seed in both],
            )
            entry["difference"] = {
                "to": first, "mean": gap.mean, "std": gap.std, "n": gap.n, "low": gap.low,
                "high": gap.high, "wins": gap.wins,
            }  # fmt: skip
        found[row.name] = entry
    return found


def write_page(
    folder: Path,
    experiment: str,
    rows: Sequence[Row],
    measured: Mapping[str, Any],
    *,
    headline: str,
    rehearsal: bool,
    facts: Sequence[tuple[str, Any]],
    floor: Mapping[str, float] | None,
    model_table: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write ``report.md`` and ``report.html``; the page's path."""
    report = Report(TITLES[experiment])
    (report.note if rehearsal else report.text)(headline)
    table = measured["rows"]
    lines = []
    for row in rows:
        entry = table[row.name]
        published = None if row.published is None else f"{row.published:.4f}"
        if "accuracy" not in entry:
            lines.append([row.name, None, None, None, published, entry["not_run"]])
            continue
        accuracy, gap = entry["accuracy"], entry.get("difference")
        spread = "" if accuracy["std"] is None else f" ± {accuracy['std']:.4f}"
        shown = "–" if gap is None else _gap(gap)
        values = ", ".join(f"{value:.4f}" for value in entry["values"])
        note = f"epoch {entry['best_epoch']:.0f}, {entry['seconds']:.0f} s"
        lines.append([row.name, f"{accuracy['mean']:.4f}{spread}", values, shown, published, note])
    report.heading("Test accuracy")
    columns = ["row", "mean ± deviation", "by seed", "difference to the first row (95 %)",
               "published", "best epoch, time"]  # fmt: skip
    report.table(columns, lines)
    if any(row.published is not None for row in rows):
        report.text(f"The published column: {NO_DATA}.")
    if floor is not None:
        report.text(
            "Without a network (logistic regression on image features): "
            f"{floor['plain']:.4f} with plain features, {floor['engineered']:.4f} with "
            "engineered ones."
        )
    report.text(
        "Differences are paired by seed, with Student's interval; one that contains 0 says nothing."
    )
    try:
        report.figure(_bars(folder, rows, table, floor), "Mean and values of the seeds.")
    except ImportError:  # without matplotlib the table says it all
        pass
    if model_table:
        from torch_cls_zoo.utils.model_table import COLUMNS, table_cells

        report.heading("Size and speed")
        report.text(
            "6 classes, 224 x 224 pixels, one image; 'count' is the published table's own way of "
            "counting. Times are multiples of resnet18's on one thread, in turns."
        )
        report.table(COLUMNS, [table_cells(dict(line)) for line in model_table])
        for line in model_table:
            if line.get("why"):
                report.text(f"* {line['arch']}: {line['why']}.")
    report.heading("How")
    report.table(["what", "value"], [[key, value] for key, value in facts])
    return report.write(folder)[1]


def _gap(gap: Mapping[str, Any]) -> str:
    return f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"


def _bars(
    folder: Path,
    rows: Sequence[Row],
    table: Mapping[str, Any],
    floor: Mapping[str, float] | None,
) -> Path:
    """Mean of each row and the values of its seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row.name for row in rows if "accuracy" in table[row.name]]
    figure = Figure(figsize=(7.5, 0.45 * len(shown) + 1.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, name in enumerate(shown):
        entry = table[name]
        axes.barh(place, entry["accuracy"]["mean"], color="#9ecae1")
        axes.plot(entry["values"], [place] * len(entry["values"]), "o", color="#08519c", ms=4)
    if floor is not None:
        axes.axvline(floor["plain"], color="#a63603", ls="--", lw=1, label="plain features")
        axes.legend(loc="lower right", fontsize=8)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy", xlim=(0, 1))
    axes.grid(axis="x", alpha=0.3)
    path = folder / "rows.png"
    figure.savefig(path)
    return path

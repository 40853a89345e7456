"""The record and page of an experiment: means, paired differences, the published column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_core.metrics.trained_floor import NAME
from shared_core.runs import Report
from shared_core.trials import Trials, compare, spread
from shared_core.trials.page import EXPLAINED, draw_arms, mean_text
from torch_cls_zoo.experiments.rows import NO_DATA, TITLES, Row


def summarize_rows(
    rows: Sequence[Row], trials: Trials, reasons: Mapping[str, str | None]
) -> dict[str, Any]:
    """What was measured, row by row; the first row that ran is what others are compared with.

    Args:
        reasons: why a row was not run, by name.

    Returns:
        By row: ``accuracy`` with mean, std and n, its ``values`` by seed, the paired difference to
        the first row, ``published``, and for a row that was not run the reason.
    """
    found: dict[str, Any] = {}
    first: str | None = None
    for row in rows:
        found[row.name] = entry = {"published": row.published}
        if row.name not in trials.names:
            entry["not_run"] = reasons.get(row.name) or "not run"
            continue
        first = row.name if first is None else first
        whole = spread(trials.values(row.name, "accuracy"))
        entry["values"], entry["accuracy"] = whole.pop("values"), whole
        entry["seeds"] = trials.seeds(row.name)
        for key in ("macro_f1", "val_accuracy", "seconds", "best_epoch", "parameters"):
            entry[key] = spread(trials.values(row.name, key))["mean"]
        if row.name != first and len(trials.seeds(row.name, first)) > 1:
            gap = compare(trials, row.name, first, "accuracy").plain()
            entry["difference"] = {"to": first, **{k: v for k, v in gap.items() if k != "values"}}
    return found


def verdicts(rows: Sequence[Row], table: Mapping[str, Any], floors: Mapping[str, Any]) -> list[str]:
    """Whether the best row is above the floor, and whether distillation helped: whole sentences.

    Args:
        table: of :func:`summarize_rows`.
        floors: see :class:`Page`.
    """
    run = {name: entry for name, entry in table.items() if "accuracy" in entry}
    if not run:
        return []
    name, floor = NAME, floors.get(NAME, {}).get("accuracy")
    if floor is None:
        name, floor = "the best floor without a network", max(floors["plain"], floors["engineered"])
    best = max(run, key=lambda row: run[row]["accuracy"]["mean"])
    found = run[best]["accuracy"]["mean"]
    side = "above" if found > floor else "BELOW" if found < floor else "equal to"
    said = [f"{found:.4f} on test ({best}, the best row), {side} {name} ({floor:.4f})."]
    for row in rows:
        gap = run.get(row.name, {}).get("difference")
        if "--distill" in row.words and gap is not None:
            low, high = gap["low"], gap["high"]
            helped = "helped" if low > 0 else "did not help, it hurt" if high < 0 else ""
            said.append(
                f"Distillation ({row.name}) {helped or 'did not help for sure'}: "
                f"{100 * gap['mean']:+.1f} points (95 % interval {100 * low:+.1f} to "
                f"{100 * high:+.1f}, {gap['n']} seeds)."
            )
    return said


@dataclass(frozen=True)
class Page:
    """What the page tells beside the rows."""

    experiment: str
    headline: str
    rehearsal: bool  # the numbers are no result, which must not be overlooked
    facts: Sequence[tuple[str, Any]]
    floors: Mapping[str, Any]  # see torch_cls_zoo.applications.floor.Floors.facts
    verdicts: Sequence[str] = ()
    models: Sequence[Mapping[str, Any]] = ()  # lines of the table of sizes


def write_page(
    folder: Path, page: Page, rows: Sequence[Row], table: Mapping[str, Any], trials: Trials
) -> Path:
    """Write ``report.md`` and ``report.html``; the page's path.

    Args:
        table: of :func:`summarize_rows`.
    """
    report = Report(TITLES[page.experiment])
    (report.note if page.rehearsal else report.text)(page.headline)
    if page.verdicts:
        report.text(" ".join(page.verdicts))
    report.heading("Test accuracy")
    columns = ["row", "mean ± deviation", "by seed", "difference to the first row (95 %)",
               "published", "best epoch, time"]  # fmt: skip
    report.table(columns, [_line(row, table[row.name]) for row in rows])
    if any(row.published is not None for row in rows):
        report.text(f"The published column: {NO_DATA}.")
    report.text(
        "Without a network (logistic regression on image features): "
        f"{page.floors['plain']:.4f} with plain features, {page.floors['engineered']:.4f} with "
        f"engineered ones. {EXPLAINED}"
    )
    if (one := page.floors.get(NAME)) is not None:
        report.text(
            f"With {NAME} ({one['network']} at {one['input_size']} px): {one['accuracy']:.4f} "
            f"[{one['low']:.4f}, {one['high']:.4f}]."
        )
    try:
        picture = draw_arms(folder / "rows.png", trials, "accuracy", label="test accuracy",
                            floor=page.floors["plain"])  # fmt: skip
        report.figure(picture, "Mean and values of the seeds.")
    except ImportError:  # without matplotlib the table says it all
        pass
    if page.models:
        from torch_cls_zoo.experiments.model_table import add_table

        report.heading("Size and speed")
        add_table(report, page.models)
    report.heading("How")
    report.table(["what", "value"], [[key, value] for key, value in page.facts])
    return report.write(folder)[1]


def _line(row: Row, entry: Mapping[str, Any]) -> list[Any]:
    published = None if row.published is None else f"{row.published:.4f}"
    if "accuracy" not in entry:
        return [row.name, None, None, None, published, entry["not_run"]]
    gap = entry.get("difference")
    shown = "–"
    if gap is not None:
        shown = f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
    values = ", ".join(f"{value:.4f}" for value in entry["values"])
    note = f"epoch {entry['best_epoch']:.0f}, {entry['seconds']:.0f} s"
    return [row.name, mean_text(entry["accuracy"]), values, shown, published, note]

"""What a run and an analysis say on a terminal, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gfnet_dynn.models.exit_policy import NEVER
from gfnet_dynn.run import Run
from shared_core.metrics.trained_floor import NAME

WHY_BELOW = (
    "A rehearsal's networks learn from nothing for a minute; --scale short starts from a trained "
    "network and stays with it for longer."
)
NOT_REPRODUCED = "rehearsal on built-in data: this is not a reproduction of any published number"


def headline(run: Run) -> str:
    """The line that says what was run on what; a run's first and last."""
    facts, source = run.data.facts(), run.settings.source
    what = (
        f"gfnet_dynn, scale {run.settings.scale}: {facts['name']} ({facts['kind']}), "
        f"{facts['images']} images, {len(run.data.classes)} classes, {facts['pixels']} px, "
        f"split {run.data.manifest.hash[:12]}"
    )
    if not run.data.rehearsal:
        return what
    wanted = f"; {source.data_set} was not used" if source.known else ""
    return f"REHEARSAL - {what}{wanted}. {NOT_REPRODUCED[0].upper()}{NOT_REPRODUCED[1:]}."


def with_verdicts(line: str, found: Sequence[str]) -> str:
    """A headline and the sentences of :func:`verdicts` behind it."""
    return " ".join([f"{line.rstrip('.')}.", *found]) if found else line


def verdicts(measured: dict[str, Any], *, rehearsal: bool = False) -> list[str]:
    """Whether the student is above the floors, and whether distillation helped: whole sentences.

    Args:
        rehearsal: whether the images are built in and the recipe a minute's; then why it is below.
    """
    name = "student" if "student" in measured else "backbone"
    found = measured[name]["accuracy"] if name in measured else None
    floors = {
        f"{kind} features, linear": value for kind, value in measured.get("floor", {}).items()
    }
    if "trained_floor" in measured:
        floors[NAME] = measured["trained_floor"]["accuracy"]
    said = []
    if found is not None and floors:
        sides = [
            f"{'above' if found > floor else 'BELOW' if found < floor else 'equal to'} the floor "
            f"({of}) of {floor:.4f}"
            for of, floor in floors.items()
        ]
        said.append(f"The {name}'s test accuracy {found:.4f} is {', '.join(sides)}.")
        if rehearsal and found < max(floors.values()):
            said.append(WHY_BELOW)
    if gap := measured.get("distillation"):
        helped = "did not help for sure"
        if gap["low"] > 0:
            helped = "helped"
        elif gap["high"] < 0:
            helped = "did not help, it hurt"
        said.append(
            f"Distillation {helped}: {100 * gap['difference']:+.1f} points against the same "
            f"student from labels (95 % interval {100 * gap['low']:+.1f} to "
            f"{100 * gap['high']:+.1f} over {gap['images']} test images, one seed)."
        )
    return said


def result_lines(measured: dict[str, Any]) -> list[str]:
    """The numbers of a run's report."""
    exits = measured["exits"]
    lines = [
        f"{name}: test accuracy {measured[name]['accuracy']:.4f}, "
        f"{measured[name]['macs'] / 1e6:.1f} M MACs, " + _times(measured[name]["ms_per_image"])
        for name in ("backbone", "student", "labels")
        if name in measured
    ]
    timed = exits["ms_per_image_at_exits"]
    lines.append(
        f"with exits, nobody leaves: {exits['final_accuracy']:.4f}, "
        + _times({label: times[-1] for label, times in timed.items()})
    )
    for name, point in exits["points"].items():
        lines.append(
            f"with exits, {name}: {point['accuracy']:.4f} at "
            f"{cost_text(point['macs_fraction'])} of the MACs, " + _times(point["ms_per_image"])
        )
    for index, row in enumerate(exits["points"]["balanced"]["exits"]):
        here = "nobody" if row["accuracy"] is None else f"{row['accuracy']:.4f} right of them"
        lines.append(
            f"balanced, {'final head' if row['block'] is None else 'exit ' + str(row['block'])}: "
            f"{cost_text(row['rate'])} leave, {here}, {row['accuracy_all']:.4f} right of all, "
            f"ECE {row['ece']:.4f}, {row['macs'] / 1e6:.1f} M MACs, "
            + _times({label: times[index] for label, times in timed.items()})
        )
    return lines + finding_lines(exits)


def _times(row: dict[str, float]) -> str:
    return ", ".join(f"{value:.2f} ms an image ({label})" for label, value in row.items())


def threshold_text(value: float) -> str:
    """A threshold with four digits, ``never`` where nobody leaves."""
    return "never" if value >= NEVER else f"{value:.4g}"


def cost_text(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def summary_lines(result: dict[str, Any], *, confidence: float) -> list[str]:
    """The findings in a few lines."""
    kind = result["kind"]
    lines = [
        f"{result['samples']['calibration']} calibration and {result['samples']['test']} test "
        f"samples; final head {result['final_accuracy']:.4f} on test"
    ]
    for name, rows in result["wishes"].items():
        row = rows["balanced"]
        lines.append(
            f"{name}{', used' if name == kind else ''}: balanced threshold "
            f"{threshold_text(row['threshold'])}: {row['test']['accuracy']:.4f} at "
            f"{cost_text(row['test']['cost_fraction'])}"
        )
    lines += budget_lines(result["budgets"], kind) + conformal_lines(result["conformal"])
    for row in result["risk"]:
        if row["kind"] == kind:
            lines.append(f"risk {row['level']:g} at confidence {confidence:g}: " + _risk(row))
    for row in unlimited(result["placement"]):
        if row["blocks"] is not None:
            lines.append(
                f"exits worth keeping at {cost_text(row['budget'])}: {blocks_text(row)}: "
                f"{row['test']['accuracy']:.4f} at {cost_text(row['test']['cost_fraction'])}"
            )
    return lines


def _budget(row: dict[str, Any]) -> str:
    if row["threshold"] is None:
        return "not even leaving at the first exit is that cheap"
    return (
        f"threshold {threshold_text(row['threshold'])}: {row['test']['accuracy']:.4f} at "
        f"{cost_text(row['test']['cost_fraction'])}"
    )


def _risk(row: dict[str, Any]) -> str:
    if row["num_accepted"] < 2:
        return f"no early exit can be promised from {row['num_samples']} samples"
    return (
        f"threshold {threshold_text(row['threshold'])}: test risk {row['test_risk']:.4f} at "
        f"{cost_text(row['test']['cost_fraction'])}"
    )


def blocks_text(row: dict[str, Any]) -> str:
    return (
        "final head only" if not row["blocks"] else "blocks " + ", ".join(map(str, row["blocks"]))
    )


def unlimited(rows: list[dict] | None) -> list[dict]:
    """The rows whose number of exits is not limited."""
    most = max((row["max_exits"] for row in rows or []), default=0)
    return [row for row in rows or [] if row["max_exits"] == most]


def budget_lines(rows: list[dict[str, Any]], kind: str) -> list[str]:
    """What the rule ``kind`` reaches at each mean cost that is allowed."""
    return [
        f"budget {cost_text(row['budget'])}, {kind}: " + _budget(row)
        for row in rows
        if row["kind"] == kind
    ]


def conformal_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Size and coverage of the sets of every family."""
    return [
        f"conformal, alpha {row['alpha']:g}, {row['family']}: "
        f"{row['mean_set_size']:.2f} classes, coverage {row['coverage']:.4f}"
        for row in rows
    ]


def finding_lines(exits: dict[str, Any]) -> list[str]:
    """Budgets, sets and risk as a run's record holds them under ``exits``."""
    kind = exits["policy"]
    lines = budget_lines(exits["budgets"], kind) + conformal_lines(exits["conformal"])
    for row in exits["risk"]:
        lines.append(f"risk {row['level']:g}: " + _risk(row))
    return lines

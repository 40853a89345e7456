"""The findings of an analysis in lines for a terminal."""

from __future__ import annotations

from typing import Any


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
            f"{row['threshold']:.4g}: {row['test']['accuracy']:.4f} at "
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
        f"threshold {row['threshold']:.4g}: {row['test']['accuracy']:.4f} at "
        f"{cost_text(row['test']['cost_fraction'])}"
    )


def _risk(row: dict[str, Any]) -> str:
    if row["num_accepted"] < 2:
        return f"no early exit can be promised from {row['num_samples']} samples"
    return (
        f"threshold {row['threshold']:.4g}: test risk {row['test_risk']:.4f} at "
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

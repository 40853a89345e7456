"""The analysis of a finished run: read its outputs, ask what they say, write the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfnet_dynn.choices import RULES
from gfnet_dynn.decide.exit_outputs import ExitLogits
from gfnet_dynn.decide.findings import analyse_outputs
from gfnet_dynn.decide.placement import exit_overheads
from gfnet_dynn.model_files import EXITS, load_model
from gfnet_dynn.report import analysis_plots as plots
from gfnet_dynn.report.lines import blocks_text, summary_lines, threshold_text
from shared_core.runs import Report
from shared_core.runs.json_files import write_json

FOLDER = "analysis"


def analyse_run(
    run: Path,
    *,
    kind: str | None,
    max_accuracy_loss: float,
    confidence: float,
    alphas: Sequence[float],
    budgets: Sequence[float],
) -> int:
    """All of ``analyse.py``: see its options. Returns the exit code.

    Args:
        kind: the rule of the parts that look at one only; None takes the run's own.
    """
    calibration, test = load_outputs(run)
    overheads, no_placement = overheads_of(run, calibration)
    settings = {
        "max_accuracy_loss": max_accuracy_loss,
        "confidence": confidence,
        "alphas": list(alphas),
        "budgets": list(budgets),
        "no_placement": no_placement,
    }
    result, curves = analyse_outputs(
        calibration,
        test,
        kind=kind or run_rule(run),
        max_accuracy_loss=max_accuracy_loss,
        confidence=confidence,
        alphas=alphas,
        shares=budgets,
        overheads=overheads,
    )
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    write_json(folder / "analysis.json", {"settings": settings, **result})
    write_analysis(folder, run, result, curves, settings)
    for line in summary_lines(result, confidence=confidence):
        print(line)
    if no_placement:
        print(f"exits worth keeping: left out, {no_placement}")
    print(f"report: {folder / 'analysis.html'}")
    return 0


def load_outputs(folder: Path) -> tuple[ExitLogits, ExitLogits]:
    """The calibration and test outputs of a run.

    Raises:
        FileNotFoundError: no such run, or one that was not evaluated.
        ValueError: a broken file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, expected a finished run")
    paths = [folder / f"outputs-{split}.npz" for split in ("calibration", "test")]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {path.name}: expected a run whose evaluate stage is done"
            )
    return ExitLogits.load(paths[0]), ExitLogits.load(paths[1])


def run_rule(folder: Path) -> str:
    """The rule that the run was evaluated with; ``max_prob`` where nothing says it."""
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        kind = record["measured"]["exits"]["policy"]
    except (OSError, ValueError, KeyError, TypeError):
        return "max_prob"
    return kind if kind in RULES else "max_prob"


def overheads_of(folder: Path, outputs: ExitLogits) -> tuple[NDArray | None, str]:
    """MACs of each exit from the sizes in the run's model file; None with the reason."""
    files = sorted((folder / "checkpoint" / "best").glob("*.pth"))
    for path in files:
        model, _ = load_model(path, architecture=EXITS)
        if model.exits == outputs.exits and np.allclose(model.exit_costs(), outputs.costs):
            return exit_overheads(model), ""
    reason = "holds no model" if not files else "holds no model with these exits"
    return None, f"{folder / 'checkpoint' / 'best'} {reason}"


def write_analysis(
    folder: Path,
    run: Path,
    result: dict[str, Any],
    curves: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Both forms of the page into ``folder``."""
    report = Report(f"What the exits of {run.resolve().name} can do")
    report.text(
        f"From stored outputs on {result['samples']['calibration']} calibration and "
        f"{result['samples']['test']} test samples, {result['num_classes']} classes, split "
        f"{result['split_hash'][:12]}. Whatever is chosen is chosen on the calibration split; "
        "accuracies and costs are those of the test split. Costs are shares of the MACs of a run "
        "past all exits to the final head."
    )
    _rules(report, result, settings)
    report.figure(plots.rules(folder, result, curves), "Every rule over all its thresholds.")
    _thresholds(report, result)
    _budgets(report, result)
    report.figure(
        plots.budget_curves(folder, result),
        "One threshold for a given mean cost, the budgeted batch of MSDNet, and the best exits.",
    )
    _placement(report, result, settings)
    _conformal(report, result)
    report.figure(plots.conformal_sets(folder, result), "Coverage and size of the sets.")
    _risk(report, result, settings)
    report.figure(
        plots.risk_control(folder, result, confidence=settings["confidence"]),
        "What was lost, what was allowed, and what it saves.",
    )
    for path in report.write(folder):
        path.replace(path.with_stem("analysis"))


def _test(row: dict[str, Any]) -> list[object]:
    return [row["test"]["accuracy"], row["test"]["cost_fraction"]]


def _rules(report: Report, result: dict[str, Any], settings: dict[str, Any]) -> None:
    report.heading("The rules")
    report.table(
        ["exit", "accuracy, calibration", "accuracy, test", "cost", "temperature"],
        [
            [
                "final" if row["block"] is None else f"block {row['block']}",
                row["calibration_accuracy"],
                row["test_accuracy"],
                row["cost_fraction"],
                row["temperature"],
            ]
            for row in result["exits"]
        ],
    )
    report.table(
        ["rule", "wish", "threshold", "accuracy", "cost"],
        [
            [name, wish, threshold_text(row["threshold"]), *_test(row)]
            for name, rows in result["wishes"].items()
            for wish, row in rows.items()
        ],
    )
    report.text(
        "careful loses nothing on calibration data against the final head, balanced at most "
        f"{settings['max_accuracy_loss']:g}, fast spends half the MACs."
    )


def _thresholds(report: Report, result: dict[str, Any]) -> None:
    kind = result["kind"]
    report.heading(f"Thresholds of {kind}")
    report.table(
        ["threshold", "accuracy, calibration", "accuracy, test", "cost", "leave at each exit"],
        [
            [
                row["threshold"],
                row["calibration_accuracy"],
                row["accuracy"],
                row["cost"] / result["full_cost"],
                " ".join(f"{rate:.2f}" for rate in row["rates"]),
            ]
            for row in result["sweeps"][kind]
        ],
    )
    report.text("The other rules are in analysis.json.")


def _budgets(report: Report, result: dict[str, Any]) -> None:
    report.heading("Budgets")
    report.table(
        ["mean cost allowed", "rule", "threshold", "accuracy", "cost"],
        [
            [row["budget"], row["kind"]]
            + (
                [None, None, None]
                if row["threshold"] is None
                else [threshold_text(row["threshold"]), *_test(row)]
            )
            for row in result["budgets"]
        ],
    )


def _placement(report: Report, result: dict[str, Any], settings: dict[str, Any]) -> None:
    if not result["placement"]:
        report.text(f"Exits worth keeping: left out, {settings['no_placement']}.")
        return
    report.table(
        ["mean cost allowed", "exits at most", "exits kept", "accuracy", "cost"],
        [
            [row["budget"], row["max_exits"]]
            + ([None, None, None] if row["blocks"] is None else [blocks_text(row), *_test(row)])
            for row in result["placement"]
        ],
    )
    report.text("Fewer exits cost less on the way to the later ones; none was trained anew.")


def _conformal(report: Report, result: dict[str, Any]) -> None:
    report.heading("Conformal sets")
    report.table(
        ["alpha", "family", "mean set size", "coverage"],
        [
            [row["alpha"], row["family"], row["mean_set_size"], row["coverage"]]
            for row in result["conformal"]
        ],
    )
    report.text(
        f"Rule {result['kind']} with its balanced threshold. Temperatures and threshold come from "
        "one half of the calibration split, quantiles from the other. Coverage on a test split of "
        "this size scatters around its promise."
    )


def _risk(report: Report, result: dict[str, Any], settings: dict[str, Any]) -> None:
    report.heading("Risk control")
    report.table(
        ["level", "rule", "threshold", "risk, calibration", "risk, test", "accuracy", "cost"],
        [
            [
                row["level"],
                row["kind"],
                row["threshold"] if row["num_accepted"] > 1 else None,
                row["calibration_risk"],
                row["test_risk"],
                *_test(row),
            ]
            for row in result["risk"]
        ],
    )
    least = ", ".join(f"{n} for {level}" for level, n in result["risk_samples_needed"].items())
    report.text(
        "Risk: the share of samples that the full network has right and the exit wrong. The level "
        f"is kept with probability {settings['confidence']:g} over the draw of the calibration "
        f"split. Even if nothing goes wrong that takes so many samples: {least}. Scores here have "
        "no temperatures. A dash: no early exit can be promised."
    )

"""Analyse a finished run from its stored outputs; ``--help`` lists the options."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch; see main.py
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfnet_dynn import analysis_plots as plots
from gfnet_dynn.analysis import analyse_outputs
from gfnet_dynn.analysis_lines import blocks_text, summary_lines
from gfnet_dynn.evaluation import ALPHAS, BUDGETS, CONFIDENCE
from gfnet_dynn.exit_evaluation import ExitLogits
from gfnet_dynn.model_files import EXITS, load_model
from gfnet_dynn.models.custom_modules.exit_policy import KINDS
from gfnet_dynn.placement import exit_overheads
from shared_core.checkpoints import atomic_write
from shared_core.runs import Report, run_command

FOLDER = "analysis"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="analyse.py",
        description="What the exits of a finished run can do: thresholds for every rule, budgets, "
        "conformal sets, risk control, exits worth keeping. No network is run.",
        epilog="Writes analysis.json, analysis.md, analysis.html and plots to RUN_FOLDER/analysis.",
    )
    p.add_argument("run", type=Path, metavar="RUN_FOLDER", help="a run with its evaluate stage")
    p.add_argument(
        "--max-accuracy-loss",
        type=_fraction,
        default=0.01,
        metavar="X",
        help="what balanced thresholds may lose, and the risk that may be taken (default 0.01)",
    )
    p.add_argument(
        "--confidence",
        type=_fraction,
        default=CONFIDENCE,
        metavar="P",
        help="how sure the risk control has to be (default 0.9)",
    )
    p.add_argument(
        "--alpha",
        type=_fraction,
        nargs="+",
        default=ALPHAS,
        metavar="A",
        help="share of conformal sets that may miss the class (default 0.01 0.05 0.1)",
    )
    p.add_argument(
        "--budgets",
        type=_share,
        nargs="+",
        default=BUDGETS,
        metavar="B",
        help="mean costs, shares of a full run's MACs (default 0.4 0.5 0.6 0.7 0.8 0.9)",
    )
    p.add_argument(
        "--policy",
        choices=KINDS,
        help="the rule of conformal sets and placement (default: the run's own)",
    )
    return p


def _fraction(text: str) -> float:
    return _number(text, closed=False)


def _share(text: str) -> float:
    return _number(text, closed=True)


def _number(text: str, *, closed: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 < value < 1 or (closed and value == 1)):
        end = "]" if closed else ")"
        raise argparse.ArgumentTypeError(f"{text!r}: expected a fraction in (0, 1{end}")
    return value


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


def run_policy(folder: Path) -> str:
    """The rule that the run was evaluated with; ``max_prob`` where nothing says it."""
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        kind = record["measured"]["exits"]["policy"]
    except (OSError, ValueError, KeyError, TypeError):
        return "max_prob"
    return kind if kind in KINDS else "max_prob"


def overheads_of(folder: Path, outputs: ExitLogits) -> tuple[NDArray | None, str]:
    """MACs of each exit from the sizes in the run's model file; None with the reason."""
    files = sorted((folder / "checkpoint" / "best").glob("*.pth"))
    for path in files:
        model, _ = load_model(path, architecture=EXITS)
        if model.exits == outputs.exits and np.allclose(model.exit_costs(), outputs.costs):
            return exit_overheads(model), ""
    reason = "holds no model" if not files else "holds no model with these exits"
    return None, f"{folder / 'checkpoint' / 'best'} {reason}"


def write_report(
    folder: Path,
    run: Path,
    result: dict[str, Any],
    curves: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """``analysis.md`` and ``analysis.html`` with the plots."""
    kind = result["kind"]
    report = Report(f"What the exits of {run.resolve().name} can do")
    report.text(
        f"From stored outputs on {result['samples']['calibration']} calibration and "
        f"{result['samples']['test']} test samples, {result['num_classes']} classes, split "
        f"{result['split_hash'][:12]}. Whatever is chosen is chosen on the calibration split; "
        "accuracies and costs are those of the test split. Costs are shares of the MACs of a run "
        "past all exits to the final head."
    )
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
            [name, wish, row["threshold"], row["test"]["accuracy"], row["test"]["cost_fraction"]]
            for name, rows in result["wishes"].items()
            for wish, row in rows.items()
        ],
    )
    report.text(
        "careful loses nothing on calibration data against the final head, balanced at most "
        f"{settings['max_accuracy_loss']:g}, fast spends half the MACs."
    )
    report.figure(plots.rules(folder, result, curves), "Every rule over all its thresholds.")
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
    report.heading("Budgets")
    report.table(
        ["mean cost allowed", "rule", "threshold", "accuracy", "cost"],
        [
            [row["budget"], row["kind"], row["threshold"]]
            + (
                [row["test"]["accuracy"], row["test"]["cost_fraction"]]
                if row["threshold"] is not None
                else [None, None]
            )
            for row in result["budgets"]
        ],
    )
    report.figure(
        plots.budget_curves(folder, result),
        "One threshold for a given mean cost, the budgeted batch of MSDNet, and the best exits.",
    )
    if result["placement"]:
        report.table(
            ["mean cost allowed", "exits at most", "exits kept", "accuracy", "cost"],
            [
                [row["budget"], row["max_exits"]]
                + (
                    [None, None, None]
                    if row["blocks"] is None
                    else [blocks_text(row), row["test"]["accuracy"], row["test"]["cost_fraction"]]
                )
                for row in result["placement"]
            ],
        )
        report.text("Fewer exits cost less on the way to the later ones; none was trained anew.")
    else:
        report.text(f"Exits worth keeping: left out, {settings['no_placement']}.")
    report.heading("Conformal sets")
    report.table(
        ["alpha", "family", "mean set size", "coverage"],
        [
            [row["alpha"], row["family"], row["mean_set_size"], row["coverage"]]
            for row in result["conformal"]
        ],
    )
    report.text(
        f"Rule {kind} with its balanced threshold. Temperatures and threshold come from one half "
        "of the calibration split, quantiles from the other. Coverage on a test split of this size "
        "scatters around its promise."
    )
    report.figure(plots.conformal_sets(folder, result), "Coverage and size of the sets.")
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
                row["test"]["accuracy"],
                row["test"]["cost_fraction"],
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
    report.figure(
        plots.risk_control(folder, result, confidence=settings["confidence"]),
        "What was lost, what was allowed, and what it saves.",
    )
    for path in report.write(folder):
        path.replace(path.with_stem("analysis"))


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse, print, write. Returns the exit code."""
    args = build_parser().parse_args(argv)
    calibration, test = load_outputs(args.run)
    overheads, no_placement = overheads_of(args.run, calibration)
    settings = {
        "max_accuracy_loss": args.max_accuracy_loss,
        "confidence": args.confidence,
        "alphas": sorted(set(args.alpha)),
        "budgets": sorted(set(args.budgets)),
        "no_placement": no_placement,
    }
    result, curves = analyse_outputs(
        calibration,
        test,
        kind=args.policy or run_policy(args.run),
        max_accuracy_loss=args.max_accuracy_loss,
        confidence=args.confidence,
        alphas=settings["alphas"],
        shares=settings["budgets"],
        overheads=overheads,
    )
    folder = args.run / FOLDER
    folder.mkdir(exist_ok=True)
    text = json.dumps({"settings": settings, **result}, indent=2, allow_nan=False) + "\n"
    atomic_write(folder / "analysis.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_report(folder, args.run, result, curves, settings)
    for line in summary_lines(result, confidence=args.confidence):
        print(line)
    if no_placement:
        print(f"exits worth keeping: left out, {no_placement}")
    print(f"report: {folder / 'analysis.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""One page from one run or several: curves, comparison, accuracy against size and time, bits."""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpkd.analysis import plots
from mpkd.analysis.verdicts import verdicts
from mpkd.trainer.metrics_logger import read_metrics_csv
from shared_core.runs import Report, run_command
from shared_core.runs.options import CommandParser

REHEARSAL = "Built-in data: a rehearsal, not a reproduction of any published number."


@dataclass(frozen=True)
class Findings:
    """What a run folder holds.

    Attributes:
        name: of the folder.
        stages: result by finished stage.
        rows: the CSV's lines.
        config: values by dotted key.
        rehearsal: whether the images were built in.
    """

    name: str
    stages: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    rehearsal: bool


def read_run(folder: str | Path) -> Findings:
    """Read a run, finished or not.

    Raises:
        FileNotFoundError: no run there.
    """
    folder = Path(folder)
    files = [folder / "config.json", folder / "stages.json"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: no run of mpkd, expected {file.name} in it")
    config, stages = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    rows = [
        row for path in sorted((folder / "logs").glob("*.csv")) for row in read_metrics_csv(path)
    ]
    kind = stages.get("prepare", {}).get("kind", "")
    return Findings(folder.name, stages, rows, config, kind == "built-in")


def distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """Names of folders, with as many of their parents as it takes to tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(own[-count:]).replace("/", "") for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{own[-1]}-{number}" for number, own in enumerate(parts)]  # one folder twice


def networks(found: Findings) -> list[dict[str, Any]]:
    """Teacher, student, quantized student and shipped files: name, accuracy, bytes, bits."""
    rows = []
    for stage, name in (("teacher", "teacher"), ("distil", "student")):
        one = found.stages.get(stage, {})
        if "test_accuracy" in one:
            rows.append(
                {
                    "name": f"{name} ({one['name']})", "accuracy": one["test_accuracy"],
                    "agreement": one.get("agreement"), "bytes": 4 * one["parameters"],
                    "bits": 32.0, "w_bits": {},
                }
            )  # fmt: skip
    one = found.stages.get("quantize", {})
    if "mean_bits" in one and "test_accuracy" in one:
        rows.append(
            {
                "name": f"student, {one['method']}", "accuracy": one["test_accuracy"],
                "agreement": one.get("agreement"), "bytes": one["bytes"],
                "bits": one["mean_bits"], "w_bits": one["w_bits"],
            }
        )  # fmt: skip
    files = found.stages.get("export", {}).get("measured", {}).get("files", {})
    for runtime, file in files.items():
        if file["accuracy"] is not None:
            rows.append(
                {
                    "name": f"shipped for {runtime}", "accuracy": file["accuracy"]["value"],
                    "agreement": file["agreement"]["same_class"],
                    "bytes": sum(file["bytes"].values()), "bits": None, "w_bits": {},
                }
            )  # fmt: skip
    return rows


def write_report(folders: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Write figures, ``report.md`` and ``report.html`` into ``output``.

    Raises:
        FileNotFoundError: a folder holds no run.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    runs = [
        replace(read_run(folder), name=name)
        for folder, name in zip(folders, distinct_names(folders), strict=True)
    ]
    report = Report("mpkd: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"))
    rehearsal = any(run.rehearsal for run in runs)
    first = [REHEARSAL] if rehearsal else []
    for run in runs:
        said = verdicts(run.stages)
        first += [*([f"{run.name}:"] if said and len(runs) > 1 else []), *said]
    if first:
        (report.note if rehearsal else report.text)(" ".join(first))
    report.heading("Networks")
    table, points, bits = [], [], {}
    for run in runs:
        for row in networks(run):
            name = row["name"] if len(runs) == 1 else f"{run.name}: {row['name']}"
            table.append(
                [name, row["accuracy"], row["agreement"], row["bytes"] / 1024, row["bits"]]
            )
            points.append((name, row["bytes"] / 1024, row["accuracy"]))
            if row["w_bits"]:
                bits[name] = row["w_bits"]
    if table:
        report.table(["network", "test accuracy", "agreement", "KiB", "bits a weight"], table)
        report.text(
            "Agreement: share of test images that get the class of the teacher (student), of the "
            "network before its bits (quantized), of the network in torch (shipped). Quantized "
            "and shipped bytes are counted on disk."
        )
        figure = plots.pareto(output / "accuracy_size.png", points, xlabel="KiB of weights")
        report.figure(figure, "Accuracy against size; the line is what nothing smaller beats.")
    if bits:
        report.figure(plots.bit_bars(output / "bits.png", bits), "Bits of each layer.")
    _differences(report, runs)
    report.heading("Training")
    for run in runs:
        if not run.rows:
            report.text(f"{run.name}: no epoch is finished yet.")
            continue
        figure = plots.curves(output / f"curves_{run.name}.png", run.rows, title=run.name)
        report.figure(figure, f"{run.name}: curves by epoch.")
        last = [list(group)[-1] for group in _by_stage(run.rows).values()]
        report.table(
            ["stage", "epochs", "lr", "training loss", "validation accuracy", "loss scale",
             "skipped steps", "seconds"],
            [[r["stage"], r["epoch"], r["lr"], r["train_loss"], r["val_acc"], r["loss_scale"],
              r["skipped_steps"], r["seconds"]] for r in last],
        )  # fmt: skip
    return list(report.write(output))


def _by_stage(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["stage"], []).append(row)
    return groups


def _differences(report: Report, runs: Sequence[Findings]) -> None:
    """The settings in which the runs differ."""
    if len(runs) < 2:
        return
    keys = sorted(set().union(*(run.config for run in runs)))
    odd = [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]
    if odd:
        report.heading("Settings that differ")
        report.table(
            ["key", *(run.name for run in runs)],
            [[key, *(str(run.config.get(key)) for run in runs)] for key in odd],
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare run folders. Returns the exit code."""
    p = CommandParser(prog="analysis.py", description=__doc__)
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="The folders of the runs to compare."
    )
    p.add_argument(
        "--output", type=Path, metavar="DIR",
        help="The folder of the page. Without it outputs/ in the first run's folder.",
    )  # fmt: skip
    args = p.parse_args(argv)
    for page in write_report(args.runs, args.output or args.runs[0] / "outputs"):
        print(page)
    return 0


def cli() -> int:
    """The installed command ``mpkd-analysis``."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())

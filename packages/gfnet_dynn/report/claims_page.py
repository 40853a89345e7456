"""What the trials say of each claim: means, deviations, paired differences, a plot, a page."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gfnet_dynn.judge.claims import FinishedRun, Trying, cell_name, cells_of, settings_of
from gfnet_dynn.report.run_plots import COLOURS, save_figure
from shared_core.metrics import paired_difference
from shared_core.runs import Report, write_result
from shared_core.trials import column, run_trials, spread
from shared_core.trials.page import mean_text

BUDGET = "0.7"  # share of the plain student's MACs at which sets of exits are compared


def try_claims(args: argparse.Namespace, words: Sequence[str]) -> int:
    """All of ``claims.py``: see its options. Returns the exit code."""
    started, clock = datetime.now(timezone.utc), time.monotonic()
    run = FinishedRun.read(args.run)
    settings = settings_of(args.what, args.tradeoffs, run.config)
    cells = cells_of(settings, run, seeds=args.seeds, vary=args.vary)
    threads = args.threads or run.config["threads"] or torch.get_num_threads()
    torch.set_num_threads(threads)
    device = args.device or run.config["device"]
    trying = Trying(run, args.output, cells, args.data_path, threads, device)
    trials = run_trials(cells, trying, folder=args.output, shard=args.shard, merge=args.merge)
    if trials.missing:
        print(trials.missing_text)
        return 0
    rows = {one.name: trials.rows(cell_name(one, run.config), args.seeds) for one in settings}
    measured = summarise_claims(rows)
    own = args.vary == "student" or all(one.stage == "distil" for one in settings)
    measured["varied_by_seed"] = (
        "student and exits; the backbone is one" if own else "exits; backbone and student are one"
    )
    measured["run"] = run.student
    record = write_result(
        args.output / "result.json",
        task=f"gfnet_dynn/{str(run.config['data_set']).lower()}-claims",
        command=shlex.join(["packages/gfnet_dynn/claims.py", *words]),
        scale=run.config["scale"],
        data=next(iter(rows.values()))[0]["data"],
        seeds=args.seeds,
        measured=measured,
        started=started,
        wall_seconds=max(time.monotonic() - clock, trials.seconds),
    )
    write_claims_page(args.output, record)
    for claim in measured["claims"].values():
        print(claim["text"])
    print(f"report: {args.output / 'report.html'}")
    return 0


def gap(a: list[float], b: list[float]) -> dict[str, Any] | None:
    """The paired difference ``a - b`` with its 95 % interval; None of a single seed."""
    return asdict(paired_difference(a, b)) if len(a) > 1 else None


def summarise_claims(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All numbers of the trials by setting, and by claim what they say.

    Args:
        rows: by setting, one row a seed, in the same order of seeds.
    """
    settings = {name: _setting(found) for name, found in rows.items()}
    claims: dict[str, Any] = {}
    tradeoffs = sorted(
        (name for name in rows if name.startswith("lambda-")), key=lambda name: float(name[7:])
    )
    if len(tradeoffs) > 1:
        claims["accuracy falls as lambda grows"] = _monotone(rows, tradeoffs)
    compared = [*rows.get("few-exits", ()), *rows.get("all-exits", ())]
    # The budget may not even pay for the first of a few late exits.
    if {"few-exits", "all-exits"} <= rows.keys() and all(BUDGET in r["budgets"] for r in compared):
        claims["few exits beat all exits"] = _few(rows)
    speed = next((name for name in ("few-exits", "lambda-0.75") if name in rows), None)
    if speed:
        claims["early exit is faster"] = _speed(rows[speed], speed)
    if {"distilled", "from-scratch"} <= rows.keys():
        claims["distilled beats from scratch"] = _distilled(rows)
    return {"settings": settings, "claims": claims}


def _setting(found: list[dict[str, Any]]) -> dict[str, Any]:
    """All numbers of one setting."""
    if "student" in found[0]:
        return {"accuracy": spread(column(found, ("student", "accuracy")))}
    return {
        "exits": found[0]["exits"],
        "policy": found[0]["policy"],
        "final_accuracy": spread(column(found, "final_accuracy")),
        "fixed": _point(found, "fixed"),
        "points": {
            point: {
                **_point(found, "points", point),
                "speed_up": {
                    batch: spread(column(found, ("points", point, "speed_up", batch)))
                    for batch in found[0]["points"][point]["speed_up"]
                },
            }
            for point in found[0]["points"]
        },
        "budgets": {
            share: _point(found, "budgets", share)
            for share in found[0]["budgets"]
            if all(share in row["budgets"] for row in found)
        },
    }


def _point(rows: list[dict[str, Any]], *keys: str) -> dict[str, Any]:
    return {name: spread(column(rows, (*keys, name))) for name in ("accuracy", "macs_fraction")}


def _monotone(rows: dict[str, list[dict[str, Any]]], names: list[str]) -> dict[str, Any]:
    accuracy = [column(rows[name], ("fixed", "accuracy")) for name in names]
    cost = [column(rows[name], ("fixed", "macs_fraction")) for name in names]
    means = [float(np.mean(values)) for values in accuracy]
    falls = all(later < earlier for earlier, later in zip(means, means[1:], strict=False))
    steps = ", ".join(
        f"{name[7:]}: {mean:.4f} at {100 * np.mean(share):.1f} %"
        for name, mean, share in zip(names, means, cost, strict=True)
    )
    return {
        "holds_in_the_mean": falls,
        "holds_for_every_seed": bool((np.diff(np.array(accuracy), axis=0) < 0).all()),
        "last_against_first": gap(accuracy[-1], accuracy[0]),
        "text": f"accuracy by lambda, threshold 0.5, share of the plain student's MACs: {steps}; "
        f"{'falls' if falls else 'does not fall'} at every step",
    }


def _few(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    few, every = rows["few-exits"], rows["all-exits"]
    a, b = (
        column(few, ("budgets", BUDGET, "accuracy")),
        column(every, ("budgets", BUDGET, "accuracy")),
    )
    return {
        "at_macs_fraction": float(BUDGET),
        "holds_in_the_mean": float(np.mean(a)) > float(np.mean(b)),
        "few_minus_all": gap(a, b),
        "few_minus_all_at_threshold_0.5": gap(
            column(few, ("fixed", "accuracy")), column(every, ("fixed", "accuracy"))
        ),
        "text": f"at {100 * float(BUDGET):.0f} % of the plain student's MACs: few exits "
        f"{np.mean(a):.4f}, all exits {np.mean(b):.4f}",
    }


def _speed(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    macs = [1 / value for value in column(rows, ("points", "balanced", "macs_fraction"))]
    times = {
        batch: spread(column(rows, ("points", "balanced", "speed_up", batch)))
        for batch in rows[0]["points"]["balanced"]["speed_up"]
    }
    lost = gap(column(rows, ("points", "balanced", "accuracy")), column(rows, "final_accuracy"))
    said = ", ".join(f"{values['mean']:.2f}x ({batch})" for batch, values in times.items())
    return {
        "setting": name,
        "macs": spread(macs),
        "time": times,
        "accuracy_against_final_head": lost,
        "text": f"balanced thresholds of {name}: {np.mean(macs):.2f}x fewer MACs, time {said}",
    }


def _distilled(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    a, b = (column(rows[name], ("student", "accuracy")) for name in ("distilled", "from-scratch"))
    return {
        "holds_in_the_mean": float(np.mean(a)) > float(np.mean(b)),
        "distilled_minus_scratch": gap(a, b),
        "text": f"student: distilled {np.mean(a):.4f}, from scratch {np.mean(b):.4f}",
    }


def draw_claims(folder: Path, settings: dict[str, Any]) -> Path:
    """Accuracy against the share of MACs: budgets as curves, threshold 0.5 as points."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for index, (name, found) in enumerate(settings.items()):
            colour = COLOURS[index % len(COLOURS)]
            if "budgets" not in found:
                mean, std = found["accuracy"]["mean"], found["accuracy"]["std"] or 0.0
                axis.axhspan(mean - std, mean + std, color=colour, alpha=0.2)
                axis.axhline(mean, color=colour, lw=1, label=name)
                continue
            rows = list(found["budgets"].values())
            axis.errorbar(
                [row["macs_fraction"]["mean"] for row in rows],
                [row["accuracy"]["mean"] for row in rows],
                yerr=[row["accuracy"]["std"] or 0.0 for row in rows],
                color=colour,
                lw=1,
                capsize=2,
                label=name,
            )
            axis.plot(
                found["fixed"]["macs_fraction"]["mean"],
                found["fixed"]["accuracy"]["mean"],
                "o",
                color=colour,
                ms=8,
            )
        axis.set_xlabel("MACs, share of the plain student")
        axis.set_ylabel("test accuracy")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)

    return save_figure(folder, "claims", draw, size=(7.5, 4.8))


def write_claims_page(folder: Path, record: dict[str, Any]) -> None:
    """``report.md`` and ``report.html``."""
    measured, data = record["measured"], record["data"]
    report = Report(f"Claims of GFNet with early exits, tried on {data['name']}")
    rehearsal = data["kind"] == "built-in"
    (report.note if rehearsal else report.text)(
        ("REHEARSAL on built-in data: says nothing about the claims. " if rehearsal else "")
        + f"{data['name']} ({data['kind']}), {data['images']} images, {data['pixels']} px, scale "
        f"{record['scale']}, seeds {', '.join(map(str, record['seeds']))}. A seed varies: "
        f"{measured['varied_by_seed']}."
    )
    report.heading("The claims")
    for name, claim in measured["claims"].items():
        report.text(f"{name}: {claim['text']}.")
    report.heading("The settings")
    rows: list[list[object]] = []
    for name, found in measured["settings"].items():
        if "budgets" not in found:
            rows.append([name, mean_text(found["accuracy"]), None, None, None, None])
            continue
        points = (found["fixed"], found["points"]["balanced"])
        shown = [mean_text(one[key]) for one in points for key in ("accuracy", "macs_fraction")]
        rows.append([name, mean_text(found["final_accuracy"]), *shown])
    report.table(
        ["setting", "final head", "at 0.5", "its MACs", "balanced", "its MACs"],
        rows,
    )
    report.text("Mean and sample deviation over the seeds; MACs are shares of the plain student's.")
    report.figure(draw_claims(folder, measured["settings"]), "Test accuracy against MACs.")
    report.write(folder)

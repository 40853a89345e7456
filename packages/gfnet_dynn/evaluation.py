"""The last stage: thresholds from the calibration split, then the test split once, for real.

Every number of the early-exit model is measured on passes in which samples really leave; the
full pass only says what to expect, and the two must agree. Everything is computed in fp32,
whatever the run trained in, as ``predict.py`` computes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gfnet_dynn.data_loader_helper import eval_loader
from gfnet_dynn.exit_evaluation import (
    ExitLogits,
    collect,
    exit_rates_per_class,
    never_leaves,
    summarise,
)
from gfnet_dynn.model_files import load_model
from gfnet_dynn.models.custom_modules.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.op_counter import exit_costs
from gfnet_dynn.stages import Run, pairs
from gfnet_dynn.threshold_helper import (
    calibrated_policy,
    solve_for_accuracy,
    solve_for_cost,
    sweep_policy,
)

HALF_COST = 0.5  # mean cost of the "fast" point, share of a run to the final head
TIMED_IMAGES, ROUNDS = 256, 5
ALPHAS = (0.01, 0.05, 0.1)  # share of conformal sets that may miss the class
BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # mean costs, shares of a run to the final head
CONFIDENCE = 0.9  # of the risk control
COMPARED = ("gate", "jei", "max_prob", "entropy", "margin")  # patience has no curve of scores


def three_policies(
    policy: ExitPolicy, calibration: ExitLogits, *, max_loss: float
) -> dict[str, ExitPolicy]:
    """Thresholds for three wishes, all fitted on the calibration split.

    ``careful``: the cheapest that loses nothing against the final head; ``balanced``: the cheapest
    that loses at most ``max_loss``; ``fast``: the most accurate use of half the MACs.
    """
    final = float(calibration.correct[-1].mean())
    # Never leaving is always among the candidates, so both accuracies can be met.
    careful = solve_for_accuracy(policy, calibration, accuracy=final).policy
    balanced = solve_for_accuracy(policy, calibration, accuracy=max(0.0, final - max_loss)).policy
    least = float(calibration.costs[0])
    budget = max(HALF_COST * float(calibration.costs[-1]), least)
    fast = solve_for_cost(policy, calibration, mean_cost=budget).policy
    return {"careful": careful, "balanced": balanced, "fast": fast}


def compare_policies(
    calibration: ExitLogits, test: ExitLogits, *, max_loss: float
) -> dict[str, dict[str, float]]:
    """Every kind of policy with its own balanced threshold: what it does on the test split.

    One threshold for all exits, fitted on calibration data after temperature scaling; accuracy and
    cost are those of the full pass with the exits chosen afterwards.
    """
    rows = {}
    for kind in COMPARED:
        policy = calibrated_policy(ExitPolicy(kind), calibration)
        chosen = three_policies(policy, calibration, max_loss=max_loss)["balanced"]
        found = summarise(test, chosen)
        rows[kind] = {
            "threshold": chosen.thresholds[0],
            "accuracy": found["accuracy"],
            "macs": found["cost"],
            "macs_fraction": found["cost_fraction"],
        }
    return rows


def real_exits(
    model: GFNetDynn, batches: Any, policy: ExitPolicy
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions ``(N,)``, exits ``(N,)`` and labels ``(N,)`` of passes with real exits."""
    predicted, left, labels = [], [], []
    for images, targets in batches:
        result = model.early_exit(images, policy)
        predicted.append(result.logits.float().argmax(dim=1).cpu().numpy())
        left.append(result.exit_index.cpu().numpy())
        labels.append(targets.cpu().numpy())
    return np.concatenate(predicted), np.concatenate(left), np.concatenate(labels)


def time_per_image(
    calls: dict[str, Callable[[Tensor], Any]], images: Tensor, *, batch: int, rounds: int = ROUNDS
) -> dict[str, float]:
    """Milliseconds an image of each call, taken in turns, median over the rounds.

    On a CPU one thread computes and its CPU time counts: waiting for other threads, or for other
    programs of a shared machine, is not the model's cost. On a GPU it is the time on the clock.

    Args:
        calls: by name: a function of a batch ``(N, 3, H, W)``.
        images: ``(M, 3, H, W)``, decoded and on the device.
        batch: images a call.
    """
    on_gpu = images.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time

    def once(call: Callable[[Tensor], Any]) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        for first in range(0, len(images), batch):
            call(images[first : first + batch])
        if on_gpu:
            torch.cuda.synchronize()
        return (clock() - start) / len(images) * 1e3

    times: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for call in calls.values():
                call(images[:batch])
            for _ in range(rounds):
                for name, call in calls.items():
                    times[name].append(once(call))
    finally:
        torch.set_num_threads(threads)
    return {name: float(np.median(values)) for name, values in times.items()}


def plain_accuracy(outputs: ExitLogits) -> float:
    """Accuracy of the final head."""
    return float(outputs.correct[-1].mean())


def _plain_row(model: nn.Module, run: Run) -> dict[str, Any]:
    """Test accuracy, parameters and MACs of a network without exits."""
    right = total = 0
    with torch.inference_mode():
        for images, labels in pairs(
            eval_loader(run.data, "test", run.args, device=run.device), "test"
        ):
            logits = model(images)
            right += int((logits.argmax(dim=1) == labels).sum())
            total += len(labels)
    return {
        "accuracy": right / total,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": float(exit_costs(GFNetDynn(model, exits=()))[-1]),
    }


def evaluate_run(
    run: Run, *, floor: dict[str, float] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate what the run has trained.

    Args:
        floor: test accuracies without a network by name, or None.

    Returns:
        What was measured (numbers for the record), and what the report draws (arrays).
    """
    args, data = run.args, run.data
    file = evaluated_file(run)
    model, facts = load_model(Path(file), architecture="GFNetDynn")
    if tuple(facts["class_names"]) != data.classes:
        raise ValueError(
            f"{file} knows the classes {', '.join(facts['class_names'][:3])}..., "
            f"the data has {', '.join(data.classes[:3])}..."
        )
    if model.backbone.img_size != (data.input_size, data.input_size):
        raise ValueError(
            f"{file} takes images of {model.backbone.img_size[0]} pixels, this run has "
            f"{data.input_size}: expected --input-size {model.backbone.img_size[0]}"
        )
    if facts["split_hash"] != data.manifest.hash:
        print(
            f"warning: {file} was trained on split {facts['split_hash'][:12]}, this one is "
            f"{data.manifest.hash[:12]}: images it has learned from may be among those it is "
            "judged by",
            file=sys.stderr,
        )
        measured_on = {"split_of_model": facts["split_hash"]}
    else:
        measured_on = {}
    model = model.to(run.device)
    outputs = {
        split: collect(
            model,
            pairs(eval_loader(data, split, args, device=run.device), split),
            split=split,
            split_hash=data.manifest.hash,
        )
        for split in ("calibration", "test")
    }
    for split, found in outputs.items():
        found.save(run.folder / f"outputs-{split}.npz")
    calibration, test = outputs["calibration"], outputs["test"]
    kind = args.policy
    policy = calibrated_policy(ExitPolicy(kind, 1.0 if kind == "patience" else 0.5), calibration)
    policies = three_policies(policy, calibration, max_loss=args.max_accuracy_loss)

    plain = {"backbone": run.file("backbone"), "student": run.file("student")}
    networks = {
        name: load_model(path)[0].to(run.device) for name, path in plain.items() if path.exists()
    }
    measured: dict[str, Any] = {} if floor is None else {"floor": floor}
    for name, network in networks.items():
        measured[name] = _plain_row(network, run)
    images = timed_images(run)
    calls: dict[str, Callable[[Tensor], Any]] = dict(networks)
    calls["without exits"] = model.backbone
    for index in range(model.num_gates + 1):
        leave = all_leave_at(index, policy, model.num_gates)
        calls[f"exit {index}"] = lambda batch, p=leave: model.early_exit(batch, p)
    points: dict[str, Any] = {}
    real: dict[str, Any] = {}
    for name, chosen in policies.items():
        batches = pairs(eval_loader(data, "test", args, device=run.device), f"test, {name}")
        predicted, left, labels = real_exits(model, batches, chosen)
        summary = summarise(test, chosen)
        agree = float((left == test.select(chosen)).mean())
        points[name] = {
            "threshold": chosen.thresholds[0],
            "accuracy": float((predicted == labels).mean()),
            "macs": float(test.costs[left].mean()),
            "macs_fraction": float(test.costs[left].mean() / test.costs[-1]),
            "ece": summary["ece"],
            "agreement_with_full_pass": agree,
            "exits": [
                {
                    "block": row["block"],
                    "rate": float((left == i).mean()),
                    "accuracy": _mean(predicted[left == i] == labels[left == i]),
                    "ece": row["ece"],
                    "accuracy_all": row["accuracy_all"],
                    "macs": row["cost"],
                }
                for i, row in enumerate(summary["exits"])
            ],
        }
        real[name] = (predicted, left, labels)
        calls[name] = lambda batch, p=chosen: model.early_exit(batch, p)
    timed = {
        f"batch {b}": time_per_image(calls, images[:n], batch=b)
        for b, n in ((1, min(64, len(images))), (64, len(images)))
    }
    for name, row in (*measured.items(), *points.items()):
        if name in calls:
            row["ms_per_image"] = {label: times[name] for label, times in timed.items()}
    full = {label: times["without exits"] for label, times in timed.items()}
    measured["exits"] = {
        "model": {"file": Path(file).name, "sha256": facts["sha256"], **measured_on},
        "policy": policy.kind,
        "temperatures": list(policy.temperatures),
        "final_accuracy": plain_accuracy(test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs_per_exit": [float(c) for c in test.costs],
        "ms_per_image_without_exits": full,
        "ms_per_image_at_exits": {
            label: [times[f"exit {index}"] for index in range(model.num_gates + 1)]
            for label, times in timed.items()
        },
        "points": points,
        "policies": compare_policies(calibration, test, max_loss=args.max_accuracy_loss),
        **findings(calibration, test, kind=kind, max_loss=args.max_accuracy_loss),
    }
    drawn = {
        "calibration": calibration,
        "test": test,
        "policy": policy,
        "policies": policies,
        "sweep": sweep_policy(test, policy, thresholds=None),
        "other_sweeps": {
            other: sweep_policy(
                test, calibrated_policy(ExitPolicy(other), calibration), thresholds=None
            )
            for other in COMPARED
            if other != kind
        },
        "real": real,
        "exits": model.exits,
        "per_class": exit_rates_per_class(
            real["balanced"][1],
            test.labels,
            num_classes=len(data.classes),
            num_gates=test.num_gates,
        ),
    }
    return measured, drawn


def all_leave_at(index: int, policy: ExitPolicy, num_gates: int) -> ExitPolicy:
    """The rule, asked at every exit up to number ``index``, where everybody leaves."""
    never = never_leaves(num_gates)
    thresholds = [-1.0 if i == index else never for i in range(num_gates)]
    return policy.with_thresholds(thresholds or never)


def findings(
    calibration: ExitLogits, test: ExitLogits, *, kind: str, max_loss: float
) -> dict[str, Any]:
    """Budgets, conformal sets and risk of the rule in use, as ``analyse.py`` finds them.

    Empty lists where there are too few samples, or no exits, to say anything.
    """
    from gfnet_dynn.analysis import analyse_outputs  # which needs this module

    names = ("budgets", "conformal", "risk")
    if not test.exits or len(calibration.labels) < 4 or not 0 < max_loss < 1:
        return {name: [] for name in names}
    result, _ = analyse_outputs(
        calibration,
        test,
        kind=kind,
        max_accuracy_loss=max_loss,
        confidence=CONFIDENCE,
        alphas=ALPHAS,
        shares=BUDGETS,
        overheads=None,
    )
    return {name: [row for row in result[name] if row.get("kind", kind) == kind] for name in names}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def evaluated_file(run: Run) -> Path:
    """The model that the evaluate stage judges: the one named by ``--eval``, or the run's best.

    Raises:
        FileNotFoundError: neither.
    """
    if run.args.eval and run.args.checkpoint:
        return Path(run.args.checkpoint)
    done = run.log.done("exits")
    if done is None:
        raise FileNotFoundError(
            f"{run.folder} holds no model with exits: run the exits stage first, "
            "or name a file by --checkpoint-path"
        )
    return run.folder / "checkpoint" / "best" / str(done["file"])


def timed_images(run: Run) -> Tensor:
    """Up to ``TIMED_IMAGES`` test images, spread over the classes, decoded once."""
    images = [
        batch
        for batch, _ in pairs(eval_loader(run.data, "test", run.args, device=run.device), "test")
    ]
    every = torch.cat(images)
    chosen = np.random.default_rng(0).permutation(len(every))[:TIMED_IMAGES]
    return every[torch.from_numpy(np.sort(chosen))].contiguous()

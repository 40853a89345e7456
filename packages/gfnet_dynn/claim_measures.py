"""What is measured of a trial: of its student, or of its exits."""

from __future__ import annotations

from typing import Any

import torch

from gfnet_dynn.data_loader_helper import eval_loader
from gfnet_dynn.evaluation import (
    BUDGETS,
    plain_accuracy,
    three_policies,
    time_per_image,
    timed_images,
)
from gfnet_dynn.exit_evaluation import collect, summarise
from gfnet_dynn.model_files import load_model
from gfnet_dynn.models.custom_modules.exit_policy import ExitPolicy
from gfnet_dynn.models.op_counter import model_macs
from gfnet_dynn.stages import Run, pairs
from gfnet_dynn.threshold_helper import calibrated_policy, solve_for_cost


def measure_student(run: Run) -> dict[str, float]:
    """Accuracies of the student on both held-out splits."""
    model, facts = load_model(run.file("student"))
    model = model.to(run.device)
    right = total = 0
    with torch.inference_mode():
        for images, labels in pairs(
            eval_loader(run.data, "test", run.args, device=run.device), "test"
        ):
            right += int((model(images).argmax(dim=1) == labels).sum())
            total += len(labels)
    return {
        "accuracy": right / total,
        "calibration_accuracy": facts["metrics"]["calibration_accuracy"],
    }


def measure_exits(run: Run) -> dict[str, Any]:
    """What the trained exits do on the test split, thresholds from the calibration split.

    ``fixed`` uses threshold 0.5 without temperatures: the rule that lambda has trained. Costs are
    shares of the plain student's MACs, so that settings with other exits can be compared.
    """
    done = run.log.done("exits") or {}
    model, _ = load_model(run.folder / "checkpoint" / "best" / str(done["file"]))
    model = model.to(run.device)
    calibration, test = (
        collect(
            model,
            pairs(eval_loader(run.data, split, run.args, device=run.device), split),
            split=split,
            split_hash=run.data.manifest.hash,
        )
        for split in ("calibration", "test")
    )
    plain = float(model_macs(model.backbone))

    def short(policy: ExitPolicy) -> dict[str, float]:
        found = summarise(test, policy)
        return {"accuracy": found["accuracy"], "macs_fraction": found["cost"] / plain}

    kind = run.args.policy
    policy = calibrated_policy(ExitPolicy(kind, 0.5), calibration)
    points = three_policies(policy, calibration, max_loss=run.args.max_accuracy_loss)
    budgets = {}
    for share in BUDGETS:
        if share * plain >= calibration.costs[0]:
            solution = solve_for_cost(policy, calibration, mean_cost=share * plain)
            budgets[f"{share:g}"] = short(solution.policy)
    calls = {"plain": model.backbone}
    for name, point in points.items():
        calls[name] = lambda batch, p=point: model.early_exit(batch, p)
    images = timed_images(run)
    times = {
        f"batch {batch}": time_per_image(calls, images[:count], batch=batch)
        for batch, count in ((1, min(64, len(images))), (64, len(images)))
    }
    return {
        "exits": list(model.exits),
        "policy": kind,
        "final_accuracy": plain_accuracy(test),
        "fixed": short(ExitPolicy(kind, 0.5)),
        "points": {
            name: {
                **short(point),
                "speed_up": {
                    label: values["plain"] / values[name] for label, values in times.items()
                },
            }
            for name, point in points.items()
        },
        "budgets": budgets,
    }

"""The last stage: thresholds from the calibration split, then the test split once, for real.

Every number of the early-exit model is measured on passes in which samples really leave; the
full pass only says what to expect, and the two must agree. Everything is computed in fp32,
whatever the run trained in, as ``predict.py`` computes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from gfnet_dynn.choices import DEFAULT_POINT
from gfnet_dynn.decide.exit_outputs import ExitLogits, collect, exit_rates_per_class, summarise
from gfnet_dynn.decide.findings import findings_of
from gfnet_dynn.decide.thresholds import Sweep, calibrated_policy, sweep_policy, three_policies
from gfnet_dynn.judge.timing import Call, timed_images, times_of
from gfnet_dynn.model_files import EXITS, add_policies, check_fits, load_model
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.op_counter import model_macs
from gfnet_dynn.our_train_helper import best_file
from gfnet_dynn.run import Run, pairs
from gfnet_dynn.settings import Judging
from gfnet_dynn.train.parallel import ALONE
from shared_core.for_torch.accuracy import answers_of
from shared_core.metrics.intervals import Z95

COMPARED = ("gate", "jei", "max_prob", "entropy", "margin")  # patience has no curve of scores
PLAIN_NAMES = ("backbone", "student", "labels")


class RealExits(NamedTuple):
    """What passes with real exits said, each ``(N,)``."""

    predicted: np.ndarray
    left: np.ndarray  # exits 0..G
    labels: np.ndarray


@dataclass(frozen=True)
class Judgement:
    """What the stage found: numbers for the record, and what the report draws."""

    measured: dict[str, Any]
    file: Path  # the model with its thresholds
    test: ExitLogits
    policy: ExitPolicy  # the rule with its temperatures
    sweep: Sweep  # of the rule, every threshold on the test split: for a plot, never for a choice
    other_sweeps: dict[str, Sweep]
    real: dict[str, RealExits]  # by wish
    per_class: np.ndarray  # exit rates (K, G+1) under the default wish

    @property
    def exits(self) -> tuple[int, ...]:
        """The blocks of the exits."""
        return self.test.exits


def gain_of(right: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the teacher brought: accuracy of the student minus that of its twin from labels.

    Args:
        right: by network, which test images it answered rightly, bool ``(N,)``.
    """
    return paired_shares(right["student"], right["labels"])


def judged_file(run: Run, named: Path | None) -> Path:
    """The model that is judged: the one that was named, or the run's best.

    Raises:
        FileNotFoundError: neither.
    """
    if named is not None:
        return named
    done = run.log.done("exits")
    if done is None:
        raise FileNotFoundError(
            f"{run.folder} holds no model with exits: run the exits stage first, "
            "or name a file by --checkpoint-path"
        )
    return best_file(run, str(done["file"]))


def evaluate_run(run: Run, file: Path, *, floors: Mapping[str, Any]) -> Judgement:
    """Judge a model with exits, and the plain networks of the run beside it.

    The thresholds that are found go into the facts of the model file; a file from elsewhere stays
    as it is, and a copy with thresholds lies under ``checkpoint/judged/``.

    Args:
        floors: what simple methods reach, as the run's first stage found it.
    """
    model, about = _load(run, file)
    calibration, test = (_collect(run, model, split) for split in ("calibration", "test"))
    judging, chosen = run.settings.judging, _choose(calibration, run.settings.judging)
    plain = _plain_networks(run)
    measured: dict[str, Any] = dict(floors)
    right: dict[str, np.ndarray] = {}
    for name, network in plain.items():
        measured[name], right[name] = _plain_row(network, run)
    start = (run.log.done("backbone") or {}).get("start")
    if start and "backbone" in measured:
        measured["backbone"]["start"] = start
    if "labels" in plain:
        measured["distillation"] = gain_of(right)
    real = {name: _leave_for_real(run, model, point) for name, point in chosen.points.items()}
    times = times_of(_calls(model, chosen, plain), timed_images(run))
    for name in plain:
        measured[name]["ms_per_image"] = _of(times, name)
    measured["exits"] = {
        "model": about,
        "policy": judging.policy,
        **_network_rows(model, chosen.policy, test, times),
        "points": {
            name: {**_point(test, chosen.points[name], found), "ms_per_image": _of(times, name)}
            for name, found in real.items()
        },
        "policies": {name: _rule_row(test, rule) for name, rule in chosen.balanced.items()},
        **findings_of(
            calibration, test, kind=judging.policy, max_accuracy_loss=judging.max_accuracy_loss
        ),
    }
    target = _file_with_thresholds(run, file, chosen)
    sweeps = {
        name: sweep_policy(test, rule, thresholds=None) for name, rule in chosen.rules.items()
    }
    rates = exit_rates_per_class(
        real[DEFAULT_POINT].left,
        test.labels,
        num_classes=len(run.data.classes),
        num_gates=test.num_gates,
    )
    own = sweeps.pop(judging.policy)
    return Judgement(measured, target, test, chosen.policy, own, sweeps, real, rates)


class _Chosen(NamedTuple):
    """What the calibration split decided: rules with its temperatures, and their thresholds."""

    policy: ExitPolicy  # the run's own rule
    rules: dict[str, ExitPolicy]  # the rules that are compared, the own one first
    points: dict[str, ExitPolicy]  # the own rule's, by wish
    balanced: dict[str, ExitPolicy]  # of the compared rules


def _choose(calibration: ExitLogits, judging: Judging) -> _Chosen:
    rules = {
        name: calibrated_policy(ExitPolicy(name, 1.0 if name == "patience" else 0.5), calibration)
        for name in dict.fromkeys((judging.policy, *COMPARED))
    }
    found = {
        name: three_policies(rule, calibration, max_loss=judging.max_accuracy_loss)
        for name, rule in rules.items()
    }
    balanced = {name: found[name][DEFAULT_POINT] for name in COMPARED}
    return _Chosen(rules[judging.policy], rules, found[judging.policy], balanced)


def _file_with_thresholds(run: Run, file: Path, chosen: _Chosen) -> Path:
    """The model file with the thresholds in its facts; a copy in the run, if it is not its own."""
    own = file.resolve().is_relative_to(run.folder.resolve())
    target = file if own else run.folder / "checkpoint" / "judged" / file.name
    add_policies(file, points=chosen.points, rules=chosen.balanced, target=target)
    return target


def _load(run: Run, file: Path) -> tuple[GFNetDynn, dict[str, Any]]:
    """The model on the run's device, and what the record says of its file."""
    model, facts = load_model(file, architecture=EXITS)
    check_fits(file, model, facts, run.data)
    about = {"file": file.name, "sha256": facts["sha256"]}
    if facts["split_hash"] != run.data.manifest.hash:
        print(
            f"warning: {file} was trained on split {facts['split_hash'][:12]}, this one is "
            f"{run.data.manifest.hash[:12]}: images it has learned from may be among those it is "
            "judged by",
            file=sys.stderr,
        )
        about["split_of_model"] = facts["split_hash"]
    return model.to(run.device), about


def _collect(run: Run, model: GFNetDynn, split: str) -> ExitLogits:
    """A full pass over a split, kept in the run's folder for ``analyse.py``."""
    batches = pairs(run.loaders().held(split), split)
    found = collect(model, batches, split=split, split_hash=run.data.manifest.hash)
    found.save(run.folder / f"outputs-{split}.npz")
    return found


def _plain_networks(run: Run) -> dict[str, nn.Module]:
    """Backbone, student and its twin from labels, as far as the run has them."""
    files = {name: run.file(name) for name in PLAIN_NAMES}
    return {
        name: load_model(path)[0].to(run.device) for name, path in files.items() if path.exists()
    }


def _plain_row(model: nn.Module, run: Run) -> tuple[dict[str, Any], np.ndarray]:
    """Test accuracy, parameters and MACs of a network without exits; which images it has right."""
    said = answers_of(model, run.loaders().held("test"), ALONE)
    row = {
        "accuracy": said.accuracy,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": float(model_macs(model)),
    }
    return row, said.logits.argmax(axis=1) == said.labels


def paired_shares(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How much larger the first share of right answers is, on the same images: bool ``(N,)`` each.

    Returns:
        ``difference``, a fraction, with its 95 % interval ``low`` to ``high``, and ``images``.

    Source: A. Agresti, Y. Min 2005, Statistics in Medicine 24, 729-740: Wald's interval after half
    an image more in each of the four cells.
    """
    number, images = len(first) + 2, len(first)
    only_first = float((first & ~second).sum()) + 0.5
    only_second = float((second & ~first).sum()) + 0.5
    gap = (only_first - only_second) / number
    spread = math.sqrt(only_first + only_second - number * gap**2) / number
    difference = float(first.mean() - second.mean())
    low, high = gap - Z95 * spread, gap + Z95 * spread
    return {"difference": difference, "low": low, "high": high, "images": images}


def real_exits(
    model: GFNetDynn, batches: Iterable[tuple[Tensor, Tensor]], policy: ExitPolicy
) -> RealExits:
    """Passes in which samples really leave."""
    predicted, left, labels = [], [], []
    for images, targets in batches:
        result = model.early_exit(images, policy)
        predicted.append(result.logits.float().argmax(dim=1).cpu().numpy())
        left.append(result.exit_index.cpu().numpy())
        labels.append(targets.cpu().numpy())
    return RealExits(np.concatenate(predicted), np.concatenate(left), np.concatenate(labels))


def _leave_for_real(run: Run, model: GFNetDynn, policy: ExitPolicy) -> RealExits:
    return real_exits(model, pairs(run.loaders().held("test"), "test, real exits"), policy)


def _calls(model: GFNetDynn, chosen: _Chosen, plain: dict[str, nn.Module]) -> dict[str, Call]:
    """What is timed, by name; ``exit G`` is a run past all exits that nobody takes."""

    def leaving(policy: ExitPolicy) -> Call:
        return lambda batch: model.early_exit(batch, policy)

    calls: dict[str, Call] = {**plain, "without exits": model.backbone}
    for index in range(model.num_gates + 1):
        calls[f"exit {index}"] = leaving(chosen.policy.all_leave_at(index, model.num_gates))
    return calls | {name: leaving(point) for name, point in chosen.points.items()}


def _network_rows(
    model: GFNetDynn, policy: ExitPolicy, test: ExitLogits, times: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """What holds of the network whatever its thresholds are."""
    return {
        "temperatures": list(policy.temperatures),
        "final_accuracy": float(test.correct[-1].mean()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs_without_exits": float(model_macs(model.backbone)),
        "macs_per_exit": [float(cost) for cost in test.costs],
        "ms_per_image_without_exits": _of(times, "without exits"),
        "ms_per_image_at_exits": {
            label: [row[f"exit {index}"] for index in range(model.num_gates + 1)]
            for label, row in times.items()
        },
    }


def _of(times: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    return {label: row[name] for label, row in times.items()}


def _point(test: ExitLogits, policy: ExitPolicy, real: RealExits) -> dict[str, Any]:
    """What a wish's thresholds do on the test split, for real."""
    summary, right = summarise(test, policy), real.predicted == real.labels
    macs = float(test.costs[real.left].mean())
    return {
        "threshold": policy.thresholds[0],
        "accuracy": float(right.mean()),
        "macs": macs,
        "macs_fraction": macs / float(test.costs[-1]),
        "ece": summary["ece"],
        "agreement_with_full_pass": float((real.left == test.select(policy)).mean()),
        "exits": [
            {
                "block": row["block"],
                "rate": float((real.left == index).mean()),
                "accuracy": _mean(right[real.left == index]),
                "ece": row["ece"],
                "accuracy_all": row["accuracy_all"],
                "macs": row["cost"],
            }
            for index, row in enumerate(summary["exits"])
        ],
    }


def _rule_row(test: ExitLogits, chosen: ExitPolicy) -> dict[str, float]:
    """What a rule's balanced threshold does; exits are chosen after a full pass."""
    found = summarise(test, chosen)
    return {
        "threshold": chosen.thresholds[0],
        "accuracy": found["accuracy"],
        "macs": found["cost"],
        "macs_fraction": found["cost_fraction"],
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None

"""Everything that can be known of a finished run from its stored outputs; no network is run.

Thresholds, temperatures, sets and placements come from the calibration split; the test split only
reports. What promises something (conformal sets, risk control) needs samples that nothing else was
fitted on: the sets take their temperatures and exits from one half of the calibration split and
their quantiles from the other; risk control uses scores without temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfnet_dynn.choices import RULES
from gfnet_dynn.decide.exit_outputs import ExitLogits, summarise, take_exit
from gfnet_dynn.decide.placement import search
from gfnet_dynn.decide.promises import FAMILIES, calibrate, risk_controlled_policy
from gfnet_dynn.decide.thresholds import (
    SWEEP,
    Sweep,
    budgeted_batch,
    calibrated_policy,
    solve_for_cost,
    sweep_policy,
    three_policies,
)
from gfnet_dynn.models.exit_policy import NEVER, ExitPolicy

SUBSETS = 2_000  # placements tried before the search turns greedy; some seconds a budget
RISK_STEPS = (1, 2, 5)  # times the accuracy loss that is asked for
ALPHAS = (0.01, 0.05, 0.1)  # share of conformal sets that may miss the class
BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # mean costs, shares of a run to the final head
CONFIDENCE = 0.9  # of the risk control


def take_samples(outputs: ExitLogits, rows: NDArray) -> ExitLogits:
    """The outputs on some of the samples, int ``rows``."""
    return ExitLogits(
        outputs.logits[:, rows],
        outputs.gate_logits[rows],
        outputs.labels[rows],
        outputs.costs,
        outputs.exits,
        outputs.split,
        outputs.split_hash,
    )


def halves(outputs: ExitLogits) -> tuple[ExitLogits, ExitLogits]:
    """Two random halves of a split, always the same."""
    order = np.random.default_rng(0).permutation(len(outputs.labels))
    middle = len(order) // 2
    return take_samples(outputs, order[:middle]), take_samples(outputs, order[middle:])


def check_pair(calibration: ExitLogits, test: ExitLogits) -> None:
    """Raise a ValueError unless both are outputs of one network with exits on two splits."""
    if not calibration.exits:
        raise ValueError("the outputs are of a network without exits: nothing to analyse")
    for name in ("exits", "num_classes", "split_hash"):
        a, b = getattr(calibration, name), getattr(test, name)
        if a != b:
            raise ValueError(f"calibration and test outputs differ in {name}: {a} and {b}")
    if not np.array_equal(calibration.costs, test.costs):
        raise ValueError("calibration and test outputs differ in costs: not of one network")
    if len(calibration.labels) < 4:
        raise ValueError(f"{len(calibration.labels)} calibration samples, expected 4 or more")
    if calibration.fingerprint == test.fingerprint:
        raise ValueError("calibration and test outputs are the same samples")


def usual_thresholds(kind: str, num_gates: int) -> tuple[float, ...]:
    """Thresholds of a short table: the original's eight, or every count for patience."""
    return tuple(float(i) for i in range(num_gates + 1)) if kind == "patience" else SWEEP


def policies_of(calibration: ExitLogits, kinds: Sequence[str] = RULES) -> dict[str, ExitPolicy]:
    """Every rule with the temperatures of the calibration split; thresholds still to be found."""
    return {kind: calibrated_policy(ExitPolicy(kind, NEVER), calibration) for kind in kinds}


def _short(summary: dict[str, Any]) -> dict[str, float]:
    return {name: summary[name] for name in ("accuracy", "cost", "cost_fraction")}


def exits_alone(calibration: ExitLogits, test: ExitLogits, policy: ExitPolicy) -> list[dict]:
    """Each exit as if everybody left there: accuracies, cost, temperature."""
    return [
        {
            "block": block,
            "calibration_accuracy": float(calibration.correct[index].mean()),
            "test_accuracy": float(test.correct[index].mean()),
            "cost": float(test.costs[index]),
            "cost_fraction": float(test.costs[index] / test.costs[-1]),
            "temperature": policy.temperature(index),
        }
        for index, block in enumerate((*test.exits, None))
    ]


def sweeps(
    calibration: ExitLogits, test: ExitLogits, policies: dict[str, ExitPolicy]
) -> dict[str, list[dict]]:
    """By rule, what each usual threshold does on both splits."""
    found = {}
    for kind, policy in policies.items():
        thresholds = usual_thresholds(kind, test.num_gates)
        rows = zip(
            sweep_policy(test, policy, thresholds=thresholds).rows(),
            sweep_policy(calibration, policy, thresholds=thresholds).rows(),
            strict=True,
        )
        found[kind] = [
            {**row, "calibration_accuracy": other["accuracy"], "calibration_cost": other["cost"]}
            for row, other in rows
        ]
    return found


def curves(test: ExitLogits, policies: dict[str, ExitPolicy]) -> dict[str, Sweep]:
    """By rule, every threshold that matters on the test split: for a plot, never for a choice."""
    return {kind: sweep_policy(test, p, thresholds=None) for kind, p in policies.items()}


def wishes(
    calibration: ExitLogits,
    test: ExitLogits,
    policies: dict[str, ExitPolicy],
    *,
    max_accuracy_loss: float,
) -> dict[str, dict[str, dict]]:
    """By rule, the careful, balanced and fast threshold of calibration data, and test."""
    found: dict[str, dict[str, dict]] = {}
    for kind, policy in policies.items():
        chosen = three_policies(policy, calibration, max_loss=max_accuracy_loss)
        found[kind] = {
            name: {
                "threshold": one.thresholds[0],
                "calibration": _short(summarise(calibration, one)),
                "test": _short(summarise(test, one)),
            }
            for name, one in chosen.items()
        }
    return found


def budgets(
    calibration: ExitLogits,
    test: ExitLogits,
    policies: dict[str, ExitPolicy],
    shares: Sequence[float],
) -> list[dict]:
    """For each mean cost (share of a full run) and rule, the threshold that spends it."""
    rows = []
    for share in shares:
        mean_cost = share * float(calibration.costs[-1])
        for kind, policy in policies.items():
            row: dict[str, Any] = {"budget": share, "kind": kind, "threshold": None}
            if mean_cost >= calibration.costs[0]:
                found = solve_for_cost(policy, calibration, mean_cost=mean_cost, test=test)
                row["threshold"] = found.policy.thresholds[0]
                row["calibration"] = _short(found.calibration)
                row["test"] = _short(found.test or {})
            rows.append(row)
    return rows


def conformal(
    calibration: ExitLogits,
    test: ExitLogits,
    kind: str,
    alphas: Sequence[float],
    *,
    max_accuracy_loss: float,
) -> list[dict]:
    """Sets of each family under the balanced threshold of a rule, measured on the test split.

    Returns:
        A row for each alpha and family: ``mean_set_size`` (classes), ``coverage`` and
        ``coverage_per_exit`` (None where nobody leaves).
    """
    fitted_on, promised_on = halves(calibration)
    policy = three_policies(
        policies_of(fitted_on, [kind])[kind], fitted_on, max_loss=max_accuracy_loss
    )["balanced"]
    pool = (promised_on.probabilities(policy), promised_on.labels, promised_on.select(policy))
    held = (test.probabilities(policy), test.labels, test.select(policy))
    rows = []
    for alpha in alphas:
        for family in FAMILIES:
            sets = calibrate(*pool, alpha=alpha, family=family)
            measured = sets.evaluate(*held)
            rows.append(
                {
                    "alpha": alpha,
                    "family": family,
                    "mean_set_size": measured["C"],
                    "coverage": 1 - measured["emp_alpha"],
                    "coverage_per_exit": measured["coverage_per_exit"],
                    "quantiles": [q if math.isfinite(q) else None for q in sets.quantiles],
                }
            )
    return rows


def risk(
    calibration: ExitLogits,
    test: ExitLogits,
    kinds: Sequence[str],
    *,
    levels: Sequence[float],
    confidence: float,
) -> list[dict]:
    """Risk-controlled thresholds ("the exit is wrong where the full network is right").

    Scores are those without temperatures: nothing in them was fitted on these samples.
    """
    rows = []
    for level in levels:
        for kind in kinds:
            counts = np.arange(test.num_gates, dtype=np.float64)
            policy, found = risk_controlled_policy(
                ExitPolicy(kind, NEVER),
                calibration,
                level=level,
                confidence_level=confidence,
                candidates=counts if kind == "patience" else None,
            )
            right = take_exit(test.correct, test.select(policy))
            rows.append(
                {
                    **asdict(found),
                    "risk": "regret",
                    "kind": kind,
                    "test_risk": float((test.correct[-1] & ~right).mean()),
                    "test": _short(summarise(test, policy)),
                }
            )
    return rows


def samples_needed(level: float, confidence: float) -> int:
    """Fewest calibration samples with which a risk level can be promised, if none goes wrong.

    ``(1 - level)^n <= 1 - confidence``: the binomial p-value of no loss in n samples.
    """
    return math.ceil(math.log(1 - confidence) / math.log(1 - level) - 1e-9)


def placements(
    calibration: ExitLogits,
    test: ExitLogits,
    policy: ExitPolicy,
    *,
    overheads: NDArray,
    shares: Sequence[float],
) -> list[dict]:
    """The exits worth keeping for each budget, for any number of them and for at most 1, 2, 3."""
    num_gates = calibration.num_gates
    rows = []
    for share in shares:
        for most in (*range(1, min(4, num_gates)), num_gates):
            row: dict[str, Any] = {"budget": share, "max_exits": most, "blocks": None}
            try:
                found = search(
                    calibration,
                    policy,
                    overheads=overheads,
                    mean_cost=share * float(calibration.costs[-1]),
                    max_exits=most,
                    limit=SUBSETS,
                )
            except ValueError:  # not even the cheapest placement is that cheap
                rows.append(row)
                continue
            full = float(calibration.costs[-1])  # shares of the network with all exits
            report = summarise(test.keep(found.exits, costs=found.costs), found.policy)
            row["blocks"] = list(found.blocks)
            row["threshold"] = found.policy.thresholds[0]
            row["exhaustive"] = found.exhaustive
            for name, summary in (("calibration", found.calibration), ("test", report)):
                cost = summary["cost"]
                row[name] = {
                    "accuracy": summary["accuracy"],
                    "cost": cost,
                    "cost_fraction": cost / full,
                }
            rows.append(row)
    return rows


def risk_levels(max_accuracy_loss: float) -> list[float]:
    """The levels that are tried: the loss that is asked for, and some times of it."""
    levels = [round(step * max_accuracy_loss, 12) for step in RISK_STEPS]
    return [level for level in levels if 0 < level < 1]


def findings_of(
    calibration: ExitLogits, test: ExitLogits, *, kind: str, max_accuracy_loss: float
) -> dict[str, list[dict]]:
    """Budgets, conformal sets and risk of one rule, as a run's record keeps them.

    Empty lists where there are too few samples, or no exits, to say anything.
    """
    if not test.exits or len(calibration.labels) < 4 or not 0 < max_accuracy_loss < 1:
        return {"budgets": [], "conformal": [], "risk": []}
    check_pair(calibration, test)
    levels = risk_levels(max_accuracy_loss)
    return {
        "budgets": budgets(calibration, test, policies_of(calibration, [kind]), BUDGETS),
        "conformal": conformal(
            calibration, test, kind, ALPHAS, max_accuracy_loss=max_accuracy_loss
        ),
        "risk": risk(calibration, test, [kind], levels=levels, confidence=CONFIDENCE),
    }


def analyse_outputs(
    calibration: ExitLogits,
    test: ExitLogits,
    *,
    kind: str,
    max_accuracy_loss: float,
    confidence: float,
    alphas: Sequence[float],
    shares: Sequence[float],
    overheads: NDArray | None,
) -> tuple[dict[str, Any], dict[str, Sweep]]:
    """All of it.

    Args:
        kind: the rule for the parts that look at one only.
        max_accuracy_loss: fraction, of the balanced thresholds and of the risk.
        confidence: of the risk control, fraction.
        alphas: of the conformal sets, fractions.
        shares: budgets, mean cost as shares of a run to the final head past all exits.
        overheads: MACs of each exit ``(G,)``; None leaves the placement out.

    Returns:
        Plain JSON, and the curves by rule for a plot.
    """
    check_pair(calibration, test)
    policies, levels = policies_of(calibration), risk_levels(max_accuracy_loss)
    result = {
        "kind": kind,
        "samples": {"calibration": len(calibration.labels), "test": len(test.labels)},
        "split_hash": test.split_hash,
        "num_classes": test.num_classes,
        "full_cost": float(test.costs[-1]),
        "final_accuracy": float(test.correct[-1].mean()),
        "exits": exits_alone(calibration, test, policies[kind]),
        "sweeps": sweeps(calibration, test, policies),
        "wishes": wishes(calibration, test, policies, max_accuracy_loss=max_accuracy_loss),
        "budgets": budgets(calibration, test, policies, shares),
        "budgeted_batch": {
            name: budgeted_batch(policy, calibration, test) for name, policy in policies.items()
        },
        "conformal": conformal(
            calibration, test, kind, alphas, max_accuracy_loss=max_accuracy_loss
        ),
        "risk": risk(calibration, test, RULES, levels=levels, confidence=confidence),
        "risk_samples_needed": {
            f"{level:g}": samples_needed(level, confidence) for level in levels
        },
        "placement": None
        if overheads is None
        else placements(calibration, test, policies[kind], overheads=overheads, shares=shares),
    }
    return result, curves(test, policies)

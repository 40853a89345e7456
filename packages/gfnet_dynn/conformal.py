"""Conformal sets for a network with exits: they hold the true class 1 - alpha of the time.

The score is LAC's, ``1 - p_true``: Sadinle et al. 2019, arXiv 1609.00451. Families, by the name
of the original (Regol et al. 2023, arXiv 2310.09163):

- ``general``: one quantile from the scores of all samples, each at the exit it leaves at.
- ``gated``: a quantile for each exit from the samples that leave there; an exit with 20 or fewer
  takes that of ``gated_all``.
- ``gated_all``: a quantile for each exit from all samples, leaving there or not.
- ``gated_strict``: a quantile for each exit from the samples that leave there only.

``general`` covers over all samples and ``gated_strict`` at every single exit, whatever decides
the exit. ``gated_all`` covers when the exit is independent of the score; where hard samples run
to the end it promises too much there. ``gated`` lies between the two.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FAMILIES = ("general", "gated", "gated_all", "gated_strict")
ALPHAS = (0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05)
FEW = 20  # an exit needs more leaving samples than this for a quantile of its own in ``gated``


def lac_scores(probabilities: NDArray, labels: NDArray) -> NDArray:
    """``1 - p_true``, float64 ``(N,)`` in [0, 1], of probabilities ``(N, K)``."""
    p = np.asarray(probabilities, dtype=np.float64)
    return 1 - p[np.arange(len(p)), labels]


def conformal_quantile(scores: NDArray, alpha: float) -> float:
    """The ``ceil((n+1)(1-alpha))``-th smallest of n scores; infinite when n is too small.

    The original capped the rank at n, which breaks the promise for small n, and took
    ``1 - alpha`` for n = 0. An infinite quantile gives the set of all classes.

    Source: split conformal prediction, e.g. Lei et al. 2018, arXiv 1604.04173.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; expected a fraction between 0 and 1")
    n = len(scores)
    # 1e-9: (n+1)(1-alpha) that is a whole number on paper must not be rounded up to the next.
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if rank > n:
        return math.inf
    return float(np.partition(np.asarray(scores, dtype=np.float64), rank - 1)[rank - 1])


def content_hash(*arrays: NDArray) -> str:
    """sha256 of the arrays' shapes, types and values."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ConformalSets:
    """Quantiles of one family at one alpha."""

    family: str
    alpha: float
    quantiles: tuple[float, ...]  # one an exit, final head last; inf: every class is in the set
    calibration_hash: str

    def sets(self, probabilities: NDArray, exit_index: NDArray) -> NDArray:
        """Which classes are in each sample's set, bool ``(N, K)``.

        Args:
            probabilities: ``(G+1, N, K)``, final head last.
            exit_index: int ``(N,)`` in ``0..G``.
        """
        p = np.asarray(probabilities, dtype=np.float64)
        chosen = p[exit_index, np.arange(p.shape[1])]  # (N, K)
        return 1 - chosen <= np.asarray(self.quantiles)[exit_index][:, None]

    def evaluate(self, probabilities: NDArray, labels: NDArray, exit_index: NDArray) -> dict:
        """``C`` (mean set size in classes), ``emp_alpha`` (1 - coverage), and coverage per exit.

        ``coverage_per_exit`` holds None for an exit that nobody left at.

        Raises:
            ValueError: these are the very samples of the calibration.
        """
        if content_hash(probabilities, labels) == self.calibration_hash:
            raise ValueError(
                "the conformal sets are evaluated on their own calibration samples; "
                "expected another split"
            )
        members = self.sets(probabilities, exit_index)
        covered = members[np.arange(len(labels)), labels]
        exits = range(len(self.quantiles))
        return {
            "C": float(members.sum(axis=1).mean()),
            "emp_alpha": float(1 - covered.mean()),
            "coverage_per_exit": [
                float(covered[exit_index == e].mean()) if (exit_index == e).any() else None
                for e in exits
            ],
        }

    def state_dict(self) -> dict:
        """Plain JSON; an infinite quantile is None."""
        return {
            "family": self.family,
            "alpha": self.alpha,
            "quantiles": [q if math.isfinite(q) else None for q in self.quantiles],
            "calibration_hash": self.calibration_hash,
        }

    @classmethod
    def from_state_dict(cls, state: dict) -> "ConformalSets":
        """What :meth:`state_dict` wrote."""
        quantiles = tuple(math.inf if q is None else float(q) for q in state["quantiles"])
        return cls(state["family"], state["alpha"], quantiles, state["calibration_hash"])


def calibrate(
    probabilities: NDArray, labels: NDArray, exit_index: NDArray, *, alpha: float, family: str
) -> ConformalSets:
    """Quantiles from a calibration split.

    Args:
        probabilities: ``(G+1, N, K)``, final head last; temperature-scaled or not, as in use.
        labels: int ``(N,)``.
        exit_index: int ``(N,)`` in ``0..G``, where each sample leaves.
        alpha: share of samples whose set may miss the true class, fraction in (0, 1).
        family: one of ``general``, ``gated``, ``gated_all``, ``gated_strict``.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; expected one of {', '.join(FAMILIES)}")
    num_exits, n = probabilities.shape[:2]
    if len(labels) != n or len(exit_index) != n:
        raise ValueError(
            f"{len(labels)} labels and {len(exit_index)} exits of {n} samples; expected {n} each"
        )
    scores = np.stack([lac_scores(p, labels) for p in probabilities])  # (G+1, N)
    if family == "general":
        gated = scores[exit_index, np.arange(n)]
        quantiles = [conformal_quantile(gated, alpha)] * num_exits
    else:
        quantiles = []
        for index in range(num_exits):
            leaves = exit_index == index
            everyone = family == "gated_all" or (family == "gated" and leaves.sum() <= FEW)
            pool = scores[index] if everyone else scores[index, leaves]
            quantiles.append(conformal_quantile(pool, alpha))
    return ConformalSets(
        family, float(alpha), tuple(quantiles), content_hash(probabilities, labels)
    )


def conformal_metrics(
    calibration: tuple[NDArray, NDArray, NDArray],
    test: tuple[NDArray, NDArray, NDArray],
    *,
    alphas: Sequence[float] = ALPHAS,
    families: Sequence[str] = FAMILIES,
) -> dict[str, float]:
    """``sets_{family}_C_{alpha}`` and ``sets_{family}_emp_alpha_{alpha}`` for all of them.

    Args:
        calibration, test: ``(probabilities, labels, exit_index)`` of two splits.
    """
    metrics = {}
    for family in families:
        for alpha in alphas:
            fitted = calibrate(*calibration, alpha=alpha, family=family)
            measured = fitted.evaluate(*test)
            for name in ("C", "emp_alpha"):
                metrics[f"sets_{family}_{name}_{alpha:g}"] = measured[name]
    return metrics

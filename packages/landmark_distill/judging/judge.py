"""The open-set test: verification at eight false-accept rates, coarse and fine; retrieval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landmark_distill.config import FAR_TARGETS, VARIANTS
from landmark_distill.gallery.nearest import ExactIndex
from landmark_distill.images.truths import PairMask, Truth
from landmark_distill.judging.histogram import histogram_rates
from landmark_distill.judging.pictures import Tile, plot_roc, write_sheet
from landmark_distill.judging.retrieval import Retrieval, retrieval
from landmark_distill.judging.verification import (
    Verification,
    measurable,
    verification_rates,
)
from shared_core.checkpoints import atomic_write

CURVE = tuple(10.0 ** (-n / 3) for n in range(3, 25))  # three a decade, 1e-1 to 1e-8
RESULT_FILE, ROC_FILE, SHEET_FILE = "openset.json", "openset_roc.png", "openset_nearest.png"


@dataclass(frozen=True)
class OpenSetResult:
    """What the test found; rates are fractions of the genuine pairs."""

    far_targets: tuple[float, ...]
    variant: str
    rates: dict[str, list[float]]  # truth -> one rate for each target
    measurable: dict[str, list[bool]]  # truth -> whether there are pairs enough for the target
    verification: dict[str, Verification]  # empty for the variant ``original``
    curves: dict[str, Verification]  # for the plot; empty unless asked for
    retrieval: dict[str, Retrieval]

    def line(self) -> str:
        """What ``record.txt`` says."""
        shown = "--".join(
            f"{name}grained:[{', '.join(self.shown(name))}]"
            for name in ("coarse", "fine")
            if name in self.rates
        )
        return f"test acc: {shown}"

    def shown(self, name: str) -> list[str]:
        """The rates of a truth as text; ``-`` where too few pairs say nothing of the target."""
        pairs = zip(self.rates[name], self.measurable[name], strict=True)
        return [f"{rate:.5f}" if enough else "-" for rate, enough in pairs]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        out: dict[str, Any] = {
            "variant": self.variant,
            "far_targets": list(self.far_targets),
            "rates": self.rates,
            "measurable": self.measurable,
            "retrieval": {name: one.as_dict() for name, one in self.retrieval.items()},
        }
        for name, one in self.verification.items():
            out.setdefault("verification", {})[name] = {
                # Everything is accepted at a threshold of minus infinity, which JSON lacks.
                "thresholds": [float(t) if np.isfinite(t) else None for t in one.thresholds],
                "far": one.far.tolist(),
                "genuine_pairs": one.genuine,
                "impostor_pairs": one.impostor,
            }
        return out


def openset_test(
    features: NDArray[Any],
    truths: Mapping[str, Truth],
    *,
    far_targets: Sequence[float] = FAR_TARGETS,
    variant: str = "exact",
    curve: bool = False,
    ks: Sequence[int] = (1, 5, 10),
    block: int = 1024,
) -> OpenSetResult:
    """Verify all pairs and retrieve each image among the others.

    Args:
        features: (N, D), in the order of the truths; scaled to unit length here.
        truths: ``coarse`` and ``fine`` (or others): labels (N,), or a mask over the pairs, which
            says nothing about retrieval.
        variant: ``exact`` thresholds, or the ``original``'s histogram.
        curve: rates at further targets, for a plot.
        ks: of recall@k; empty: no retrieval.

    Raises:
        ValueError: truths that do not fit, no genuine or no impostor pair.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    targets = tuple(float(t) for t in far_targets)
    found: dict[str, Verification] = {}
    curves: dict[str, Verification] = {}
    if variant == "original":
        counted = histogram_rates(features, truths, far_targets=targets, block=block)
        rates = {name: found_rates for name, (found_rates, _) in counted.items()}
        impostors = {name: impostor for name, (_, impostor) in counted.items()}
    else:
        asked = targets + (CURVE if curve else ())
        every = verification_rates(features, truths, far_targets=asked, block=block)
        found = {name: _some(one, slice(len(targets))) for name, one in every.items()}
        curves = every if curve else {}
        rates = {name: one.rates.tolist() for name, one in found.items()}
        impostors = {name: one.impostor for name, one in found.items()}
    retrieved = {
        name: retrieval(features, truth, ks=ks)
        for name, truth in truths.items()
        if ks and not isinstance(truth, PairMask)
    }
    enough = {name: measurable(targets, impostor) for name, impostor in impostors.items()}
    return OpenSetResult(targets, variant, rates, enough, found, curves, retrieved)


def _some(one: Verification, part: slice) -> Verification:
    return Verification(
        one.far_targets[part],
        one.rates[part],
        one.thresholds[part],
        one.far[part],
        one.genuine,
        one.impostor,
    )


def write_results(
    folder: str | Path, result: OpenSetResult, *, more: Mapping[str, Any] | None = None
) -> None:
    """Write ``openset.json``, and ``openset_roc.png`` when there are curves."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**result.as_dict(), **(more or {})}, indent=2, allow_nan=False) + "\n"
    atomic_write(folder / RESULT_FILE, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    if result.curves:
        plot_roc(folder / ROC_FILE, result.curves, marks=result.far_targets)


def nearest_sheet(
    path: str | Path,
    features: NDArray[Any],
    images: Sequence[Path | None],
    labels: NDArray[np.int64] | None,
    *,
    queries: int = 12,
    k: int = 8,
    seed: int = 0,
) -> None:
    """Draw some images, chosen by ``seed``, with the nearest among the others."""
    chosen = np.sort(
        np.random.default_rng(seed).choice(len(features), min(queries, len(features)), False)
    )
    rows = np.asarray(features)
    found = ExactIndex(rows).search(rows[chosen], k + 1)
    tiles = []
    for place, query in enumerate(chosen.tolist()):
        line = [Tile(images[query], "query")]
        others = [
            (i, s)
            for i, s in zip(found.indices[place].tolist(), found.scores[place], strict=True)
            if i != query
        ]
        for index, score in others[:k]:
            right = None if labels is None else bool(labels[index] == labels[query])
            line.append(Tile(images[index], f"{score:.3f}", right))
        tiles.append(line)
    write_sheet(path, tiles)

"""What int8 changed: features, verification rates and retrieval, float against int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landmark_distill.retrieval import retrieval
from shared_core.metrics import verification_rates

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def compare_features(
    exact: NDArray[Any],
    rounded: NDArray[Any],
    labels: Mapping[str, NDArray[np.int64]] | None,
    *,
    far_targets: Sequence[float] = FARS,
) -> dict[str, Any]:
    """Compare two networks' features of the same images.

    Targets that would allow less than one false accept among the impostor pairs say nothing about
    this many images and are left out.

    Args:
        exact, rounded: unit rows ``(N, D)``, of float32 and int8.
        labels: truth -> class of each image; None compares the features only. A truth without a
            genuine or an impostor pair is left out.

    Returns:
        ``cosine_mean`` and ``cosine_min`` between the two features of an image, and for each truth
        ``far_targets``, ``float`` and ``int8`` with ``rates`` and retrieval metrics.
    """
    if exact.shape != rounded.shape:
        raise ValueError(f"features have shapes {exact.shape} and {rounded.shape}")
    cosines = (exact.astype(np.float64) * rounded.astype(np.float64)).sum(axis=1)
    report: dict[str, Any] = {
        "images": len(exact),
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "truths": {},
    }
    pairs = len(exact) * (len(exact) - 1) // 2
    for name, codes in (labels or {}).items():
        _, sizes = np.unique(codes, return_counts=True)
        genuine = int((sizes * (sizes - 1) // 2).sum())
        if not 0 < genuine < pairs:
            continue
        targets = [far for far in far_targets if far * (pairs - genuine) >= 1]
        row: dict[str, Any] = {"far_targets": targets, "genuine_pairs": genuine}
        for kind, features in (("float", exact), ("int8", rounded)):
            found = retrieval(features, codes, ks=(1, 5)).as_dict()
            rates: list[float] = []
            if targets:
                tested = verification_rates(features, {name: codes}, far_targets=targets)
                rates = tested[name].rates.tolist()
            row[kind] = {"rates": rates, **found}
        report["truths"][name] = row
    return report


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report for a terminal."""
    out = [
        f"int8 against float on {report['images']} images: cosine {report['cosine_mean']:.4f} on "
        f"average, {report['cosine_min']:.4f} at least"
    ]
    for name, row in report["truths"].items():
        a, b = row["float"], row["int8"]
        out.append(
            f"  {name}: recall@1 {a['recall_at_1']:.4f} -> {b['recall_at_1']:.4f}, "
            f"mAP@R {a['map_at_r']:.4f} -> {b['map_at_r']:.4f}"
        )
        out += [
            f"  {name}: rate at FAR {far:.0e} {x:.5f} -> {y:.5f}"
            for far, x, y in zip(row["far_targets"], a["rates"], b["rates"], strict=True)
        ]
    return out

"""The open-set test: verification at eight false-accept rates, coarse and fine; retrieval."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]
if __name__ == "__main__":  # before NumPy: threads that hardly spin while they wait
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landmark_distill.contact_sheet import Tile, write_sheet
from landmark_distill.feature_store import FeatureStore, open_store
from landmark_distill.masks import Truth, folder_labels, read_truth
from landmark_distill.openset_original import histogram_rates
from landmark_distill.retrieval import Retrieval, retrieval
from landmark_distill.roc_plot import plot_roc
from landmark_distill.search_exact import ExactIndex
from shared_core.checkpoints import atomic_write
from shared_core.metrics import PairMask, Verification, verification_rates
from shared_core.runs import UsageError, run_command

FAR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
VARIANTS = ("exact", "original")
CURVE = tuple(10.0 ** (-n / 3) for n in range(3, 25))  # three a decade, 1e-1 to 1e-8
RESULT_FILE, ROC_FILE, SHEET_FILE = "openset.json", "openset_roc.png", "openset_nearest.png"


@dataclass(frozen=True)
class OpenSetResult:
    """What the test found; rates are fractions of the genuine pairs."""

    far_targets: tuple[float, ...]
    variant: str
    rates: dict[str, list[float]]  # truth -> one rate for each target
    verification: dict[str, Verification]  # empty for the variant ``original``
    curves: dict[str, Verification]  # for the plot; empty unless asked for
    retrieval: dict[str, Retrieval]

    def line(self) -> str:
        """What ``record.txt`` says."""
        shown = "--".join(
            f"{name}grained:[{', '.join(f'{rate:.5f}' for rate in self.rates[name])}]"
            for name in ("coarse", "fine")
            if name in self.rates
        )
        return f"test acc: {shown}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        out: dict[str, Any] = {
            "variant": self.variant,
            "far_targets": list(self.far_targets),
            "rates": self.rates,
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
        rates = histogram_rates(features, truths, far_targets=targets, block=block)
    else:
        asked = targets + (CURVE if curve else ())
        every = verification_rates(features, truths, far_targets=asked, block=block)
        found = {name: _some(one, slice(len(targets))) for name, one in every.items()}
        curves = every if curve else {}
        rates = {name: one.rates.tolist() for name, one in found.items()}
    retrieved = {
        name: retrieval(features, truth, ks=ks)
        for name, truth in truths.items()
        if ks and not isinstance(truth, PairMask)
    }
    return OpenSetResult(targets, variant, rates, found, curves, retrieved)


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


# -- the command ----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="openset.py",
        description="Verification rates of a feature file at given false-accept rates, over all "
        "pairs; retrieval metrics, ROC and a sheet of nearest neighbours.",
        epilog="Truths: labels (.npy of whole numbers, text with a label a line, an image list "
        "with tabs) or a mask over the pairs (.npy of 0 and 1). Without them the folders of the "
        "images tell, as embed.py wrote them down.",
    )
    p.add_argument(
        "features", type=Path, metavar="FEATURES", help="opensetFeat.npy, or of embed.py"
    )
    p.add_argument("--coarse", type=Path, metavar="FILE", help="truth: same landmark")
    p.add_argument("--fine", type=Path, metavar="FILE", help="truth: same spot")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="default: beside the features")
    p.add_argument("--far", type=float, nargs="+", default=list(FAR_TARGETS), metavar="F")
    p.add_argument(
        "--variant",
        choices=VARIANTS,
        default="exact",
        help="exact thresholds, or the original's histogram of 2,000 bins",
    )
    p.add_argument("--k", type=int, nargs="+", default=[1, 5, 10], help="of recall@k")
    p.add_argument("--no_retrieval", action="store_true", help="verification only")
    p.add_argument("--roc", action="store_true", help=f"draw {ROC_FILE}")
    p.add_argument("--sheet", type=int, metavar="N", help=f"draw {SHEET_FILE} with N queries")
    return p


def _truths(args: argparse.Namespace, store: FeatureStore) -> dict[str, Truth]:
    count = len(store.features)
    named = {"coarse": args.coarse, "fine": args.fine}
    truths = {name: read_truth(path, count) for name, path in named.items() if path is not None}
    if truths:
        return truths
    if not store.facts:
        raise UsageError(
            f"{args.features} has no list of paths beside it: expected --coarse or --fine"
        )
    found = folder_labels(store.paths)
    return found if (found["coarse"] != found["fine"]).any() else {"fine": found["fine"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test. Returns the exit code."""
    args = build_parser().parse_args(argv)
    if not all(0 <= far <= 1 for far in args.far):
        raise UsageError(f"--far {' '.join(map(str, args.far))}: expected fractions in [0, 1]")
    if min(args.k) < 1:
        raise UsageError(f"--k {min(args.k)}: expected numbers from 1")
    if args.sheet is not None and args.sheet < 1:
        raise UsageError(f"--sheet {args.sheet}: expected at least 1")
    if args.roc and args.variant != "exact":
        raise UsageError("--roc draws exact rates: expected --variant exact with it")
    store = open_store(args.features)
    truths = _truths(args, store)
    result = openset_test(
        store.features,
        truths,
        far_targets=args.far,
        variant=args.variant,
        curve=args.roc,
        ks=() if args.no_retrieval else args.k,
    )
    folder = args.output or args.features.parent
    about = {"features": str(args.features), "images": len(store.features)}
    write_results(folder, result, more=about)
    if args.sheet:
        fine = truths.get("fine", truths.get("coarse"))
        images = [store.image(row) for row in range(len(store.features))]
        labels = None if isinstance(fine, PairMask) else fine
        nearest_sheet(folder / SHEET_FILE, store.features, images, labels, queries=args.sheet)
    _print(result)
    print(f"written: {folder / RESULT_FILE}")
    return 0


def _print(result: OpenSetResult) -> None:
    names = list(result.rates)
    print(f"{'FAR':>8}  " + "  ".join(f"{name:>9}" for name in names))
    for place, target in enumerate(result.far_targets):
        rates = "  ".join(f"{result.rates[name][place]:9.5f}" for name in names)
        print(f"{target:8.0e}  {rates}")
    for name, one in result.retrieval.items():
        recall = ", ".join(f"recall@{k} {value:.4f}" for k, value in one.recall.items())
        print(
            f"{name}: {recall}, mAP {one.mean_average_precision:.4f}, "
            f"mAP@R {one.mean_average_precision_at_r:.4f} ({one.queries} queries)"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The command of the open-set test: verification rates and retrieval of a feature file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from landmark_distill.config import FAR_TARGETS, VARIANTS
from shared_core.runs.command import UsageError, run_command
from shared_core.runs.numbers import FRACTION, SIZE
from shared_core.runs.options import CommandParser

if TYPE_CHECKING:
    from landmark_distill.gallery.features import FeatureStore
    from landmark_distill.images.truths import Truth
    from landmark_distill.judging.judge import OpenSetResult


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="openset.py",
        description="Verification rates of a feature file at given false-accept rates, over all "
        "pairs; retrieval metrics, ROC and a sheet of nearest neighbours.",
        epilog="Truths: labels (.npy of whole numbers, text with a label a line, an image list "
        "with tabs) or a mask over the pairs (.npy of 0 and 1). Without them the folders of the "
        "images tell, as embed.py wrote them down. A rate that so few pairs cannot show is -.",
    )
    one = p.add_argument
    one("features", type=Path, metavar="FEATURES", help="opensetFeat.npy, or a file of embed.py.")
    one("--coarse", type=Path, metavar="FILE", help="The truth: same landmark.")
    one("--fine", type=Path, metavar="FILE", help="The truth: same spot.")
    one("--output", type=Path, metavar="DIR", help="The folder of the results. Without it that "
        "of the features.")  # fmt: skip
    one("--far", type=FRACTION, nargs="+", default=FAR_TARGETS, metavar="F",
        help="The false-accept rates.")  # fmt: skip
    one("--variant", choices=VARIANTS, default="exact",
        help="Exact thresholds, or the original's histogram of 2,000 bins.")  # fmt: skip
    one("--k", type=SIZE, nargs="+", default=[1, 5, 10], help="The ranks of recall@k.")
    one("--no_retrieval", action="store_true", help="Verify only.")
    one("--roc", action="store_true", help="Draw the ROC, openset_roc.png.")
    one("--sheet", type=SIZE, metavar="N", help="Draw N queries with their nearest neighbours, "
        "openset_nearest.png.")  # fmt: skip
    return p


def _truths(args: argparse.Namespace, store: FeatureStore) -> dict[str, Truth]:
    from landmark_distill.images.truths import folder_truths, read_truth

    count = len(store.features)
    named = {"coarse": args.coarse, "fine": args.fine}
    truths = {name: read_truth(path, count) for name, path in named.items() if path is not None}
    if truths:
        return truths
    if not store.facts:
        raise UsageError(
            f"{args.features} has no list of paths beside it: expected --coarse or --fine"
        )
    return dict(folder_truths(store.paths))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test. Returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.roc and args.variant != "exact":
        raise UsageError("--roc draws exact rates: expected --variant exact with it")
    from landmark_distill.gallery.features import open_store
    from landmark_distill.images.truths import PairMask
    from landmark_distill.judging import judge

    store = open_store(args.features)
    truths = _truths(args, store)
    result = judge.openset_test(
        store.features,
        truths,
        far_targets=args.far,
        variant=args.variant,
        curve=args.roc,
        ks=() if args.no_retrieval else args.k,
    )
    folder = args.output or args.features.parent
    about = {"features": str(args.features), "images": len(store.features)}
    judge.write_results(folder, result, more=about)
    if args.sheet:
        fine = truths.get("fine", truths.get("coarse"))
        images = [store.image(row) for row in range(len(store.features))]
        labels = None if isinstance(fine, PairMask) else fine
        sheet = folder / judge.SHEET_FILE
        judge.nearest_sheet(sheet, store.features, images, labels, queries=args.sheet)
    _print(result)
    print(f"written: {folder / judge.RESULT_FILE}")
    return 0


def _print(result: OpenSetResult) -> None:
    names = list(result.rates)
    print(f"{'FAR':>8}  " + "  ".join(f"{name:>9}" for name in names))
    columns = [result.shown(name) for name in names]
    for target, rates in zip(result.far_targets, zip(*columns, strict=True), strict=True):
        print(f"{target:8.0e}  " + "  ".join(f"{rate:>9}" for rate in rates))
    for name, one in result.retrieval.items():
        recall = ", ".join(f"recall@{k} {value:.4f}" for k, value in one.recall.items())
        print(
            f"{name}: {recall}, mAP {one.mean_average_precision:.4f}, "
            f"mAP@R {one.mean_average_precision_at_r:.4f} ({one.queries} queries)"
        )


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())

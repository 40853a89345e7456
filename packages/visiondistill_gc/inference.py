"""Classify image files with a finished model; ``--help`` lists the options."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]
if __name__ == "__main__":  # before the framework: threads that wait without spinning
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle warns about things nobody can change

import argparse
import csv
import json
from collections.abc import Sequence
from typing import Any

from shared_core import datasets
from shared_core.checkpoints import atomic_write
from shared_core.runs import UsageError, run_command
from visiondistill_gc.deploy_images import list_images
from visiondistill_gc.deploy_model import RUNTIMES, Classifier, load_classifier, top_classes
from visiondistill_gc.inference_show import Shower, has_display


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="inference.py",
        description="Classify image files with a finished model.",
        epilog="Exit code: 0, or 1 when an image could not be read (the others are classified all "
        "the same), 2 for options that do not fit.",
    )
    p.add_argument(
        "--model_path",
        type=Path,
        required=True,
        metavar="MODEL",
        help="a .pdparams file of this project (models_saved/best_model_fold0.pdparams), or a "
        "folder that export.py wrote",
    )
    p.add_argument(
        "--image_path",
        type=Path,
        required=True,
        metavar="PATH",
        help="an image, or a folder of them",
    )
    p.add_argument(
        "--categories",
        nargs="+",
        metavar="NAME",
        help="the classes in the order of training; they come with the model, so this only checks "
        "that you mean the same",
    )
    p.add_argument("--use_gpu", action="store_true", help="run on the GPU; an error without one")
    p.add_argument(
        "--show",
        action="store_true",
        help="show each image with its prediction: in a window, or without a display as a picture "
        "in --show_dir",
    )
    p.add_argument(
        "--show_dir",
        type=Path,
        metavar="FOLDER",
        help="write the pictures of --show there, window or not (default without a display: "
        "inference_results)",
    )
    p.add_argument("--batch_size", type=at_least(1), default=16, help="images a batch (default 16)")
    p.add_argument("--top_k", type=at_least(1), default=3, help="classes to name (default 3)")
    p.add_argument(
        "--runtime",
        choices=("auto", *RUNTIMES),
        default="auto",
        help="what runs an exported folder (default: ONNX Runtime where there is a file for it)",
    )
    p.add_argument("--threads", type=at_least(1), default=1, help="of an exported model")
    p.add_argument(
        "--num_workers", type=at_least(0), default=2, help="decoding threads (default 2)"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything there as JSON")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write a row an image there")
    return p


def at_least(low: int) -> Any:
    """A parser of whole numbers from ``low``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {low}")
        return int(text)

    return parse


def predict(
    classifier: Classifier,
    paths: Sequence[Path],
    *,
    batch_size: int = 16,
    top_k: int = 3,
    num_workers: int = 0,
) -> tuple[list[dict[str, Any]], list[tuple[Path, str]]]:
    """Classify image files.

    Returns:
        For each readable file, in order: ``path``, ``class``, ``probability``, ``top`` (class and
        probability, best first) and ``probabilities`` in the order of the classes. And the files
        that could not be read, each with the reason.
    """
    images = datasets.ImageSet(list(paths), [0] * len(paths))
    loader = datasets.BatchLoader(
        images,
        view=classifier.view,
        batch_size=batch_size,
        threads=num_workers,
        on_error="skip",
    )
    names = classifier.description.class_names
    rows = []
    for batch in loader:
        for index, p in zip(batch.indices, classifier.probabilities(batch.images), strict=True):
            top = top_classes(p, names, top_k)
            row = {"path": str(paths[index]), **top[0], "top": top, "probabilities": p.tolist()}
            rows.append(row)
    return rows, [(Path(one.name), one.reason) for one in loader.skipped]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A row an image: path, class, probability, then the probability of every class."""

    def write(scratch: Path) -> None:
        with scratch.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "class", "probability", *(f"p({name})" for name in names)])
            for row in rows:
                table.writerow(
                    [row["path"], row["class"], row["probability"], *row["probabilities"]]
                )

    atomic_write(path, write)


def _check(args: argparse.Namespace) -> None:
    for target in (args.json, args.csv):
        if target is not None and (target.is_dir() or not target.absolute().parent.is_dir()):
            raise UsageError(f"{target}: expected a file in a folder that exists")
    if args.show_dir is not None and not args.show:
        raise UsageError(f"--show_dir {args.show_dir} says where pictures go: expected --show too")
    if args.show_dir is not None and args.show_dir.exists() and not args.show_dir.is_dir():
        raise UsageError(f"--show_dir {args.show_dir} is a file, expected a folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Classify, print, write, show. Returns the exit code."""
    args = build_parser().parse_args(argv)
    _check(args)
    found = list_images(args.image_path)
    classifier = load_classifier(
        args.model_path,
        categories=args.categories,
        runtime=args.runtime,
        use_gpu=args.use_gpu,
        threads=args.threads,
    )
    names = classifier.description.class_names
    rows, unreadable = predict(
        classifier,
        found.files,
        batch_size=args.batch_size,
        top_k=min(args.top_k, len(names)),
        num_workers=args.num_workers,
    )
    bad = found.bad + unreadable
    for path in found.other:
        print(f"skipped: {path}: not named like an image", file=sys.stderr)
    for path, reason in bad:
        said = reason if str(path) in reason else f"{path}: {reason}"
        print(f"unreadable: {' '.join(said.split())}", file=sys.stderr)
    for row in rows:
        others = ", ".join(f"{o['class']} {o['probability']:.4f}" for o in row["top"][1:])
        print(
            f"[{row['path']}] --> Predicted: {row['class']}, Confidence: {row['probability']:.4f}"
            + (f" ({others})" if others else "")
        )
    if args.image_path.is_dir():
        print(f"Processed {len(rows)} images in directory: {args.image_path}")
        if not rows and not bad:
            raise FileNotFoundError(f"{args.image_path} holds no image, expected at least one")
    if args.json:
        content = {
            "model": str(args.model_path),
            "runtime": classifier.runtime,
            "class_names": list(names),
            "images": rows,
            "bad": [{"path": str(path), "reason": reason} for path, reason in bad],
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        atomic_write(args.json, lambda path: path.write_text(text, encoding="utf-8"))
    if args.csv:
        _write_csv(args.csv, rows, names)
    if args.show:
        with Shower(args.show_dir, window=args.show_dir is None and has_display()) as shower:
            for row in rows:
                shower.show(row)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_command(main))

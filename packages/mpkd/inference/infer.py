"""Classify one image, a folder, paths from standard input, or images over HTTP; see ``--help``."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch; see main.py
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import torch

from mpkd.inference.backends import BACKENDS, Classifier, load_classifier
from shared_core.checkpoints import atomic_write
from shared_core.datasets import DecodeError
from shared_core.datasets.finding.scan import is_image_name
from shared_core.runs import UsageError, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="infer.py",
        description="Classify images with a trained student, prepared as validation prepares them.",
        epilog="Exit code: 0, or 1 when an image could not be read (the others are answered all "
        "the same), 2 for options that do not fit.",
    )
    p.add_argument("model", type=Path, help=".pth, .onnx, .xml, or a run's export folder")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, metavar="FILE", help="one image")
    what.add_argument("--dir", type=Path, metavar="FOLDER", help="every image below a folder")
    what.add_argument(
        "--stdin", action="store_true", help="a path a line in, a line of JSON out, until the end"
    )
    what.add_argument(
        "--http", metavar="HOST:PORT", help="answer POST /predict; port 0: a free one"
    )
    p.add_argument("--backend", choices=BACKENDS, default="auto")
    p.add_argument("--device", default="cpu", help="of torch: cpu, cuda, cuda:1")
    p.add_argument(
        "--threads", type=int, help="of the CPU (default: 1; with torch all that it takes)"
    )
    p.add_argument("--batch", type=int, help="--dir: images a batch (default: 64)")
    p.add_argument("--top", type=int, help="classes to name (default: 3); not in a CSV")
    to = p.add_mutually_exclusive_group()
    to.add_argument("--csv", type=Path, metavar="FILE", help="--dir: write a row an image there")
    to.add_argument("--json", type=Path, metavar="FILE", help="--dir: write everything there")
    p.add_argument("--max-mb", type=float, help="--http: of a request (default: 10)")
    return p


def predict(
    classifier: Classifier, paths: Iterable[Path], *, batch: int = 64, top: int = 3
) -> Iterator[dict[str, Any]]:
    """Answers in order: ``path`` with class, probability and top, or with ``error``."""
    waiting: list[tuple[Path, Any]] = []

    def flush() -> Iterator[dict[str, Any]]:
        good = [image for _, image in waiting if not isinstance(image, str)]
        rows = iter(classifier.probabilities(good) if good else ())
        for path, image in waiting:
            if isinstance(image, str):
                yield {"path": str(path), "error": image}
            else:
                yield {"path": str(path), **classifier.answer(next(rows), top=top)}
        waiting.clear()

    for path in paths:
        try:
            waiting.append((path, classifier.open(str(path))))
        except (DecodeError, OSError) as error:
            waiting.append((path, " ".join(str(error).split())))
        if len(waiting) >= batch:
            yield from flush()
    yield from flush()


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All answers as CSV or, by the name's ending, JSON; all of it or nothing."""
    if path.suffix == ".json":
        text = json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n"
    else:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["path", "class", "probability", "error"])
        for row in rows:
            cells = (row.get(key, "") for key in ("path", "class", "probability", "error"))
            writer.writerow(list(cells))
        text = out.getvalue()
    atomic_write(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def folder_images(folder: Path) -> list[Path]:
    """Every image file below a folder, sorted.

    Raises:
        FileNotFoundError: no folder, or none in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--dir {folder}: there is no such folder")
    found = sorted(p for p in folder.rglob("*") if is_image_name(p.name))
    if not found:
        raise FileNotFoundError(f"--dir {folder}: no image below it")
    return found


def answer_lines(classifier: Classifier, lines: TextIO, out: TextIO, *, top: int) -> int:
    """A path a line in, a line of JSON out at once; the number that could not be read."""
    failed = 0
    for line in lines:
        text = line.strip()
        if not text:
            continue
        (row,) = predict(classifier, [Path(text)], top=top)
        failed += "error" in row
        print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
    return failed


def _check(args: argparse.Namespace) -> None:
    for name in ("batch", "top", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    if args.max_mb is not None and not args.max_mb > 0:
        raise UsageError(f"--max-mb is {args.max_mb}, expected more than 0")
    if args.batch is not None and args.dir is None:
        raise UsageError("--batch is for --dir")
    if args.max_mb is not None and args.http is None:
        raise UsageError("--max-mb is for --http")
    if args.top is not None and args.csv is not None:
        raise UsageError("--top: a CSV holds the best class alone, expected --json")
    for name, suffix in (("csv", ".csv"), ("json", ".json")):
        target = getattr(args, name)
        if target is not None and args.dir is None:
            raise UsageError(f"--{name} is for --dir")
        if target is not None and target.suffix != suffix:
            raise UsageError(f"--{name} {target}: expected a name that ends in {suffix}")


def main(argv: Sequence[str] | None = None) -> int:
    """Classify what is asked for. Returns the exit code."""
    args = build_parser().parse_args(argv)
    _check(args)
    classifier = load_classifier(
        args.model, backend=args.backend, device=args.device, threads=args.threads or 1
    )
    if args.threads is not None and classifier.backend == "torch":
        torch.set_num_threads(args.threads)
    top = args.top or 3
    if args.http is not None:
        from mpkd.inference.server import serve

        serve(classifier, args.http, top=top, max_bytes=int((args.max_mb or 10.0) * 2**20))
        return 0
    if args.stdin:
        return int(answer_lines(classifier, sys.stdin, sys.stdout, top=top) > 0)
    paths = [args.image] if args.image is not None else folder_images(args.dir)
    rows, failed = [], 0
    for row in predict(classifier, paths, batch=args.batch or 64, top=top):
        failed += "error" in row
        rows.append(row)
        if "error" in row:
            print(f"error: {row['path']}: {row['error']}", file=sys.stderr)
        elif args.csv is None and args.json is None:
            named = ", ".join(f"{one['class']} {one['probability']:.4f}" for one in row["top"])
            print(f"{row['path']}: {named}")
    target = args.csv or args.json
    if target is not None:
        write_rows(target, rows)
        print(f"{len(rows)} images, {failed} not read: {target}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run_command(main))

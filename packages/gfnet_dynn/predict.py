"""Classify image files: class, probability, exit taken and time; ``--help`` lists the options."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch; see main.py
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse
import csv
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gfnet_dynn.finished_model import (
    Classifier,
    add_policy_options,
    choose_policy,
    list_images,
    load_classifier,
)
from gfnet_dynn.model_files import choose_device
from gfnet_dynn.models.exit_policy import ExitPolicy
from shared_core import metrics
from shared_core.checkpoints import atomic_write
from shared_core.runs import UsageError, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="predict.py",
        description="Classify image files with a finished model; easy images leave it early.",
        epilog="Exit code: 0, or 1 when a file could not be read (the others are classified all "
        "the same), 2 for options that do not fit.",
    )
    p.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a .pth file of this project (RUN/checkpoint/best/*.pth, or a plain backbone or "
        "student), or a folder that export_model.py wrote",
    )
    p.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="image files, or folders of them"
    )
    add_policy_options(p, may_skip=True)
    p.add_argument("--batch", type=_at_least(1), default=64, help="images a batch (default 64)")
    p.add_argument("--top", type=_at_least(1), default=3, help="classes to name (default 3)")
    to = p.add_mutually_exclusive_group()
    to.add_argument("--json", type=Path, metavar="FILE", help="write everything there as JSON")
    to.add_argument("--csv", type=Path, metavar="FILE", help="write a row an image there")
    p.add_argument(
        "--num_workers",
        type=_at_least(0),
        default=2,
        help="decoding threads beside the network; 0 decodes between batches: steadier times",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (.pth files)")
    return p


def _at_least(low: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {low}")
        return int(text)

    return parse


def predict(
    classifier: Classifier,
    paths: Sequence[Path],
    policy: ExitPolicy | None,
    *,
    batch: int = 64,
    top: int = 3,
    threads: int = 0,
) -> tuple[list[dict[str, Any]], list[tuple[Path, str]]]:
    """Classify image files.

    Args:
        classifier: of :func:`gfnet_dynn.finished_model.load_classifier`.
        policy: None runs everything to the final head.
        batch: images a batch.
        top: how many classes to name.
        threads: that decode.

    Returns:
        For each readable file, in order: ``path``, ``class``, ``probability`` (after the exit's
        temperature), ``top`` (class and probability, best first), ``exit_index`` in 0..G,
        ``exit_block`` (None: final head), ``macs``, ``ms`` (its share of the batch's time, decoding
        not included). And the files that could not be read, each with the reason.
    """
    description = classifier.description
    loader = description.loader(paths, batch=batch, threads=threads)
    normalize = description.normalizer(classifier.device)
    calibrated = policy
    if policy is None and description.policy is not None:
        calibrated = ExitPolicy.from_state(description.policy)  # the final head's temperature
    first = torch.zeros(min(batch, len(paths)), 3, *description.input_size)
    classifier.classify(first.to(classifier.device), None)  # the first pass costs more
    blocks = (*description.exits, None)
    rows = []
    for item in loader:
        start = time.perf_counter()
        logits, left = classifier.classify(normalize(item.images), policy)
        ms = 1e3 * (time.perf_counter() - start) / len(item)
        for place, index in enumerate(item.indices):
            exit_index = int(left[place])
            temperature = calibrated.temperature(exit_index) if calibrated else 1.0
            p = metrics.softmax(logits[place : place + 1], temperature=temperature)[0]
            best = np.argsort(-p, kind="stable")[:top]
            named = [
                {"class": description.class_names[k], "probability": float(p[k])} for k in best
            ]
            cost = classifier.full_cost if policy is None else description.costs[exit_index]
            rows.append(
                {
                    "path": str(paths[index]),
                    **named[0],
                    "top": named,
                    "exit_index": exit_index,
                    "exit_block": blocks[exit_index],
                    "macs": cost,
                    "ms": ms,
                }
            )
    return rows, [(Path(one.name), one.reason) for one in loader.skipped]


def summarise(
    rows: Sequence[dict[str, Any]], *, full_cost: float, bad: int, seconds: float
) -> dict[str, Any]:
    """Counts, mean cost in MACs and as a share of ``full_cost``, and images a second.

    Args:
        full_cost: MACs of a run to the final head past all exits.
        seconds: in all, decoding included.
    """
    if not rows:
        return {"images": 0, "unreadable": bad}
    cost = float(np.mean([row["macs"] for row in rows]))
    network = sum(row["ms"] for row in rows) / 1e3
    return {
        "images": len(rows),
        "unreadable": bad,
        "mean_macs": cost,
        "macs_fraction": cost / full_cost,
        "images_per_second": len(rows) / network,
        "images_per_second_with_decoding": len(rows) / seconds,
    }


def exit_name(row: dict[str, Any]) -> str:
    """Where an image left."""
    return "final" if row["exit_block"] is None else f"block {row['exit_block']}"


def _print(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    width = max((len(row["path"]) for row in rows), default=0)
    classes = max((len(row["class"]) for row in rows), default=0)
    for row in rows:
        others = ", ".join(f"{o['class']} {o['probability']:.3f}" for o in row["top"][1:])
        print(
            f"{row['path']:<{width}}  {row['class']:<{classes}} {row['probability']:.3f}  "
            f"exit {exit_name(row):<8}  {row['ms']:.2f} ms" + (f"  ({others})" if others else "")
        )
    line = f"{summary['images']} images"
    if summary["unreadable"]:
        line += f", {summary['unreadable']} that could not be read"
    if rows:
        line += (
            f"; mean cost {summary['mean_macs'] / 1e6:.3g} M MACs an image, "
            f"{100 * summary['macs_fraction']:.1f} % of a full run; "
            f"{summary['images_per_second']:.1f} images a second, "
            f"{summary['images_per_second_with_decoding']:.1f} with decoding"
        )
    print(line)


def _write_csv(path: Path, rows: Sequence[dict[str, Any]], top: int) -> None:
    names = ["path", "class", "probability", "exit", "macs", "ms"]
    more = [f"{what}_{n}" for n in range(2, top + 1) for what in ("class", "probability")]

    def write(scratch: Path) -> None:
        with scratch.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(names + more)
            for row in rows:
                rest = [x for one in row["top"][1:] for x in (one["class"], one["probability"])]
                here = [row["path"], row["class"], row["probability"], exit_name(row)]
                table.writerow([*here, row["macs"], row["ms"], *rest])

    atomic_write(path, write)


def main(argv: Sequence[str] | None = None) -> int:
    """Classify, print, write. Returns the exit code."""
    args = build_parser().parse_args(argv)
    target = args.json or args.csv
    if target is not None and (target.is_dir() or not target.absolute().parent.is_dir()):
        raise UsageError(f"{target}: expected a file in a folder that exists")
    device = choose_device(args.device)
    classifier = load_classifier(args.model, device=device)
    description = classifier.description
    policy = choose_policy(args, description, args.model)
    files, bad = list_images(args.paths)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    if files:
        top = min(args.top, len(description.class_names))
        rows, unreadable = predict(
            classifier, files, policy, batch=args.batch, top=top, threads=args.num_workers
        )
        bad += unreadable
    seconds = time.perf_counter() - start
    summary = summarise(rows, full_cost=description.costs[-1], bad=len(bad), seconds=seconds)
    for path, reason in bad:
        said = reason if str(path) in reason else f"{path}: {reason}"
        print(f"unreadable: {' '.join(said.split())}", file=sys.stderr)
    _print(rows, summary)
    if args.json:
        content = {
            "model": str(args.model),
            "policy": None if policy is None else policy.state_dict(),
            "summary": summary,
            "images": rows,
            "bad": [{"path": str(path), "reason": reason} for path, reason in bad],
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        atomic_write(args.json, lambda path: path.write_text(text, encoding="utf-8"))
    if args.csv:
        _write_csv(args.csv, rows, min(args.top, len(description.class_names)))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The options of predict, evaluate and serve: one table, whole sentences, plain dataclasses.

A project's command adds the groups that it needs, with its own defaults and its first README's
spellings as aliases, and turns the parsed words into a dataclass at once: no Namespace goes
further. Nothing here loads more than argparse, because every ``--help`` passes through here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_core.runs.command import UsageError
from shared_core.runs.numbers import COUNT, POSITIVE, SIZE, WEIGHT, number
from shared_core.runs.options import Table, add_options, taken_from

RUNTIMES = ("onnx", "onnx-int8", "openvino")  # of the core; projects add their own
EXIT_KINDS = ("gate", "jei", "max_prob", "entropy", "margin", "patience")
STDIN = "-"


def _file(text: str) -> Path:
    """A file to write: in a folder that exists, and no folder itself."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected a file in a folder that exists")
    return path


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, or numbers with commas")
    return values


MODEL: Table = {
    "model": {
        "type": Path, "metavar": "MODEL",
        "help": "The finished model: the folder that an export wrote, one of its .onnx files, or "
        "a checkpoint that this command knows.",
    },
    "runtime": {
        "choices": ("auto", *RUNTIMES), "default": "auto",
        "help": "What computes. auto takes what the model's own record says is best.",
    },
    "threads": {
        "type": SIZE, "metavar": "N", "default": 1,
        "help": "How many CPU threads compute.",
    },
    "device": {
        "metavar": "NAME", "default": "cpu",
        "help": "Where to compute: cpu, cuda, cuda:1, or auto for a GPU where there is one.",
    },
}  # fmt: skip

PREDICT: Table = {
    "paths": {
        "nargs": "*", "metavar": "PATH",
        "help": "Images, folders of images, video files, or - for paths from standard input, one "
        "a line, each answered at once.",
    },
    "batch-size": {
        "type": SIZE, "metavar": "N", "default": 16,
        "help": "How many images go through the network at a time.",
    },
    "workers": {
        "type": COUNT, "metavar": "N", "default": 2,
        "help": "How many threads decode images beside the network. 0 decodes between batches.",
    },
    "top": {
        "type": SIZE, "metavar": "N", "default": 3,
        "help": "How many classes to name, the most probable first.",
    },
    "format": {
        "choices": ("text", "jsonl"), "default": "text",
        "help": "What to print: a line of text an image, or a line of JSON an image.",
    },
    "json": {
        "type": _file, "metavar": "FILE",
        "help": "Write all answers to this file when they are complete: as one JSON document, or "
        "as JSON lines if the name ends in .jsonl.",
    },
    "csv": {
        "type": _file, "metavar": "FILE",
        "help": "Write a row an image to this file when all are complete.",
    },
    "every-class": {
        "action": "store_true",
        "help": "Write the probability of every class to JSON and CSV, not of the best alone.",
    },
    "video": {
        "action": "append", "type": Path, "metavar": "FILE", "default": None,
        "help": "Classify the frames of this video.",
    },
    "camera": {
        "type": COUNT, "metavar": "N",
        "help": "Classify what camera number N sees, until Ctrl-C.",
    },
    "every": {
        "type": SIZE, "metavar": "N", "default": 1,
        "help": "Of a video or a camera, classify each Nth frame.",
    },
    "frames": {
        "type": COUNT, "metavar": "N", "default": 0,
        "help": "Of a video or a camera, stop after N frames. By default all are read.",
    },
    "show": {
        "action": "store_true",
        "help": "Show each image with its answer: in a window, where q ends it, or without a "
        "display as pictures in --show-dir.",
    },
    "show-dir": {
        "type": Path, "metavar": "DIR",
        "help": "Write each image with its answer as a picture to this folder, and a video as "
        "labelled.mp4.",
    },
}  # fmt: skip

EXITS: Table = {
    "policy-point": {
        "metavar": "NAME",
        "help": "Thresholds that the model's own run chose, by name: careful loses nothing on its "
        "calibration data, balanced at most what the run allowed, fast spends half the work. "
        "Without any of these options the model's own choice holds, usually balanced.",
    },
    "policy": {
        "choices": EXIT_KINDS,
        "help": "Another rule for leaving early. Without --threshold the run's balanced one of "
        "this kind holds.",
    },
    "no-exits": {
        "action": "store_true",
        "help": "Every image runs to the final head.",
    },
}  # fmt: skip
THRESHOLD: Table = {
    "threshold": {
        "type": _thresholds, "metavar": "T",
        "help": "An image leaves where its score reaches T: one number for all exits, or one an "
        "exit with commas, such as 0.5,0.6,0.7. It needs --policy.",
    },
}  # fmt: skip

EVALUATE: Table = {
    "data": {
        "type": Path, "metavar": "DATA",
        "help": "The folder with the labelled images: one folder a class, or train/, val/ and "
        "test/ with class folders in each.",
    },
    "split": {
        "type": Path, "metavar": "FILE",
        "help": "A manifest that says which images belong to which part. Without it a set with a "
        "test/ folder is judged on that, and any other on all its images.",
    },
    "part": {
        "metavar": "NAME", "default": "test",
        "help": "The part of the manifest, or the folder of the set, that is judged.",
    },
    "against": {
        "type": Path, "metavar": "MODEL",
        "help": "Another model that is asked the same images: how often both name the same class, "
        "and how far their probabilities differ.",
    },
    "batch-size": {
        "type": SIZE, "metavar": "N", "default": 32,
        "help": "How many images go through the network at a time.",
    },
    "workers": PREDICT["workers"],
    "latency-batches": {
        "type": SIZE, "nargs": "*", "metavar": "N", "default": (1,),
        "help": "The batch sizes whose time is measured. Give none to measure no time.",
    },
    "json": {
        "type": _file, "metavar": "FILE",
        "help": "Write every number to this file.",
    },
    "report": {
        "type": Path, "metavar": "DIR",
        "help": "Write evaluation.json, report.md and report.html to this folder.",
    },
}  # fmt: skip

SERVE: Table = {
    "host": {
        "metavar": "ADDRESS", "default": "127.0.0.1",
        "help": "The address to listen on.",
    },
    "port": {
        "type": number(int, 0, 65535), "metavar": "N", "default": 8080,
        "help": "The port to listen on. 0 takes a free one.",
    },
    "max-batch": {
        "type": SIZE, "metavar": "N", "default": 16,
        "help": "How many waiting images go through the network at a time at most.",
    },
    "max-wait-ms": {
        "type": WEIGHT, "metavar": "MS", "default": 2.0,
        "help": "How many milliseconds an image waits for company at most.",
    },
    "max-queue": {
        "type": SIZE, "metavar": "N", "default": 256,
        "help": "How many images may wait. A request that finds no room for all its images gets "
        "503, and none of them is computed.",
    },
    "max-mb": {
        "type": POSITIVE, "metavar": "MB", "default": 10.0,
        "help": "How many megabytes a request may have.",
    },
    "max-megapixels": {
        "type": POSITIVE, "metavar": "MP", "default": 40.0,
        "help": "How many megapixels an image may state, looked at before it is decoded.",
    },
    "max-files": {
        "type": SIZE, "metavar": "N", "default": 16,
        "help": "How many images a request may have.",
    },
    "max-requests": {
        "type": SIZE, "metavar": "N", "default": 64,
        "help": "How many requests may be open at the same time.",
    },
}  # fmt: skip


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and what computes it."""

    model: Path
    runtime: str = "auto"
    threads: int | None = 1  # None: all that the process may use
    device: str = "cpu"


def add_model_options(
    parser: argparse.ArgumentParser,
    *,
    runtimes: Sequence[str] = (),
    all_threads: bool = False,
    **how: Any,
) -> None:
    """``MODEL --runtime --threads --device``; see :func:`add_options`.

    Args:
        runtimes: further choices of ``--runtime`` that the project's openers know.
        all_threads: by default compute with all threads that the process may use, as a service
            does.
    """
    table = {**MODEL, "runtime": {**MODEL["runtime"], "choices": ("auto", *RUNTIMES, *runtimes)}}
    if all_threads:
        text = "How many CPU threads compute. By default all that this process may use."
        table["threads"] = {**MODEL["threads"], "default": None, "help": text}
    add_options(parser, table, positional=("model",), **how)


def model_options(args: argparse.Namespace) -> ModelOptions:
    """What :func:`add_model_options` parsed."""
    return taken_from(ModelOptions, args)


@dataclass(frozen=True)
class PredictOptions:
    """Which images are classified, and where the answers go."""

    paths: tuple[str, ...] = ()  # files, folders, videos, "-"
    batch_size: int = 16
    workers: int = 2  # threads that decode
    top: int = 3
    format: str = "text"  # printed: text or jsonl
    json: Path | None = None
    csv: Path | None = None
    every_class: bool = False
    videos: tuple[Path, ...] = ()
    camera: int | None = None
    every: int = 1  # frames
    frames: int = 0  # 0: all
    show: bool = False
    show_dir: Path | None = None


def add_predict_options(parser: argparse.ArgumentParser, **how: Any) -> None:
    """``PATH ... --batch-size --workers --top --format --json ...``; see :func:`add_options`."""
    add_options(parser, PREDICT, positional=("paths",), **how)


def predict_options(args: argparse.Namespace) -> PredictOptions:
    """What :func:`add_predict_options` parsed.

    Raises:
        UsageError: no images, or options that do not fit together.
    """
    paths = (*args.paths, *(getattr(args, "more_paths", None) or ()))
    videos = tuple(args.video or ())
    if not paths and not videos and args.camera is None:
        raise UsageError("nothing to classify: expected images, a folder, a video or -")
    if paths.count(STDIN) > 1:
        raise UsageError("- stands twice: standard input is read once")
    if args.show_dir is not None and args.show_dir.exists() and not args.show_dir.is_dir():
        raise UsageError(f"--show-dir {args.show_dir} is a file, expected a folder")
    args.paths, args.videos = paths, videos
    return taken_from(PredictOptions, args)


@dataclass(frozen=True)
class ExitOptions:
    """Who may leave a network with exits early; all unset: the model's own choice."""

    point: str | None = None
    kind: str | None = None
    thresholds: tuple[float, ...] | None = None
    none: bool = False  # everything runs to the final head

    @property
    def asked(self) -> bool:
        """Whether anything was asked for that only a model with exits has."""
        return self.point is not None or self.kind is not None


def add_exit_options(parser: argparse.ArgumentParser, *, without: Sequence[str] = ()) -> None:
    """``--policy-point``, ``--policy`` with ``--threshold``, and ``--no-exits``."""
    group = parser.add_argument_group("who may leave early (models with exits)")
    which = group.add_mutually_exclusive_group()
    add_options(which, EXITS, without=without)
    add_options(group, THRESHOLD)


def exit_options(args: argparse.Namespace) -> ExitOptions:
    """What :func:`add_exit_options` parsed.

    Raises:
        UsageError: a threshold without a rule.
    """
    if args.threshold is not None and args.policy is None:
        raise UsageError("--threshold alone says no rule: expected --policy KIND with it")
    return ExitOptions(args.policy_point, args.policy, args.threshold, bool(args.no_exits))


@dataclass(frozen=True)
class EvaluateOptions:
    """Which images a model is judged on, and where the numbers go."""

    data: Path
    split: Path | None = None
    part: str = "test"
    against: Path | None = None
    batch_size: int = 32
    workers: int = 2
    latency_batches: tuple[int, ...] = (1,)
    json: Path | None = None
    report: Path | None = None


def add_evaluate_options(parser: argparse.ArgumentParser, **how: Any) -> None:
    """``DATA --split --part --against --latency-batches ...``; see :func:`add_options`."""
    add_options(parser, EVALUATE, positional=("data",), **how)


def evaluate_options(args: argparse.Namespace) -> EvaluateOptions:
    """What :func:`add_evaluate_options` parsed."""
    return taken_from(EvaluateOptions, args)


@dataclass(frozen=True)
class ServeOptions:
    """Where a service listens, how it batches, and what a request may bring."""

    host: str = "127.0.0.1"
    port: int = 8080
    max_batch: int = 16
    max_wait_ms: float = 2.0
    max_queue: int = 256
    max_mb: float = 10.0
    max_megapixels: float = 40.0
    max_files: int = 16
    max_requests: int = 64


def add_serve_options(parser: argparse.ArgumentParser, **how: Any) -> None:
    """``--host --port --max-batch --max-queue ...``; see :func:`add_options`."""
    add_options(parser, SERVE, **how)


def serve_options(args: argparse.Namespace) -> ServeOptions:
    """What :func:`add_serve_options` parsed."""
    return taken_from(ServeOptions, args)

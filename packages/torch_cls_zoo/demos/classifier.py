"""Classify pictures, folders, a video or a webcam with an exported model; ``--help`` lists options.

python classifier.py jit_resnet18.pt photos/ --topk 3 --output labelled
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse
import time
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from shared_core.datasets import DecodeError, decode
from shared_core.runs import UsageError, run_command
from torch_cls_zoo.demos.drawing import draw_result
from torch_cls_zoo.demos.exported import Exported, load_exported

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="classifier.py",
        description="Classify pictures with a model that main.py --jit wrote. The most probable "
        "classes are printed, and drawn when --output or --show is given.",
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="jit_ARCH.pt or ARCH.onnx")
    p.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="files and folders")
    p.add_argument("--video", type=Path, metavar="FILE", help="classify the frames of a video")
    p.add_argument("--webcam", type=int, metavar="N", help="classify what camera N sees")
    p.add_argument("--topk", type=int, default=3, help="classes to name (3)")
    p.add_argument("--output", type=Path, metavar="DIR",
                   help="write labelled pictures, or labelled.mp4 of a video, here")  # fmt: skip
    p.add_argument("--show", action="store_true", help="show a window; q ends it")
    p.add_argument("--every", type=int, default=1, metavar="N", help="classify each Nth frame (1)")
    p.add_argument("--frames", type=int, default=0, metavar="N", help="stop after N frames (never)")
    p.add_argument("--threads", type=int, default=1, help="threads that compute (1)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Classify. Returns the exit code, 1 when a picture could not be read."""
    args = build_parser().parse_args(argv)
    _check(args)
    model = load_exported(args.model, threads=args.threads)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    if args.video is not None or args.webcam is not None:
        return _stream(model, args)
    return _pictures(model, args)


def _check(args: argparse.Namespace) -> None:
    sources = [bool(args.images), args.video is not None, args.webcam is not None]
    if sum(sources) != 1:
        raise UsageError(
            f"{sum(sources)} sources of pictures, expected one: files or folders, --video, --webcam"
        )
    for name in ("topk", "every", "threads"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}, expected 1 or more")
    if args.frames < 0:
        raise UsageError(f"--frames {args.frames}, expected 0 or more")
    if args.images and (args.frames or args.every != 1):
        raise UsageError("--frames and --every are for --video and --webcam")
    if (
        args.show
        and sys.platform == "linux"
        and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    ):
        raise UsageError("--show: there is no screen here; use --output")


def _files(sources: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Each picture, and the path that it gets below ``--output``."""
    for source in sources:
        if source.is_dir():
            inside = sorted(p for p in source.rglob("*") if p.suffix.lower() in ENDINGS)
            if not inside:
                raise FileNotFoundError(f"{source}: no picture in this folder")
            for path in inside:
                yield path, path.relative_to(source)
        elif source.is_file():
            yield source, Path(source.name)
        else:
            raise FileNotFoundError(f"{source}: no such file or folder")


def _pictures(model: Exported, args: argparse.Namespace) -> int:
    failed = 0
    for path, name in list(_files(args.images)):
        try:
            image = decode(path)
        except DecodeError as error:
            print(f"not read: {' '.join(str(error).split())}", file=sys.stderr)
            failed += 1
            continue
        ranked = model.classify(image, args.topk)
        print(f"{path}: " + ", ".join(f"{label} {share:.4f}" for label, share in ranked))
        if args.output is None and not args.show:
            continue
        drawn = draw_result(image, ranked)
        if args.output is not None:
            target = args.output / name.with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            done, data = cv2.imencode(".png", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            if not done:
                raise OSError(f"{target}: the picture could not be encoded")
            target.write_bytes(data.tobytes())
        if args.show and _shown(drawn, wait=0):
            break
    return 1 if failed else 0


def _stream(model: Exported, args: argparse.Namespace) -> int:
    source = str(args.video) if args.video is not None else args.webcam
    if args.video is not None and not args.video.is_file():
        raise FileNotFoundError(f"--video {args.video}: no such file")
    # What goes wrong is said below, in one line.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        what = f"--video {source}" if args.video is not None else f"--webcam {source}"
        raise OSError(f"{what}: cannot be opened, expected a video that OpenCV reads or a camera")
    writer: cv2.VideoWriter | None = None
    ranked: list[tuple[str, float]] = []
    number, seconds = 0, 0.0
    try:
        while not args.frames or number < args.frames:
            there, frame = capture.read()
            if not there:
                break
            image = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            if number % args.every == 0:
                start = time.perf_counter()
                ranked = model.classify(image, args.topk)
                seconds += time.perf_counter() - start
                print(f"frame {number}: " + ", ".join(f"{n} {p:.4f}" for n, p in ranked))
            number += 1
            if args.output is None and not args.show:
                continue
            drawn = draw_result(image, ranked)
            if args.output is not None:
                writer = writer or _writer(args.output, drawn, capture)
                writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            if args.show and _shown(drawn, wait=1):
                break
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if not number:
        raise OSError(f"{source}: gave no frame")
    looked = -(-number // args.every)
    print(f"{number} frames, {looked} classified, {seconds / looked * 1e3:.1f} ms each")
    return 0


def _writer(folder: Path, drawn: np.ndarray, capture: cv2.VideoCapture) -> cv2.VideoWriter:
    rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
    path, size = folder / "labelled.mp4", (drawn.shape[1], drawn.shape[0])
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise OSError(f"{path}: this OpenCV cannot write MPEG-4 video")
    return writer


def _shown(drawn: np.ndarray, *, wait: int) -> bool:
    """Show a picture; whether the user wants to stop."""
    try:
        cv2.imshow("classifier", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
        return cv2.waitKey(wait) & 0xFF == ord("q")
    except cv2.error as error:  # an OpenCV that was built without windows
        raise UsageError("--show: this OpenCV has no windows; use --output") from error


if __name__ == "__main__":
    sys.exit(run_command(main))

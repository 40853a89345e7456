"""Export the student alone: ONNX and ExportedProgram with the embedding as output, maybe int8."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]
if __name__ == "__main__":  # before torch: threads that hardly spin while they wait
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import io
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landmark_distill.compare_int8 import compare_features, lines
from landmark_distill.embedder import (
    DESCRIPTION_FILE,
    FORMAT,
    INT8_FILE,
    ONNX_FILE,
    PROGRAM_FILE,
    Embedder,
    ExportedEmbedder,
    TorchEmbedder,
    list_images,
)
from landmark_distill.masks import folder_labels
from landmark_distill.quantization import quantize_student
from shared_core.checkpoints import atomic_write
from shared_core.datasets import ImageSet
from shared_core.for_torch.export import ExportError, export_onnx
from shared_core.runs import UsageError, run_command
from shared_core.runs.numbers import number

FORMATS = ("onnx", "program")
BATCH = 16
OURS = re.compile(r"(student(_int8)?\.onnx|student\.pt2|model\.json)")


class Student(nn.Module):
    """Normalised images to unit-length embeddings."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N, D)``."""
        return nn.functional.normalize(self.encoder(image), dim=1)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="export_model.py",
        description="Write a student without teacher and head for use elsewhere. embed.py and "
        "search.py take the folder in place of a model file.",
        epilog="Files: student.onnx, student.pt2 (torch.export.load), with --int8 "
        "student_int8.onnx, and model.json, which says what images must look like. "
        "Needs: pip install './packages/landmark_distill[export]'",
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="max_acc.pth")
    p.add_argument(
        "output", type=Path, metavar="OUTPUT_FOLDER", help="new, empty, or an earlier export"
    )
    p.add_argument("--format", choices=(*FORMATS, "both"), default="both")
    p.add_argument("--opset", type=int, metavar="N", help="of ONNX, 18 or more (default: torch's)")
    p.add_argument("--int8", action="store_true", help="an int8 version, calibrated on images")
    p.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="images like those that will come, for --int8; every second one is kept out of it "
        "and judges. Class folders give verification rates and recall",
    )
    p.add_argument(
        "--most", type=number(int, 4, 10**9), default=1000, help="images of it to use (1000)"
    )
    return p


def export_program(
    model: nn.Module, path: Path, *, input_size: tuple[int, int, int], tolerance: float = 1e-4
) -> float:
    """Write a ``torch.export`` program with a free batch size; returns its largest difference.

    Raises:
        ExportError: the program, read again, gives other numbers.
    """
    model.eval()
    example = torch.zeros(2, *input_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        data = io.BytesIO()
        torch.export.save(program, data)
        data.seek(0)
        again = torch.export.load(data).module()
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        images = torch.randn(count, *input_size, generator=generator)
        with torch.no_grad():
            wanted, got = model(images), again(images)
        worst = max(worst, float((wanted - got).abs().max()))
    if not worst <= tolerance:
        raise ExportError(f"{path}: the program differs by {worst:.2e}, expected {tolerance:.0e}")
    atomic_write(path, lambda scratch: scratch.write_bytes(data.getvalue()))
    return worst


def features_of(embedder: Embedder, images: ImageSet) -> NDArray[np.float32]:
    """Unit rows of all images, ``(N, D)``."""
    loader = embedder.sight.loader(images, batch_size=BATCH, threads=2)
    return np.concatenate([embedder(batch.images) for batch in loader])


def calibration_images(folder: Path, most: int) -> list[Path]:
    """At most ``most`` images, chosen the same way each time.

    Raises:
        FileNotFoundError, ValueError: no folder, or fewer than four images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--calibration {folder} is not a folder")
    files, _ = list_images([folder])
    if len(files) < 4:
        raise ValueError(f"--calibration {folder} holds {len(files)} images, expected four or more")
    order = np.random.default_rng(0).permutation(len(files))[:most]
    return [files[i] for i in sorted(order.tolist())]


def _truths(files: Sequence[Path], folder: Path) -> dict[str, NDArray[np.int64]] | None:
    names = [path.relative_to(folder).as_posix() for path in files]
    if any("/" not in name for name in names):
        return None
    found = folder_labels(names)
    return found if (found["coarse"] != found["fine"]).any() else {"fine": found["fine"]}


def make_int8(
    folder: Path, source: Embedder, calibration: Path, most: int
) -> tuple[int, dict[str, Any]]:
    """Write the int8 file; returns the number of int8 layers and what they changed."""
    files = calibration_images(calibration, most)
    learn, judge = files[1::2], files[0::2]
    loader = source.sight.loader(ImageSet(learn, [0] * len(learn)), batch_size=BATCH, threads=2)
    batches = (batch.images.contiguous().numpy().copy() for batch in loader)
    layers = quantize_student(folder / ONNX_FILE, folder / INT8_FILE, batches)
    held = ImageSet(judge, [0] * len(judge))
    exact = features_of(source, held)
    rounded = features_of(ExportedEmbedder(folder, file=INT8_FILE), held)
    report = compare_features(exact, rounded, _truths(judge, calibration))
    report["bytes"] = {
        "float": (folder / ONNX_FILE).stat().st_size,
        "int8": (folder / INT8_FILE).stat().st_size,
    }
    return layers, report


def _prepare(folder: Path) -> None:
    """Make the folder, or empty it of an earlier export and of nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(folder.iterdir())
    if foreign := [path.name for path in present if not OURS.fullmatch(path.name)]:
        raise UsageError(
            f"{folder} holds {foreign[0]}, which no export wrote: expected a new or empty folder, "
            "or an earlier export"
        )
    for path in sorted(present, key=lambda path: path.suffix != ".json"):  # the description first
        path.unlink()


def _write_description(folder: Path, facts: dict[str, Any]) -> None:
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    atomic_write(folder / DESCRIPTION_FILE, lambda s: s.write_text(text, encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Export, check, write the description. Returns the exit code."""
    args = build_parser().parse_args(argv)
    with_onnx = args.format != "program"
    if args.opset is not None and (args.opset < 18 or not with_onnx):
        raise UsageError(f"--opset {args.opset}: expected 18 or more, and an ONNX file to write")
    if args.int8 != (args.calibration is not None):
        raise UsageError("--int8 and --calibration FOLDER: got one of them, expected both")
    if args.int8 and not with_onnx:
        raise UsageError("--int8 makes an ONNX file: expected --format onnx or both")
    needed = ("onnx", "onnxscript", "onnxruntime") if with_onnx else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ImportError(
            f"{missing[0]} is not installed: expected it for an export; "
            "pip install './packages/landmark_distill[export]'"
        )
    if args.int8:
        calibration_images(args.calibration, args.most)  # before the work: is it there?
    source = TorchEmbedder(args.model)
    student = Student(source.encoder)
    size = (3, source.sight.size, source.sight.size)
    _prepare(args.output)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "file": ONNX_FILE if with_onnx else PROGRAM_FILE,
        "architecture": source.architecture,
        "feature_dim": source.width,
        "output": "embedding, length 1",
        "sight": asdict(source.sight),
        "source": {"file": args.model.name, "sha256": source.weights},
        "parity": {},
    }
    said = []
    if with_onnx:
        # Attention spelled out: the fused kernel lays its result out as ONNX's version does not.
        with sdpa_kernel(SDPBackend.MATH):
            found = export_onnx(
                student,
                args.output / ONNX_FILE,
                input_size=size,
                output_names=("embedding",),
                opset=args.opset,
            )
        facts["parity"]["onnx"] = found.max_abs
        said.append(f"{ONNX_FILE} (differs from torch by at most {found.max_abs:.1e})")
    if args.format != "onnx":
        worst = export_program(student, args.output / PROGRAM_FILE, input_size=size)
        facts["parity"]["program"] = worst
        said.append(f"{PROGRAM_FILE} (by {worst:.1e})")
    _write_description(args.output, facts)
    print(f"{args.output}: {source.architecture}, {source.width} features; {', '.join(said)}")
    if args.int8:
        layers, report = make_int8(args.output, source, args.calibration, args.most)
        facts["int8"] = {"file": INT8_FILE, "layers": layers, "report": report}
        _write_description(args.output, facts)
        print("\n".join(lines(report)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Write a finished model as ONNX, for Paddle Inference, as int8; ``--help`` lists the options."""

# ruff: noqa: E402
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
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shared_core import datasets
from shared_core.checkpoints import atomic_write
from shared_core.datasets.finding.fingerprint import content_keys
from shared_core.runs import UsageError, run_command
from visiondistill_gc.deploy_images import labels_of, list_images
from visiondistill_gc.deploy_model import (
    DESCRIPTION_FILE,
    FILES,
    FORMAT,
    Classifier,
    Description,
    dygraph_network,
    import_paddle,
    load_classifier,
)
from visiondistill_gc.quantization import METHODS, compare, quantize_static

FORMATS = ("onnx", "paddle")
TOLERANCE = 1e-5  # relative difference from dygraph that every export must stay below ...
STEEP = 4.0  # ... or below this many times what the network makes of its own rounding
ROUNDINGS = 3  # trials of it
ENDS = np.array([-np.inf, np.inf], np.float32)
MOST_CALIBRATION = 512  # images of --calibration that are looked at
GENERATED = 16
BATCH = 16
OURS = re.compile(r"model\.json|student(-int8)?\.(onnx|json|pdiparams)|\..+\.tmp-\d+")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="export.py",
        description="Write a finished model for deployment: ONNX, Paddle Inference and int8, each "
        "checked against the model itself. inference.py and serve.py take the folder.",
        epilog=f"{DESCRIPTION_FILE} beside the networks holds classes, preprocessing, parity and "
        "the int8 report. Needs: pip install 'visiondistill_gc[export]'",
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="a .pdparams file of this project")
    p.add_argument(
        "output",
        type=Path,
        metavar="OUTPUT_FOLDER",
        help="a new or empty folder, or an earlier export, which is replaced",
    )
    p.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=list(FORMATS),
        help="what to write (default: both); onnx needs paddle2onnx, made for Python up to 3.12",
    )
    p.add_argument("--categories", nargs="+", metavar="NAME", help="must be the model's own")
    p.add_argument("--opset", type=int, default=17, metavar="N", help="of ONNX, 13 to 17 (default)")
    p.add_argument(
        "--int8",
        action="store_true",
        help="an int8 ONNX file as well, its ranges fixed on --calibration images",
    )
    p.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="images like those that will come, labels not needed; without --accuracy every second "
        "one is kept out of the calibration and judges",
    )
    p.add_argument(
        "--accuracy",
        type=Path,
        metavar="FOLDER",
        help="class folders to compare fp32 and int8 on; copies of calibration images are left out",
    )
    p.add_argument(
        "--int8-method", choices=METHODS, default=None, help="how ranges are found (default minmax)"
    )
    return p


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before anything is written."""
    if "onnx" in args.format:
        missing = [n for n in ("paddle2onnx", "onnx", "onnxruntime") if find_spec(n) is None]
        if missing and sys.version_info >= (3, 13):
            raise UsageError(
                f"--format onnx: {missing[0]} is not installed, and Paddle2ONNX has no release for "
                f"Python {sys.version_info[0]}.{sys.version_info[1]}; expected 3.10 to 3.12, or "
                "--format paddle"
            )
        if missing:
            raise ImportError(
                f"{missing[0]} is not installed: expected it for --format onnx; "
                "pip install './packages/visiondistill_gc[export]'"
            )
    elif args.int8:
        raise UsageError("--int8 makes an ONNX file: expected --format onnx with it")
    if not 13 <= args.opset <= 17:
        raise UsageError(f"--opset {args.opset}: expected 13 to 17")
    if args.int8 and args.calibration is None:
        raise UsageError("--int8 fixes its ranges on images: expected --calibration FOLDER with it")
    for name in ("calibration", "accuracy", "int8_method"):
        if getattr(args, name) is not None and not args.int8:
            raise UsageError(f"--{name.replace('_', '-')} is about int8: expected --int8 with it")
    for name in ("calibration", "accuracy"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"--{name} {folder} is not a folder")
    if args.model.is_dir():
        raise UsageError(f"{args.model} is a folder, expected a .pdparams file")
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"{args.output} is a file, expected a folder")


def _prepare(folder: Path) -> None:
    """Make the folder, or empty it of an earlier export and of nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(folder.iterdir(), key=lambda path: path.name)
    if foreign := [path.name for path in present if not OURS.fullmatch(path.name)]:
        raise UsageError(
            f"{folder} holds {foreign[0]}, which no export wrote: expected a new or empty folder, "
            "or an earlier export"
        )
    for path in sorted(present, key=lambda path: path.name != DESCRIPTION_FILE):  # that one first
        path.unlink()


def generated_images(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Smooth and noisy pictures ``(16, H, W, 3)`` to check numbers with, no data needed."""
    rng = np.random.default_rng(0)
    height, width = size
    coarse = rng.integers(0, 256, (GENERATED, 6, 6, 3)).astype(np.uint8)
    smooth = [cv2.resize(one, (width, height), interpolation=cv2.INTER_CUBIC) for one in coarse]
    noise = rng.normal(0, 1, (GENERATED, height, width, 3))
    noise *= rng.uniform(0, 40, (GENERATED, 1, 1, 1))
    return np.clip(np.stack(smooth) + noise, 0, 255).astype(np.uint8)


def loader_of(classifier: Classifier, paths: Sequence[Path]) -> datasets.BatchLoader:
    """Views of image files in batches; one that cannot be read is an error."""
    images = datasets.ImageSet(list(paths), [0] * len(paths))
    return datasets.BatchLoader(images, view=classifier.view, batch_size=BATCH, threads=2)


def _listed(folder: Path, what: str) -> list[Path]:
    """Image files in an order that is random and always the same."""
    found = list_images(folder)
    if found.bad:
        raise ValueError(f"--{what} {found.bad[0][0]}: {found.bad[0][1]}")
    order = np.random.default_rng(0).permutation(len(found.files))
    return [found.files[i] for i in order]


def split_images(
    calibration: Path, accuracy: Path | None, class_names: Sequence[str]
) -> tuple[list[Path], list[Path], list[int] | None]:
    """Files to calibrate on, files to judge on, and the labels of these where folders tell them.

    No image is in both: what judges is every second file, or ``accuracy`` without copies.
    """
    files = _listed(calibration, "calibration")
    least = 1 if accuracy else 2
    if len(files) < least:
        raise ValueError(
            f"--calibration {calibration} holds {len(files)} images, expected {least} or more"
        )
    if accuracy is None:
        judges = files[::2]
        labels = labels_of(calibration, judges, class_names)
        return files[1::2][:MOST_CALIBRATION], judges, labels
    files = files[:MOST_CALIBRATION]
    seen = set(content_keys(files))
    judges = _listed(accuracy, "accuracy")
    judges = [p for p, key in zip(judges, content_keys(judges), strict=True) if key not in seen]
    if not judges:
        raise ValueError(f"--accuracy {accuracy} holds no image that is not in --calibration")
    labels = labels_of(accuracy, judges, class_names)
    if labels is None:
        raise ValueError(
            f"--accuracy {accuracy} is not in class folders, expected folders named "
            f"{', '.join(class_names)}"
        )
    return files, judges, labels


def logits_of(classifier: Classifier, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits ``(N, K)``, a batch at a time."""
    starts = range(0, len(images), BATCH)
    return np.concatenate([classifier.logits(images[i : i + BATCH]) for i in starts])


def own_rounding(net: Any, images: NDArray[np.float32]) -> float:
    """How far a network's logits move when its inputs and weights move by their last bits.

    Relative, the largest of three trials. A steep network makes more of a rounding than a flat
    one, whoever computes it; differences of this size are no fault of an export.

    Args:
        net: a Paddle layer in eval mode; is as it was afterwards.
        images: normalised, ``(N, 3, H, W)``.
    """
    network, rng = dygraph_network(net), np.random.default_rng(0)
    expected = network(images)
    kept = {k: v.numpy() for k, v in net.state_dict().items() if "float32" in str(v.dtype)}

    def nudged(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.nextafter(values, rng.choice(ENDS, values.shape))

    largest = 0.0
    try:
        for _ in range(ROUNDINGS):
            net.set_state_dict({name: nudged(value) for name, value in kept.items()})
            moved = network(nudged(images))
            largest = max(largest, relative_difference(expected, moved))
    finally:
        net.set_state_dict(kept)
    return largest


def relative_difference(expected: NDArray[np.floating], got: NDArray[np.floating]) -> float:
    """The largest difference of two sets of logits, relative to the largest logit."""
    size = float(np.abs(expected).max())
    difference = float(np.abs(np.subtract(got, expected, dtype=np.float64)).max())
    return difference / size if size > 0 else difference


def check_parity(
    expected: NDArray[np.floating], got: NDArray[np.floating], what: str, *, limit: float
) -> float:
    """The relative difference of an exported network's logits from the model's.

    Raises:
        ValueError: it is not below ``limit``, or not finite.
    """
    relative = relative_difference(expected, got)
    if not relative < limit:  # also when it is not a number
        raise ValueError(
            f"{what}: its logits differ from the model's by {relative:.1e} relative, expected less "
            f"than {limit:.1e}"
        )
    return relative


def export_model(
    model: Any, folder: Path, *, formats: Sequence[str] = FORMATS, opset: int = 17
) -> tuple[Classifier, dict[str, Any]]:
    """Write the networks and check each against dygraph; the description is not yet written.

    Args:
        model: a :class:`visiondistill_gc.utils.model_files.LoadedModel`.
        folder: exists.

    Returns:
        The model in dygraph, and the facts for ``model.json``.
    """
    from shared_core.for_paddle.export import export_inference, export_onnx

    description = Description.of(model)
    dygraph = Classifier(dygraph_network(model.net), description, name="dygraph", runtime="dygraph")
    shape = (3, *description.input_size)
    if "paddle" in formats:
        export_inference(model.net, folder / "student", input_size=shape)
    if "onnx" in formats:
        path = folder / FILES["onnx"][0]  # checked below, on pictures
        export_onnx(model.net, path, input_size=shape, opset=opset, check_batches=())
    facts: dict[str, Any] = {"format": FORMAT, **description.as_dict()}
    facts["opset"] = opset if "onnx" in formats else None
    facts["source"] = {
        "architecture": model.facts["architecture"],
        "sha256": model.facts["sha256"],
        "split_hash": model.facts["split_hash"],
    }
    write_facts(folder, facts)
    images = generated_images(description.input_size)
    expected = logits_of(dygraph, images)
    rounding = own_rounding(model.net, description.normalise(images))
    limit = max(TOLERANCE, STEEP * rounding)
    facts["parity"] = {"images": len(images), "limit": limit, "own_rounding": rounding}
    try:
        for runtime in formats:
            exported = load_classifier(folder, runtime=runtime)
            got = logits_of(exported, images)
            what = f"{folder} ({runtime})"
            facts["parity"][runtime] = check_parity(expected, got, what, limit=limit)
    except ValueError:
        (folder / DESCRIPTION_FILE).unlink()  # without it nobody takes the folder for a model
        raise
    write_facts(folder, facts)
    return dygraph, facts


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """``model.json``."""
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    atomic_write(folder / DESCRIPTION_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def quantize(
    folder: Path,
    dygraph: Classifier,
    files: tuple[list[Path], list[Path], list[int] | None],
    *,
    method: str = "minmax",
) -> dict[str, Any]:
    """Write the int8 network of an exported folder; what it costs in accuracy.

    Args:
        files: of :func:`split_images`.
    """
    calibration, judges, labels = files
    views = np.concatenate([batch.images for batch in loader_of(dygraph, calibration)])
    (source,), (target,) = FILES["onnx"], FILES["onnx-int8"]
    layers = quantize_static(
        folder / source, folder / target, dygraph.description.normalise(views), method=method
    )
    exact, rounded = (load_classifier(folder, runtime=r) for r in ("onnx", "onnx-int8"))
    pairs = [(exact.logits(b.images), rounded.logits(b.images)) for b in loader_of(exact, judges)]
    first, second = (np.concatenate(part) for part in zip(*pairs, strict=True))
    names = dygraph.description.class_names
    return {
        "method": method,
        "layers": layers,
        "calibration_images": len(calibration),
        **compare(first, second, labels, names),
        "fp32_bytes": (folder / source).stat().st_size,
        "int8_bytes": (folder / target).stat().st_size,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Export, check, describe. Returns the exit code."""
    args = build_parser().parse_args(argv)
    _check(args)
    import_paddle()
    from visiondistill_gc.utils.model_files import load_model

    model = load_model(args.model, categories=args.categories)
    files = None
    if args.int8:
        files = split_images(args.calibration, args.accuracy, model.class_names)
    formats = [name for name in FORMATS if name in args.format]
    _prepare(args.output)
    dygraph, facts = export_model(model, args.output, formats=formats, opset=args.opset)
    print(f"{args.output}: {len(model.class_names)} classes, {' and '.join(formats)}")
    for runtime in formats:
        print(
            f"parity of {runtime} with dygraph on {facts['parity']['images']} generated images: "
            f"relative difference {facts['parity'][runtime]:.1e} (less than "
            f"{facts['parity']['limit']:.1e})"
        )
    if files is not None:
        facts["int8"] = quantize(args.output, dygraph, files, method=args.int8_method or "minmax")
        write_facts(args.output, facts)
        _print_int8(facts["int8"])
    return 0


def _print_int8(report: dict[str, Any]) -> None:
    line = (
        f"int8 ({report['method']}, {report['calibration_images']} calibration images): "
        f"{report['layers']} layers, {report['fp32_bytes'] / 1e6:.1f} -> "
        f"{report['int8_bytes'] / 1e6:.1f} MB; on {report['images']} held-out images same class "
        f"{100 * report['same_class']:.1f} %, relative error {report['relative_error']:.3f}"
    )
    if "int8_accuracy" in report:
        line += f", accuracy {report['fp32_accuracy']:.4f} -> {report['int8_accuracy']:.4f}"
    print(line)
    for name, one in report.get("by_class", {}).items():
        print(
            f"  {name}: {one['images']} images, recall {one['fp32_recall']:.4f} -> "
            f"{one['int8_recall']:.4f}"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Write a finished model as ONNX files for other runtimes; ``--help`` lists the options."""

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
import dataclasses
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
import torch

from gfnet_dynn.deploy.segments import LEAST_OPSET, export_early_exit, export_student
from gfnet_dynn.finished_model import (
    DESCRIPTION_FILE,
    FORMAT,
    Classifier,
    Description,
    OnnxClassifier,
    TorchClassifier,
    add_policy_options,
    choose_policy,
    list_images,
)
from gfnet_dynn.models.exit_policy import NEVER, ExitPolicy
from gfnet_dynn.onnx_chain import CHAIN_FILE
from gfnet_dynn.quantization import quantize_file, quantize_segments
from shared_core.checkpoints import atomic_write
from shared_core.runs import UsageError, run_command

PLAIN_FILE, INT8_FILE = "model.onnx", "model-int8.onnx"
OURS = re.compile(r"model\.json|chain\.json|model(-int8)?\.onnx|segment\d+\.onnx|\..+\.tmp-\d+")
NEEDED = ("onnx", "onnxscript", "onnxruntime")
MOST_IMAGES = 512  # of --calibration that are looked at
GENERATED = 64
BATCH = 32


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="export_model.py",
        description="Write a finished model as ONNX: one file for a plain network, a chain of "
        "segments for one with exits. predict.py takes the folder in place of a .pth file.",
        epilog="model.json beside the networks holds classes, preprocessing, exits, costs and "
        "thresholds. Needs: pip install 'gfnet_dynn[export]'",
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="a .pth file of this project")
    p.add_argument(
        "output",
        type=Path,
        metavar="OUTPUT_FOLDER",
        help="a new or empty folder, or an earlier export, which is replaced",
    )
    add_policy_options(p, may_skip=False)
    p.add_argument(
        "--int8",
        action="store_true",
        help="int8 linear layers: ranges fixed on --calibration images, found anew for each "
        "batch without them",
    )
    p.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="images like those that will come; every second one is kept out of the calibration "
        "and judges. In class folders, accuracy is reported, too",
    )
    p.add_argument("--opset", type=int, metavar="N", help="of ONNX, 13 or more (default: torch's)")
    return p


def load_images(
    description: Description, folder: Path | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Normalised images float32 ``(N, 3, H, W)``, and labels ``(N,)`` where folders tell them.

    Without a folder they are generated, smooth and noisy ones, and have no labels.

    Raises:
        ValueError, DecodeError: fewer than two images, or one that cannot be read.
    """
    normalize = description.normalizer()
    if folder is None:
        rng = np.random.default_rng(0)
        height, width = description.input_size
        coarse = rng.integers(0, 256, (GENERATED, 6, 6, 3)).astype(np.uint8)
        smooth = [cv2.resize(one, (width, height), interpolation=cv2.INTER_CUBIC) for one in coarse]
        noise = rng.normal(0, 1, (GENERATED, height, width, 3))
        noise *= rng.uniform(0, 40, (GENERATED, 1, 1, 1))
        pixels = np.clip(np.stack(smooth) + noise, 0, 255).astype(np.uint8)
        return normalize(pixels).contiguous().numpy(), None
    files, bad = list_images([folder])
    if bad:
        raise ValueError(f"--calibration {bad[0][0]}: {bad[0][1]}")
    order = np.random.default_rng(0).permutation(len(files))[:MOST_IMAGES]
    files = [files[i] for i in order]
    if len(files) < 2:
        raise ValueError(f"--calibration {folder} holds {len(files)} image, expected two or more")
    loader = description.loader(files, batch=BATCH, threads=2)
    loader.on_error = "raise"
    images = np.concatenate([normalize(batch.images).contiguous().numpy() for batch in loader])
    names = {name: label for label, name in enumerate(description.class_names)}
    labels = [
        next((names[part] for part in path.relative_to(folder).parts[:-1] if part in names), -1)
        for path in files
    ]
    return images, None if min(labels) < 0 else np.asarray(labels)


def answers(
    classifier: Classifier, images: np.ndarray, policy: ExitPolicy | None
) -> tuple[np.ndarray, np.ndarray]:
    """``(logits (N, K), exits (N,))`` of normalised images, a batch at a time."""
    parts = [
        classifier.classify(torch.from_numpy(images[i : i + BATCH]), policy)
        for i in range(0, len(images), BATCH)
    ]
    logits, left = zip(*parts, strict=True)
    return np.concatenate(logits), np.concatenate(left)


def forced(exit_index: int, num_gates: int) -> ExitPolicy:
    """Everybody leaves at this exit, and nobody before it."""
    thresholds = [-1.0 if i == exit_index else NEVER for i in range(num_gates)]
    return ExitPolicy("max_prob", thresholds or NEVER)


def check_parity(
    source: Classifier, exported: Classifier, images: np.ndarray, policies: dict[str, ExitPolicy]
) -> dict[str, Any]:
    """Hold an exported model to torch: every exit's logits, and every policy's decisions.

    Returns:
        ``images``, ``max_abs_difference`` of the logits over all exits, and ``equal_decisions``:
        by policy, on how many images class and exit are the same.
    """
    num_gates = len(source.description.exits)
    worst = 0.0
    for exit_index in range(num_gates + 1):
        # A chain is asked with exits even for the final head, as torch is here.
        policy = forced(exit_index, num_gates) if num_gates else None
        truth, there = answers(source, images, policy)
        got, here = answers(exported, images, policy)
        if not (there == exit_index).all() or not (here == exit_index).all():
            raise ValueError(f"exit {exit_index} was asked for, another one answered")
        worst = float(np.maximum(worst, np.abs(truth.astype(np.float64) - got).max()))
    equal = {}
    for name, policy in policies.items() if num_gates else [("plain", None)]:
        a, b = answers(source, images, policy), answers(exported, images, policy)
        equal[name] = int(((a[0].argmax(1) == b[0].argmax(1)) & (a[1] == b[1])).sum())
    return {"images": len(images), "max_abs_difference": worst, "equal_decisions": equal}


def compare_int8(
    exact: tuple[np.ndarray, np.ndarray],
    rounded: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray | None,
    costs: Sequence[float],
) -> dict[str, Any]:
    """What the rounding changed, of two ``(logits, exits)`` on the same images; all fractions."""
    predicted = [found[0].argmax(axis=1) for found in (exact, rounded)]
    costs = np.asarray(costs, np.float64)
    report = {
        "images": len(predicted[0]),
        "same_class": float((predicted[0] == predicted[1]).mean()),
        "same_exit": float((exact[1] == rounded[1]).mean()),
        "float_cost_fraction": float(costs[exact[1]].mean() / costs[-1]),
        "int8_cost_fraction": float(costs[rounded[1]].mean() / costs[-1]),
    }
    if labels is not None:
        report["float_accuracy"] = float((predicted[0] == labels).mean())
        report["int8_accuracy"] = float((predicted[1] == labels).mean())
    return report


def _prepare(folder: Path) -> None:
    """Make the folder, or empty it of an earlier export and of nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(folder.iterdir(), key=lambda path: path.name)
    if foreign := [path.name for path in present if not OURS.fullmatch(path.name)]:
        raise UsageError(
            f"{folder} holds {foreign[0]}, which no export wrote: expected a new or empty folder, "
            "or an earlier export"
        )
    for path in sorted(present, key=lambda path: path.suffix != ".json"):  # JSON first
        path.unlink()


def _opset(path: Path) -> int:
    import onnx

    return next(o.version for o in onnx.load(str(path)).opset_import if o.domain in ("", "ai.onnx"))


def _quantize(
    folder: Path, facts: dict[str, Any], images: np.ndarray | None, num_segments: int
) -> None:
    """Make the float files of an export int8, and say so in its description."""
    method = "dynamic" if images is None else "static"
    (folder / DESCRIPTION_FILE).unlink()
    if num_segments == 1:
        batches = [] if images is None else np.split(images, range(BATCH, len(images), BATCH))
        feeds = [{"image": np.ascontiguousarray(batch)} for batch in batches]
        quantize_file(folder / PLAIN_FILE, folder / INT8_FILE, method=method, calibration=feeds)
        facts["file"] = INT8_FILE
    else:
        chain = json.loads((folder / CHAIN_FILE).read_text(encoding="utf-8"))
        (folder / CHAIN_FILE).unlink()
        quantize_segments(folder, chain["segments"], method=method, images=images)
        _write_json(folder / CHAIN_FILE, {**chain, "int8": method})
    facts["int8"] = method


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Export, check, write the description. Returns the exit code."""
    args = build_parser().parse_args(argv)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ImportError(
            f"{missing[0]} is not installed: expected it for an export; "
            "pip install './packages/gfnet_dynn[export]'"
        )
    if args.opset is not None and args.opset < LEAST_OPSET:
        raise UsageError(
            f"--opset {args.opset}: expected {LEAST_OPSET} or more, in which int8 layers have a "
            "scale for each channel"
        )
    if args.calibration is not None and not args.calibration.is_dir():
        raise FileNotFoundError(f"--calibration {args.calibration} is not a folder")
    if args.model.is_dir():
        raise UsageError(f"{args.model} is a folder, expected a .pth file")
    source = TorchClassifier(args.model)
    description, has_exits = source.description, bool(source.description.exits)
    policy = choose_policy(args, description, args.model, needed=False)
    images, labels = load_images(description, args.calibration)
    folder = args.output
    _prepare(folder)
    if has_exits:
        export_early_exit(source.model, folder, policy=policy, opset=args.opset)
    else:
        plain = getattr(source.model, "backbone", source.model)  # a list of exits may be empty
        export_student(plain, folder / PLAIN_FILE, opset=args.opset)
    state = None if policy is None else policy.state_dict()
    facts: dict[str, Any] = {
        "format": FORMAT,
        "file": None if has_exits else PLAIN_FILE,  # None: the segments of chain.json
        "int8": None,
        "opset": _opset(folder / ("segment0.onnx" if has_exits else PLAIN_FILE)),
        "source": {
            "file": args.model.name,
            "sha256": source.facts["sha256"],
            "split_hash": source.facts["split_hash"],
        },
        **dataclasses.replace(description, policy=state).as_dict(),
    }
    _write_json(folder / DESCRIPTION_FILE, facts)
    exported = OnnxClassifier(folder)
    policies = {name: ExitPolicy.from_state(one) for name, one in description.points.items()}
    if policy is not None:
        policies["default"] = policy
    facts["parity"] = check_parity(source, exported, images, policies)
    what = "generated images" if args.calibration is None else f"images of {args.calibration}"
    print(f"{folder}: {_what(description)}, ONNX opset {facts['opset']}")
    print(
        f"parity with torch on {len(images)} {what}: logits differ by at most "
        f"{facts['parity']['max_abs_difference']:.1e}"
        + "".join(
            f"; {name}: {same} of {len(images)} decisions equal"
            for name, same in facts["parity"]["equal_decisions"].items()
        )
    )
    if args.int8:
        held = slice(0, None, 2) if args.calibration is not None else slice(None)
        exact = answers(exported, images[held], policy)
        ranges = images[1::2] if args.calibration is not None else None
        _quantize(folder, facts, ranges, len(description.exits) + 1)
        _write_json(folder / DESCRIPTION_FILE, facts)
        rounded = answers(OnnxClassifier(folder), images[held], policy)
        truth = None if labels is None else labels[held]
        facts["int8_report"] = compare_int8(exact, rounded, truth, description.costs)
        _print_int8(facts, calibrated=args.calibration is not None)
    _write_json(folder / DESCRIPTION_FILE, facts)
    if has_exits and policy is None:
        print("no thresholds are known for it: predict.py will want --policy KIND --threshold T")
    return 0


def _what(description: Description) -> str:
    if not description.exits:
        return f"plain network, {len(description.class_names)} classes"
    exits = ", ".join(map(str, description.exits))
    return (
        f"chain of {len(description.exits) + 1} segments (exits after blocks {exits}), "
        f"{len(description.class_names)} classes"
    )


def _print_int8(facts: dict[str, Any], *, calibrated: bool) -> None:
    report = facts["int8_report"]
    line = (
        f"int8 ({facts['int8']}) against float on {report['images']} "
        f"{'held-out images' if calibrated else 'generated images'}: same class "
        f"{100 * report['same_class']:.1f} %"
    )
    if facts["exits"]:
        line += (
            f", same exit {100 * report['same_exit']:.1f} %, mean cost "
            f"{100 * report['float_cost_fraction']:.1f} -> "
            f"{100 * report['int8_cost_fraction']:.1f} % of a full run"
        )
    if "int8_accuracy" in report:
        line += f", accuracy {report['float_accuracy']:.4f} -> {report['int8_accuracy']:.4f}"
    print(line)
    if not calibrated:
        print("generated images say little about accuracy: give real ones by --calibration")


if __name__ == "__main__":
    sys.exit(run_command(main))

"""``make compare`` against what a user would write instead, at equal minutes on the same split.

For each folder of images: the journey runs for ``--minutes``; then timm's lite0 is fine-tuned from
the same weights for as long, exported by torch.onnx and quantized by onnxruntime (that script is
``_compare_user.py``). Accuracy of the files on the same test images, milliseconds by turns with one
thread, bytes, and how many answers of each float file equal its network's.

    python tools/bench/compare.py [--quick] [--minutes M] [--data-path DIR ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # without this folder: `compare` would be this file
    sys.path[:1] = [str(REPOSITORY / "shared"), str(Path(__file__).parent)]

import numpy as np
from _compare_user import answers, export, fine_tune
from _rows import share

from shared_core.datasets import BatchLoader, EvalView, Manifest
from shared_core.datasets.reading.image_set import ImageSet
from shared_core.deploy.predictor import Predictor, open_model
from shared_core.runs import write_benchmark
from shared_core.weights.catalogue import CATALOGUE
from shared_core.weights.finding import installed_file

QUICK = 1.5  # minutes, on drawn scenes
ROUNDS = 40
POINT = 0.01  # of accuracy
EQUAL = "accuracy on the same test images; the same weights to start from, the same minutes"


def main(argv: Sequence[str] | None = None) -> int:
    """Run both sides and write the record."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--data-path", type=Path, nargs="*", default=[], help="Folders of images.")
    p.add_argument("--minutes", type=float, default=30.0, help="For each side and folder.")
    p.add_argument("--threads", type=int, default=2, help="That learn.")
    p.add_argument("--seed", type=int, default=0, help="Of both sides.")
    p.add_argument("--quick", action="store_true", help="Drawn scenes, a minute.")
    p.add_argument("--work", type=Path, default=Path("runs/bench-compare"), help="Where to work.")
    p.add_argument("--json", type=Path, help="The record.")
    args = p.parse_args(argv)
    folders = [None] if args.quick or not args.data_path else list(args.data_path)
    rows: list[dict[str, Any]] = []
    for folder in folders:
        minutes = QUICK if args.quick else args.minutes
        rows += side_by_side(folder, args.work, minutes, threads=args.threads, seed=args.seed)
    if args.json:
        write_benchmark(args.json, topic="compare", rows=rows)
    return 0


def side_by_side(
    data: Path | None, work: Path, minutes: float, *, threads: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of one folder of images."""
    name = "scenes" if data is None else data.resolve().name
    ours = work / name / "compare"
    words = ["--minutes", f"{minutes:g}", "--threads", str(threads), "--seed", str(seed)]
    where = [] if data is None else ["--data-path", str(data)]
    subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/compare/main.py"), *where, *words,
         "--output", str(ours), "--continue"], check=True,
    )  # fmt: skip
    check = json.loads((ours / "data/check.json").read_text())
    root, classes = Path(check["root"]), check["classes"]
    manifest = Manifest.read(ours / "data/split.json", root=root)

    def part(*names: str) -> tuple[list[str], list[int]]:
        items = [item for one in names for item in manifest.subset(one)]
        return [str(root / item.path) for item in items], [item.label for item in items]

    # The user's side needs no calibration images of its own: it learns from them, too.
    train, test = part("train", "calibration"), part("test")
    side = min(224, max(64, 32 * round(check["pixels"] / 32)))
    weights = installed_file(CATALOGUE[0])
    assert weights is not None, "compare would have said so"
    model = fine_tune(
        train, weights=weights, classes=len(classes), side=side, minutes=minutes, threads=threads,
        seed=seed,
    )  # fmt: skip
    files = export(model, train, work / name / "user", side=side, seed=seed)
    return rows_of(name, ours / "winner", model, files, test, side, check)


def rows_of(
    name: str, winner: Path, model: Any, files: tuple[Path, Path], test: Any, side: int, check: Any
) -> list[dict[str, Any]]:
    """Every number of both sides, measured here on the files."""
    import torch

    def network(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    own = open_model(winner, threads=1)
    sessions = [_session(file) for file in files]
    truth = np.asarray(test[1])
    said = [answers(run, test, side) for run in (network, *sessions)]
    accuracy = {key: float((one == truth).mean()) for key, one in zip("nfi", said, strict=True)}
    mine = float((_own_answers(own, test) == truth).mean())
    sample = np.zeros((1, 3, side, side), np.float32)
    view = np.zeros((1, *own.facts.input_size, 3), np.uint8)
    times = interleaved({
        "own": lambda: own.probabilities(view),
        "float": lambda: sessions[0](sample),
        "int8": lambda: sessions[1](sample),
    })  # fmt: skip
    sizes = {"own": own_bytes(winner), "float": files[0].stat().st_size,
             "int8": files[1].stat().st_size}  # fmt: skip
    about = f"{name}, {len(check['classes'])} classes, {len(truth)} test images"
    rows = [
        higher(f"{about}: accuracy of the winner and of their float file", mine, accuracy["f"]),
        higher(f"{about}: accuracy of the winner and of their int8 file", mine, accuracy["i"]),
        share(f"{about}: their float file's answers equal to their network's",
              float((said[1] == said[0]).mean()), goal=None, equal=EQUAL),
        share(f"{about}: their int8 file's answers equal to their network's",
              float((said[2] == said[0]).mean()), goal=None, equal=EQUAL),
    ]  # fmt: skip
    agreement = own.facts.measured["files"][own.facts.default]["agreement"]["same_class"]
    if agreement is not None:
        rows.append(share(f"{about}: the winner's answers equal to its network's",
                          float(agreement), goal=None, equal=EQUAL))  # fmt: skip
    for key, letter in (("float", "f"), ("int8", "i")):
        near = mine >= accuracy[letter] - POINT
        better = max(times[key] / times["own"], sizes[key] / sizes["own"])
        rows.append(_row(
            f"{about}: ms of the winner and of their {key} file, batch 1", times["own"],
            times[key], times[key] / times["own"], "ms", None,
        ))  # fmt: skip
        rows.append(_row(
            f"{about}: MB of the winner and of their {key} file", sizes["own"] / 1e6,
            sizes[key] / 1e6, sizes[key] / sizes["own"], "MB", None,
        ))  # fmt: skip
        rows.append(_row(
            f"{about}: times faster or smaller than their {key} file, within a point",
            better if near else 0.0, 1.0, better if near else 0.0, "times", 2.0,
        ))  # fmt: skip
    return rows


def higher(name: str, ours: float, theirs: float) -> dict[str, Any]:
    """Two accuracies."""
    return _row(name, ours, theirs, ours / max(theirs, 1e-9), "of all", 1.0)


def _row(
    name: str, ours: float, theirs: float, ratio: float, unit: str, goal: float | None
) -> dict[str, Any]:
    met = None if goal is None else ratio >= goal
    verdict = "" if goal is None else f"  goal {goal:g}: {'met' if met else 'not met'}"
    print(f"{name:<84}{ours:>9.4f}{theirs:>9.4f}  {ratio:6.2f}x{verdict}", flush=True)
    ratios = {f"ratio_{key}": round(ratio, 3) for key in ("median", "min", "max")}
    return {"name": name, "ours": round(ours, 4), "theirs": round(theirs, 4), **ratios,
            "goal": goal, "met": met, "skipped": None, "equal": EQUAL, "unit": unit}  # fmt: skip


def _session(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images})[0]


def _own_answers(own: Predictor, test: Any) -> np.ndarray:
    """Class of every image by the winner, prepared as its own model.json says."""
    images = ImageSet([Path(file) for file in test[0]], test[1])
    view: EvalView = own.facts.make_view()
    loader = BatchLoader(images, view=view, batch_size=32, threads=1)
    return np.concatenate([own.probabilities(batch.images).argmax(axis=1) for batch in loader])


def interleaved(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU milliseconds of a call, by turns; with one thread it is an idle machine's time."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 3):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            if number >= 3:
                found[name].append(1e3 * (time.process_time() - begun))
    return {name: float(np.median(values)) for name, values in found.items()}


def own_bytes(winner: Path) -> int:
    """Of the winner's network files."""
    facts = json.loads((winner / "model.json").read_text())
    names = {one for files in facts["files"].values() for one in files}
    return sum((winner / one).stat().st_size for one in names)


if __name__ == "__main__":
    sys.exit(main())

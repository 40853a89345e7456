"""``probe.py --run FOLDER --output MODEL``: a trained body with a linear head, as a model folder.

The head is fitted on the features that the data check stored; nothing else is learned, so it takes
a minute. It is the floor that a training must beat, and a candidate like the others.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "tools"), str(repo / "shared")]

import numpy as np
from numpy.typing import NDArray

from compare.candidates import LITE0, fits_probe
from compare.check_data import features, prepared
from compare.contract import FEATURES_FILE
from compare.floors import spread
from compare.labels import read_features
from shared_core.datasets import BatchLoader, EvalView, PreparedData
from shared_core.metrics.probe import LinearProbe, fit_probe
from shared_core.runs import run_command

BATCH, CALIBRATION = 32, 512  # images
CHUNK = 4096  # rows of features in memory at once
CHOOSING = 10_000  # images that choose the strength
SHRINK = (0.02, 0.1, 0.4)  # shares of a round spread in the spread of the classes


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, export, check. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition(": ")[2].partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="The folder of the comparison.")
    parser.add_argument("--output", type=Path, required=True, help="The model folder to write.")
    parser.add_argument("--threads", type=int, default=1, help="How many CPU threads compute.")
    args = parser.parse_args(argv)
    data = prepared(args.run)
    probe = fitted(data, args.run)
    for line in export(data, probe, args.run, args.output, threads=args.threads):
        print(line, flush=True)
    return 0


def fitted(data: PreparedData, folder: Path) -> LinearProbe:
    """The head, fitted on training images, its strength chosen on calibration images."""
    rows, row_of = features(folder)

    def part(name: str, most: int) -> tuple[list[int], NDArray[np.int64]]:
        items = spread(data.manifest.subset(name), most)
        return [row_of[item.key] for item in items], np.array([item.label for item in items])

    classes = len(data.classes)
    chosen, labels = part("train", len(data.manifest.entries))
    held, truth = part("calibration", CHOOSING)
    validation = np.asarray(rows[held], np.float32), truth
    if fits_probe(len(labels), classes):
        learned = np.asarray(rows[chosen], np.float32)
        probe = fit_probe(learned, labels, num_classes=classes, validation=validation)
    else:
        probe = fit_means(rows, chosen, labels, num_classes=classes, validation=validation)
    right = probe.accuracy(*validation)
    print(f"a linear head on {len(labels)} images, calibration {right:.4f}", flush=True)
    return probe


def fit_means(
    rows: NDArray[np.floating],
    chosen: Sequence[int],
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    validation: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> LinearProbe:
    """A linear discriminant: seconds where a logistic regression takes an hour.

    The classes share one spread, which is shrunk to a round one by what suits ``validation``.

    Args:
        rows: features ``(N, D)``, which may lie on disk.
        chosen, labels: rows to learn from, and their classes.

    Source: Friedman 1989, Regularized Discriminant Analysis, JASA 84(405).
    """
    width = rows.shape[1]
    count, means = np.bincount(labels, minlength=num_classes), np.zeros((num_classes, width))
    square = np.zeros((width, width))
    for start in range(0, len(chosen), CHUNK):
        part = np.asarray(rows[chosen[start : start + CHUNK]], np.float64)
        np.add.at(means, labels[start : start + CHUNK], part)
        square += part.T @ part
    means /= np.maximum(count, 1)[:, None]
    within = (square - (means * count[:, None]).T @ means) / len(chosen)
    prior = np.where(count > 0, np.log(np.maximum(count, 1) / len(chosen)), -1e4)
    best: tuple[float, LinearProbe] | None = None
    for shrink in SHRINK:
        spread_of = (1 - shrink) * within + shrink * np.trace(within) / width * np.eye(width)
        weight = np.linalg.solve(spread_of, means.T).T
        bias = prior - 0.5 * (weight * means).sum(axis=1)
        probe = LinearProbe(weight.astype(np.float32), bias.astype(np.float32), shrink)
        right = probe.accuracy(*validation)
        if best is None or right > best[0]:
            best = right, probe
    assert best is not None, "there are strengths to choose from"
    return best[1]


def export(
    data: PreparedData, probe: LinearProbe, folder: Path, output: Path, *, threads: int
) -> Sequence[str]:
    """Write the model folder; every file in it answers as the network. Lines for a terminal."""
    import torch

    from shared_core.deploy.facts import ModelFacts
    from shared_core.deploy.predictor import NetworkPredictor, logits_to_run
    from shared_core.deploy.write import Calibration, Int8Wish, write_model_folder
    from shared_core.for_torch.cost import layer_costs
    from shared_core.for_torch.export import export_onnx
    from shared_core.for_torch.networks import head_names
    from shared_core.for_torch.pretrained import start_network

    torch.set_num_threads(threads)
    classes, side = len(data.classes), read_features(folder / FEATURES_FILE).input_size
    network = start_network(LITE0, init="trained", num_classes=classes)
    model, view = network.model.eval(), EvalView(side, resize_ratio=1.0, method="area")
    head = model.get_submodule(head_names(model, classes)[0])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(probe.weight))
        head.bias.copy_(torch.from_numpy(probe.bias))
    costs = layer_costs(model, torch.zeros(1, 3, side, side))
    facts = ModelFacts(
        project="compare", architecture=LITE0, class_names=data.classes, input_size=(side, side),
        view=view.settings(), mean=network.mean, std=network.std,
        costs={"macs": sum(c.macs for c in costs), "parameters": sum(c.params for c in costs)},
        provenance={
            "data": data.name, "images": len(data.manifest.entries),
            "split_hash": data.manifest.hash, "initial_weights": network.start,
            "learned_from": "labels, the head alone",
        },
    )  # fmt: skip

    def logits(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(images)).numpy())

    def loader(part: str) -> BatchLoader:
        return BatchLoader(data.image_set(part), view=view, batch_size=BATCH, threads=threads)

    def asked() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        for batch in loader("test"):
            yield batch.images, batch.labels

    items = spread(list(range(len(data.image_set("calibration")))), CALIBRATION)
    chosen = data.image_set("calibration").subset(items)
    batches = list(BatchLoader(chosen, view=view, batch_size=BATCH, threads=threads))
    calibration = Calibration(
        np.concatenate([b.images for b in batches]), np.concatenate([b.labels for b in batches])
    )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "float.onnx"
        export_onnx(model, file, input_size=(3, side, side))
        written = write_model_folder(
            output, facts=facts, sources=[file], test=asked(), calibration=calibration,
            network=NetworkPredictor(facts, logits_to_run(facts, logits), runtime="torch",
                                     name=LITE0),
            int8=Int8Wish("auto" if len(calibration.images) >= 2 else "no"),
        )  # fmt: skip
    return written.lines


if __name__ == "__main__":
    from compare import probe  # by its name: its errors are known as this package's

    sys.exit(run_command(probe.main))

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

from compare.candidates import LITE0, PROBE_AT_MOST
from compare.check_data import features, prepared
from compare.contract import FEATURES_FILE
from compare.floors import spread
from compare.labels import read_features
from shared_core.datasets import BatchLoader, EvalView, PreparedData
from shared_core.metrics.probe import LinearProbe, fit_probe
from shared_core.runs import run_command

BATCH, CALIBRATION = 32, 512  # images


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

    def part(name: str) -> tuple[NDArray[np.float32], list[int]]:
        items = spread(data.manifest.subset(name), PROBE_AT_MOST)
        found = np.asarray(rows[[row_of[item.key] for item in items]], np.float32)
        return found, [item.label for item in items]

    learned, labels = part("train")
    probe = fit_probe(
        learned, labels, num_classes=len(data.classes), validation=part("calibration")
    )
    right = probe.accuracy(*part("calibration"))
    print(f"a linear head on {len(labels)} images, calibration {right:.4f}", flush=True)
    return probe


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
    sys.exit(run_command(main))

"""From a model file to a model folder: which images judge it, and what the core writes of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gfnet_dynn.deploy.checkpoint import load_checkpoint, model_facts, predictor_of
from gfnet_dynn.deploy.segments import write_float
from shared_core.datasets import Manifest
from shared_core.datasets.finding.scan import list_images
from shared_core.datasets.splitting.prepared import SPLIT_FILE
from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.inputs import load_files
from shared_core.deploy.options import ExitOptions
from shared_core.deploy.predictor import ExitPredictor, Predictor
from shared_core.deploy.write import Calibration, Int8Wish, write_model_folder
from shared_core.runs import UsageError

NEEDED = ("onnx", "onnxscript", "onnxruntime")
MOST_IMAGES = 512  # that fix and judge the ranges of int8
BATCH = 32


@dataclass(frozen=True)
class ExportOptions:
    """What is asked of an export.

    Attributes:
        calibration: folder of images for int8; None takes the calibration split of the model's run.
        data_path: where the run's images lie now; None where they lay.
        int8: ``no``, ``auto`` or ``yes``, see ``Int8Wish``.
    """

    exits: ExitOptions
    int8: str = "no"
    max_accuracy_loss: float = 0.01
    calibration: Path | None = None
    data_path: Path | None = None
    opset: int | None = None


@dataclass(frozen=True)
class Images:
    """Image files, and their classes where these are known."""

    files: list[Path]
    labels: np.ndarray | None

    def batches(self, predictor: Predictor) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Views with labels.

        Raises:
            ValueError: an image that cannot be read.
        """
        start = 0
        for loaded in load_files(self.files, predictor.view, batch_size=BATCH, workers=2):
            for source in loaded.sources:
                if source.error is not None:
                    raise ValueError(f"{source.path}: {source.error}")
            end = start + len(loaded.images)
            labels = None if self.labels is None else self.labels[start:end]
            yield loaded.images, labels
            start = end


def export_model(path: Path, folder: Path, options: ExportOptions) -> int:
    """Write the model folder and say what is in it. Returns the exit code.

    Raises:
        ImportError: a package of the extra ``export`` is missing.
        UsageError, ValueError: what the options ask for cannot be.
        ExportError: a file does not answer as the network.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ImportError(
            f"{missing[0]} is not installed: expected it for an export; "
            "pip install './packages/gfnet_dynn[export]'"
        )
    model, stored = load_checkpoint(path)
    cpu, name = torch.device("cpu"), str(path)
    network = predictor_of(model, model_facts(model, stored), name=name, device=cpu)
    if options.exits.asked:
        facts = facts_with(network, options.exits)
        network = predictor_of(model, facts, name=name, device=cpu)
    test = run_images(path, stored, "test", options.data_path)
    calibration = None
    if options.int8 != "no":
        calibration = calibration_of(network, path, stored, options)
    with tempfile.TemporaryDirectory(prefix="gfnet-export-") as scratch:
        written = write_model_folder(
            folder,
            facts=network.facts,
            network=network,
            sources=write_float(model, Path(scratch), opset=options.opset),
            test=None if test is None else test.batches(network),
            calibration=calibration,
            int8=Int8Wish(options.int8, max_accuracy_loss=options.max_accuracy_loss),
        )
    for line in written.lines:
        print(line)
    exits = written.facts.exits
    if exits is not None and exits.policy is None:
        print("no thresholds are known for it: predict.py will want --policy KIND --threshold T")
    return 0


def facts_with(network: Predictor, options: ExitOptions) -> ModelFacts:
    """The facts of a network whose own policy is the one that was asked for.

    Raises:
        UsageError: options that do not fit the network.
    """
    network = network.with_exits(options)
    assert isinstance(network, ExitPredictor) and network.facts.exits is not None
    exits = replace(network.facts.exits, policy=network.policy.state_dict())
    return network.facts.replaced(exits=exits)


def run_images(
    path: Path, stored: dict[str, Any], split: str, data_path: Path | None
) -> Images | None:
    """A split of the run that made the model file; None where its images are not there.

    Args:
        path: of the model file, below its run's ``checkpoint/``.

    Raises:
        UsageError: ``data_path`` was named, and holds no split of this model.
    """
    for home in path.resolve().parents:
        if (home / SPLIT_FILE).is_file():
            break
    else:
        if data_path is not None:
            raise UsageError(f"--data-path: there is no {SPLIT_FILE} of a run above {path}")
        return None
    before = (stored.get("config") or {}).get("data_path")
    root = data_path or (Path(before) if before else home / "data" / "scenes")
    if not root.is_dir():
        return None
    manifest = Manifest.read(home / SPLIT_FILE, root=root)
    if manifest.hash != stored.get("split_hash"):
        return None
    items = manifest.subset(split)
    labels = np.array([item.label for item in items], np.int64)
    return Images([root / item.path for item in items], labels)


def calibration_of(
    network: Predictor, path: Path, stored: dict[str, Any], options: ExportOptions
) -> Calibration:
    """Images that fix and judge the ranges of int8: of a folder, or of the model's own run.

    Raises:
        UsageError: neither is there.
        ValueError: fewer than two images, or one that cannot be read.
    """
    if options.calibration is not None:
        found = folder_images(options.calibration, network.facts.class_names)
    else:
        split = run_images(path, stored, "calibration", options.data_path)
        if split is None:
            raise UsageError(
                "--int8 fixes ranges on images, and those of the model's run are not there: "
                "expected --calibration FOLDER"
            )
        found = split
    order = np.random.default_rng(0).permutation(len(found.files))[:MOST_IMAGES]
    if len(order) < 2:
        raise ValueError(f"{len(order)} calibration image, expected two or more")
    labels = None if found.labels is None else found.labels[order]
    chosen = Images([found.files[row] for row in order], labels)
    views = np.concatenate([batch.copy() for batch, _ in chosen.batches(network)])
    return Calibration(views, labels)


def folder_images(folder: Path, class_names: tuple[str, ...]) -> Images:
    """The images below a folder; labels where all lie in folders with the classes' names.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: something that is no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--calibration {folder} is not a folder")
    found = list_images([folder])
    if found.bad:
        raise ValueError(f"--calibration {found.bad[0][0]}: {found.bad[0][1]}")
    numbers = {name: label for label, name in enumerate(class_names)}
    labels = [
        next((numbers[part] for part in file.relative_to(folder).parts[:-1] if part in numbers), -1)
        for file in found.files
    ]
    return Images(list(found.files), None if min(labels) < 0 else np.asarray(labels, np.int64))

"""The images of an export: which fix the ranges of int8, and which judge all files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared_core.datasets import BatchLoader, ImageSet
from shared_core.datasets.finding.fingerprint import content_keys
from shared_core.datasets.finding.scan import list_images
from shared_core.datasets.splitting.manifest import Manifest
from shared_core.datasets.splitting.prepared import SPLIT_FILE
from shared_core.deploy.predictor import Predictor
from shared_core.deploy.write import Calibration
from shared_core.texts import read_json
from visiondistill_gc.utils.listed import FOLDER

if TYPE_CHECKING:
    from visiondistill_gc.utils.model_files import LoadedModel

Labelled = tuple[list[Path], NDArray[np.int64]]
BATCH = 16
SCENES = Path("data", "scenes")  # where a rehearsal draws its images
MOST_CALIBRATION = 512  # images that are looked at


def images_in(folder: Path, *, what: str) -> list[Path]:
    """Image files in and below a folder, in an order that is random and always the same.

    Raises:
        ValueError: none.
    """
    files = list_images([folder]).files
    if not files:
        raise ValueError(f"--{what} {folder} holds no image, expected some")
    return [files[i] for i in np.random.default_rng(0).permutation(len(files))]


def labels_of(
    root: Path, files: Sequence[Path], class_names: Sequence[str]
) -> NDArray[np.int64] | None:
    """Class numbers by the folders that files lie in; None when one lies in no class folder."""
    number = {name: label for label, name in enumerate(class_names)}
    labels = [
        next((number[p] for p in path.relative_to(root).parts[:-1] if p in number), -1)
        for path in files
    ]
    return None if -1 in labels else np.array(labels, np.int64)


def batches_of(
    files: Sequence[Path], labels: NDArray[np.int64] | None, view: Any, *, what: str
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64] | None]]:
    """Views uint8 ``(n, H, W, 3)`` with their labels; a file that cannot be read is left out.

    Raises:
        ValueError: none can be read.
    """
    truth = np.zeros(len(files), np.int64) if labels is None else labels
    images = ImageSet(list(files), truth)
    loader = BatchLoader(images, view=view, batch_size=BATCH, threads=2, on_error="skip")
    for batch in loader:
        if len(batch.images):
            yield batch.images, None if labels is None else batch.labels
    if loader.skipped:
        first = loader.skipped[0]
        reason = " ".join(str(first.reason).removeprefix(f"{first.name}: ").split())
        print(f"--{what}: left out {len(loader.skipped)} images that cannot be read "
              f"({first.name}: {reason})", file=sys.stderr)  # fmt: skip
        if len(loader.skipped) == len(files):
            raise ValueError(f"--{what}: no image can be read, expected some")


def run_parts(run: Path, model: LoadedModel, root: Path | None) -> dict[str, Labelled]:
    """Files and labels of each part of the split that a run made or was given.

    Args:
        root: where the images are now; None: where the run found them.

    Raises:
        DatasetError, FileNotFoundError: the images are not there.
        ValueError: the run's split is not the one that the model was trained on.
    """
    config = read_json(run / "config.json")
    there = Path(config["data_path"]) if config.get("data_path") else run / SCENES
    root = run / FOLDER if config.get("train_list") else root or there
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}, the images of the run {run}, is not there: expected --data-path DIR with it, "
            "or a model file outside the run's folder"
        )
    manifest = Manifest.read(run / SPLIT_FILE, root=root)
    if manifest.hash != model.facts["split_hash"]:
        raise ValueError(
            f"{run / SPLIT_FILE} is split {manifest.hash[:12]}, expected that of the model: "
            f"{str(model.facts['split_hash'])[:12]}"
        )
    found: dict[str, Labelled] = {}
    for part in manifest.splits:
        items = manifest.subset(part)
        order = np.random.default_rng(0).permutation(len(items))
        labels = np.array([items[i].label for i in order], np.int64)
        found[part] = [root / items[i].path for i in order], labels
    return found


def unsure_below(network: Predictor, calibration: Calibration, share: float) -> float:
    """The smallest best probability at which ``share`` of the answered images are right.

    Raises:
        ValueError: no labels, or no limit reaches the share.
    """
    if calibration.labels is None:
        raise ValueError("--unsure-accuracy needs labels: expected --calibration in class folders")
    images, labels = calibration.images, calibration.labels
    parts = [network.probabilities(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    probabilities = np.concatenate(parts)
    best = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    for limit in np.unique(best):
        if right[best >= limit].mean() >= share:
            return float(limit)
    raise ValueError(
        f"--unsure-accuracy {share:g}: no limit reaches it on {len(labels)} calibration images, "
        "expected less"
    )


def calibration_of(
    folder: Path | None,
    run: dict[str, Labelled] | None,
    class_names: Sequence[str],
    view: Any,
) -> Calibration:
    """The first 512 images of a folder, with labels where its folders tell all of them.

    Without a folder those of the run's calibration part, or where there is none its training part.

    Raises:
        ValueError: none, or none that can be read.
    """
    if folder is not None:
        files = images_in(folder, what="calibration")[:MOST_CALIBRATION]
        labels = labels_of(folder, files, class_names)
    else:
        assert run is not None  # the command line was checked
        files, labels = run.get("calibration") or run["train"]
        files, labels = files[:MOST_CALIBRATION], labels[:MOST_CALIBRATION]
    parts = [
        (images.copy(), found)
        for images, found in batches_of(files, labels, view, what="calibration")
    ]
    images = np.concatenate([part[0] for part in parts])
    if labels is None:
        return Calibration(images)
    return Calibration(images, np.concatenate([part[1] for part in parts]))


def judges_in(
    folder: Path, class_names: Sequence[str], *, calibration: Path | None
) -> tuple[list[Path], NDArray[np.int64]]:
    """Labelled files of ``--accuracy``, without copies of calibration images.

    Raises:
        ValueError: none is left, or one lies in no class folder.
    """
    files = images_in(folder, what="accuracy")
    if calibration is not None:
        seen = set(content_keys(images_in(calibration, what="calibration")[:MOST_CALIBRATION]))
        keys = content_keys(files)
        files = [path for path, key in zip(files, keys, strict=True) if key not in seen]
        if not files:
            raise ValueError(f"--accuracy {folder} holds no image that is not in --calibration")
    labels = labels_of(folder, files, class_names)
    if labels is None:
        raise ValueError(
            f"--accuracy {folder} is not in class folders, expected folders named "
            f"{', '.join(class_names)}"
        )
    return files, labels

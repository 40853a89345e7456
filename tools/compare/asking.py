"""What the files of a candidate answer to the split's images, kept beside the candidate.

``candidates/<name>/answers.npz`` holds arrays ``FORM/WHAT`` in the split's order, where WHAT is
``calibration`` and ``test`` (class numbers of the split), ``calibration_top``, ``test_top`` and
``KIND_top`` of the strange images (largest probabilities), ``calibration_exit`` (exits taken; -1
without) and ``memory`` (10^6 bytes). A run that was killed goes on with the candidates that have
none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compare.contract import CANDIDATES, SPLIT_FILE
from compare.forms import open_form
from compare.latency import memory_mb
from compare.unknown import strange_images
from shared_core.checkpoints.atomic import atomic_write
from shared_core.datasets import DatasetError, Manifest
from shared_core.deploy import evaluate as core
from shared_core.deploy.facts import ModelError, ModelFacts
from shared_core.deploy.predictor import Outputs, Predictor

Answers = Mapping[str, npt.NDArray[Any]]
ANSWERS_FILE, VERSION = "answers.npz", "1"
CALIBRATION, TEST = "calibration", "test"


class Together:
    """Several forms of one network that are asked the same views: decoded once for all.

    The answers ``(N, 3 F)`` are, for each form, its class, its probability and the exit (-1: none).
    """

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        self.predictors, self.view = predictors, predictors[0].view

    def outputs(self, images: npt.NDArray[np.uint8]) -> Outputs:
        """See ``Predictor.outputs``."""
        columns: list[npt.NDArray[Any]] = []
        for one in self.predictors:
            values, exits = one.outputs(images)
            left = np.full(len(values), -1) if exits is None else exits
            columns += [values.argmax(axis=1), values.max(axis=1), left]
        return Outputs(np.stack(columns, axis=1).astype(np.float64), None)


def parts_of(folder: Path, root: str | Path) -> dict[str, core.Labelled]:
    """The calibration and test images of a run's split, with the split's class numbers."""
    manifest = Manifest.read(folder / SPLIT_FILE, root=root)
    found = {}
    for part in (CALIBRATION, TEST):
        items = manifest.subset(part)
        if not items:
            raise DatasetError(f"the split has no {part} images, expected some")
        labels = np.array([item.label for item in items], np.int64)
        files = [Path(root) / item.path for item in items]
        found[part] = core.Labelled(files, labels, manifest.classes, part, manifest.hash)
    return found


def check_classes(facts: ModelFacts, classes: Sequence[str]) -> None:
    """Refuse a network of other classes; their order may differ.

    Raises:
        ModelError: the first class that only one of the two has is named.
    """
    if odd := sorted(set(facts.class_names) ^ set(classes)):
        where = "the model" if odd[0] in facts.class_names else "the images"
        raise ModelError(f"other classes: {odd[0]!r} is known to {where} alone")


def ask(
    model: Path, forms: Sequence[str] | Mapping[str, Any], parts: Mapping[str, core.Labelled], *,
    threads: int, device: str = "cpu", memory: bool = True,
) -> dict[str, npt.NDArray[Any]]:  # fmt: skip
    """What the forms of a model folder answer; see the module for the arrays.

    Raises:
        DatasetError: an image cannot be read.
    """
    asked = Together([open_form(model, form, threads=threads, device=device) for form in forms])
    facts = asked.predictors[0].facts
    classes = next(iter(parts.values())).classes
    number = np.array([classes.index(name) for name in facts.class_names])  # orders may differ
    views = {part: _of_files(asked, images) for part, images in parts.items()}
    if memory:
        for kind, images in strange_images(asked.view, classes).items():
            cut = [images[i : i + 32] for i in range(0, len(images), 32)]
            views[kind] = np.concatenate([asked.outputs(one).values for one in cut])
    empty = memory_mb(None, threads=threads) if memory else None
    answers: dict[str, npt.NDArray[Any]] = {}
    for n, form in enumerate(forms):
        for kind, values in views.items():
            answers[f"{form}/{kind}_top"] = values[:, 3 * n + 1].astype(np.float32)
            if kind in parts:
                answers[f"{form}/{kind}"] = number[values[:, 3 * n].astype(np.int64)]
        if CALIBRATION in parts:
            answers[f"{form}/calibration_exit"] = views[CALIBRATION][:, 3 * n + 2].astype(np.int8)
        if empty is not None:
            peak = memory_mb(model, form, threads=threads)
            answers[f"{form}/memory"] = np.array(np.nan if peak is None else peak - empty)
    return answers


def _of_files(asked: Together, images: core.Labelled) -> npt.NDArray[np.float64]:
    found = core.judge(asked, images)  # type: ignore[arg-type]
    if found.bad:
        path, reason = found.bad[0]
        raise DatasetError(f"{path}: {reason} ({len(found.bad)} images of {images.part} are gone)")
    return np.asarray(found.values)


def answers_digest(
    facts: Path, forms: Mapping[str, Any], parts: Mapping[str, core.Labelled]
) -> str:
    """Of what decides the answers: the model's description (with its files' hashes), the split."""
    about = [VERSION, *forms, str(parts[TEST].split_hash)]
    return hashlib.sha256("\n".join(about).encode() + facts.read_bytes()).hexdigest()


def kept_answers(file: Path, digest: str) -> dict[str, npt.NDArray[Any]] | None:
    """The answers in a file; None where there is none, or of another model or split."""
    if not file.is_file():
        return None
    with np.load(file) as found:
        if str(found["digest"]) != digest:
            return None
        return {name: found[name] for name in found.files if name != "digest"}


def keep_answers(file: Path, answers: Answers, digest: str) -> None:
    """Write them at once."""

    def to(scratch: Path) -> None:
        with scratch.open("wb") as target:  # NumPy would add an ending to a name
            np.savez_compressed(target, digest=np.array(digest), **answers)  # type: ignore[arg-type]

    atomic_write(file, to)


def stored_answers(folder: Path, candidate: str) -> Answers:
    """What :func:`judge` kept of a candidate."""
    with np.load(folder / CANDIDATES / candidate / ANSWERS_FILE) as found:
        return {name: found[name] for name in found.files}

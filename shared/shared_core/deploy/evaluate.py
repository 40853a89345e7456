"""Judge a finished model on labelled images: the numbers that a stranger can check."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core import metrics
from shared_core.datasets import Manifest, scan
from shared_core.deploy.evaluate_page import print_evaluation, write_evaluation
from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.inputs import load_files
from shared_core.deploy.latency import measure_latency
from shared_core.deploy.options import EvaluateOptions
from shared_core.deploy.predictor import Predictor
from shared_core.metrics.intervals import wilson_interval
from shared_core.runs.command import UsageError
from shared_core.runs.environment import environment
from shared_core.runs.json_files import write_json
from shared_core.runs.progress import progress
from shared_core.texts import say

Labels = npt.NDArray[np.int64]
_FEATURES = 4096  # rows that are compared with all others at a time


@dataclass(frozen=True)
class Labelled:
    """Image files with their classes.

    Attributes:
        files: in a fixed order.
        labels: ``(N,)``, indices into ``classes``.
        classes: their names; the model's own, where it has any.
        part: of the split or the set; None: everything.
        split_hash: of the manifest; None without one.
    """

    files: list[Path]
    labels: Labels
    classes: tuple[str, ...]
    part: str | None = None
    split_hash: str | None = None


@dataclass(frozen=True)
class Judged:
    """What a model said of the images that could be read.

    Attributes:
        values: probabilities ``(M, K)``, or features ``(M, D)``.
        labels: ``(M,)``.
        exits: ``(M,)``, or None.
        bad: files that could not be read, with the reason.
        sample: the first views, uint8, to measure time with.
    """

    values: npt.NDArray[Any]
    labels: Labels
    exits: Labels | None
    bad: list[tuple[str, str]]
    sample: npt.NDArray[np.uint8]


def labelled_images(options: EvaluateOptions, facts: ModelFacts) -> Labelled:
    """The images that the options name, with the model's class numbers.

    Raises:
        DatasetError: no class folders, a folder that is none of the model's classes, no such part.
        ModelError: a manifest of other classes.
    """
    if options.split is not None:
        manifest = Manifest.read(options.split, root=options.data)
        classes = facts.class_names or manifest.classes
        if set(classes) != set(manifest.classes):
            facts.check_class_names(manifest.classes, who=str(options.split))
        number = {name: label for label, name in enumerate(classes)}  # orders may differ
        items = manifest.subset(options.part)
        labels = np.array([number[manifest.classes[item.label]] for item in items], np.int64)
        files = [options.data / item.path for item in items]
        return Labelled(files, labels, classes, options.part, manifest.hash)
    listing = scan(options.data, classes=facts.class_names or None)
    samples, part = list(listing.samples), None
    if listing.layout == "split":
        part = options.part
        samples = [sample for sample in samples if sample.split == part]
        if not samples:
            known = sorted({str(sample.split) for sample in listing.samples})
            raise UsageError(f"--part {part}: {options.data} has {', '.join(known)}")
    labels = np.array([sample.label for sample in samples], np.int64)
    return Labelled([sample.path for sample in samples], labels, listing.classes, part)


def judge(
    predictor: Predictor, images: Labelled, *, batch_size: int = 32, workers: int = 2
) -> Judged:
    """Ask the model about all images, in their order.

    Raises:
        ValueError: none of them can be read.
    """
    batches = load_files(images.files, predictor.view, batch_size=batch_size, workers=workers)
    if sys.stderr.isatty():
        total = -(-len(images.files) // batch_size)
        batches = progress(batches, total=total, label="evaluate")
    values, exits, kept, bad, number = [], [], [], [], 0
    sample = np.empty((0, *predictor.view.size, 3), np.uint8)
    for batch in batches:
        for source in batch.sources:
            if source.error is None:
                kept.append(number)
            else:
                bad.append((source.path, source.error))
            number += 1
        if not len(batch.images):
            continue
        outputs = predictor.outputs(batch.images)
        values.append(np.asarray(outputs.values))
        exits.append(outputs.exits)
        if len(sample) < 64:
            sample = np.concatenate([sample, batch.images])
    if not values:
        raise ValueError(f"none of the {len(images.files)} images can be read; the first: {bad[0]}")
    left = [one for one in exits if one is not None]
    return Judged(
        np.concatenate(values), images.labels[kept], np.concatenate(left) if left else None, bad,
        sample,
    )  # fmt: skip


def share(correct: int, total: int) -> dict[str, Any]:
    """A share with its 95 % interval and its count; nothing but the count of none."""
    if not total:
        return {"value": None, "low": None, "high": None, "images": 0}
    low, high = wilson_interval(correct, total)
    return {"value": correct / total, "low": low, "high": high, "images": total}


def evaluate(
    predictor: Predictor,
    images: Labelled,
    *,
    batch_size: int = 32,
    workers: int = 2,
    latency_batches: tuple[int, ...] = (1,),
    other: Predictor | None = None,
) -> dict[str, Any]:
    """All numbers as plain JSON.

    Args:
        predictor: task ``classify`` or ``embed``.
        images: see :func:`labelled_images`.
        latency_batches: batch sizes whose time is measured; empty for none.
        other: is asked the same images.

    Raises:
        ModelError: ``other`` has other classes.
        ValueError: no image can be read.
    """
    facts = predictor.facts
    if other is not None:
        facts.check_class_names(other.facts.class_names, who=other.name)
    judged = judge(predictor, images, batch_size=batch_size, workers=workers)
    found: dict[str, Any] = {
        "model": predictor.name,
        "runtime": predictor.runtime,
        "threads": predictor.threads,
        "project": facts.project,
        "architecture": facts.architecture,
        "task": facts.task,
        "data": {
            "part": images.part,
            "split_hash": images.split_hash,
            "images": len(judged.labels),
            "unreadable": [{"path": path, "reason": reason} for path, reason in judged.bad],
        },
    }
    if facts.task == "embed":
        found |= nearest_neighbours(judged.values, judged.labels)
    else:
        found |= classification(judged, images.classes, facts.unknown_threshold)
        if judged.exits is not None:
            found["exits"] = exit_shares(predictor, judged)
    if other is not None:
        second = judge(other, images, batch_size=batch_size, workers=workers)
        if len(second.labels) != len(judged.labels):
            raise ValueError(f"{other.name} could read {len(second.labels)} of the images only")
        found["against"] = agreement(other, judged, second, facts.task)
    if latency_batches:
        runs = {"model": predictor.probabilities}
        if other is not None and other.view.size == predictor.view.size:
            runs["against"] = other.probabilities
        found["latency"] = measure_latency(runs, judged.sample, batches=latency_batches)
    return {**found, "environment": environment()}


def classification(
    judged: Judged, classes: tuple[str, ...], unknown_threshold: float | None = None
) -> dict[str, Any]:
    """Accuracy, macro over the classes present, per class, confusion, calibration."""
    counts = metrics.Confusion(len(classes))
    predicted = judged.values.argmax(axis=1)
    counts.update(predicted, judged.labels)
    matrix = counts.result()
    scores = metrics.per_class(matrix)
    present = scores.support > 0
    right = predicted == judged.labels
    rows = []
    for k, name in enumerate(classes):
        recall = share(int(matrix[k, k]), int(scores.support[k]))
        numbers = {"precision": float(scores.precision[k]), "f1": float(scores.f1[k])}
        rows.append(
            {"class": name, "recall": recall, **numbers, "predicted": int(matrix[:, k].sum())}
        )
    confidence = judged.values.max(axis=1).astype(np.float64)
    found: dict[str, Any] = {
        "accuracy": share(int(right.sum()), len(right)),
        "macro": {
            "classes": int(present.sum()),
            "recall": float(scores.recall[present].mean()),
            "precision": float(scores.precision[present].mean()),
            "f1": float(scores.f1[present].mean()),
        },
        "ece": metrics.ece(np.clip(confidence, 0, 1), right),
        "mean_confidence": float(confidence.mean()),
        "per_class": rows,
        "confusion": matrix.tolist(),
    }
    if unknown_threshold is not None:
        known = confidence >= unknown_threshold
        found["unknown"] = {
            "threshold": unknown_threshold,
            "answered": share(int(known.sum()), len(known)),
            "accuracy_of_answered": share(int(right[known].sum()), int(known.sum())),
        }
    return found


def exit_shares(predictor: Predictor, judged: Judged) -> dict[str, Any]:
    """How many images left at each exit, how many of these were right, and what it cost."""
    exits = predictor.facts.exits
    assert exits is not None and judged.exits is not None
    right = judged.values.argmax(axis=1) == judged.labels
    rows = []
    for index, macs in enumerate(exits.costs):
        here = judged.exits == index
        row = {"exit": predictor.exit_name(index), "share": float(here.mean()), "macs": macs}
        rows.append({**row, "accuracy": share(int(right[here].sum()), int(here.sum()))})
    mean = float(np.mean([exits.costs[index] for index in judged.exits]))
    return {
        "policy": predictor.policy_state(),
        "at": rows,
        "mean_macs": mean,
        "macs_fraction": mean / exits.costs[-1],
    }


def nearest_neighbours(features: npt.NDArray[Any], labels: Labels) -> dict[str, Any]:
    """Leave-one-out: whether the most similar other image (by cosine) has the same class.

    ``nearest`` counts all images; ``recall_at_1`` those that have another image of their class.

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} image, expected at least two to compare")
    unit = np.asarray(features, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    same = np.empty(len(unit), bool)
    for start in range(0, len(unit), _FEATURES):
        rows = np.arange(start, min(start + _FEATURES, len(unit)))
        similar = unit[rows] @ unit.T
        similar[np.arange(len(rows)), rows] = -np.inf  # not itself
        same[rows] = labels[similar.argmax(axis=1)] == labels[rows]
    has_match = np.bincount(labels)[labels] > 1
    return {
        "nearest": share(int(same.sum()), len(same)),
        "recall_at_1": share(int(same[has_match].sum()), int(has_match.sum())),
    }


def agreement(other: Predictor, ours: Judged, theirs: Judged, task: str) -> dict[str, Any]:
    """How the other model answers the same images."""
    a, b = np.asarray(ours.values, np.float64), np.asarray(theirs.values, np.float64)
    found: dict[str, Any] = {"model": other.name, "runtime": other.runtime}
    if task == "embed":
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
        return {**found, "smallest_cosine": float(cosine.min()), "cosine": float(cosine.mean())}
    first, second = a.argmax(axis=1), b.argmax(axis=1)
    right, their_right = first == ours.labels, second == ours.labels
    return {
        **found,
        "same_class": share(int((first == second).sum()), len(first)),
        "accuracy": share(int(their_right.sum()), len(first)),
        "only_model_right": int((right & ~their_right).sum()),
        "only_other_right": int((~right & their_right).sum()),
        "largest_difference": float(np.abs(a - b).max()),
        "mean_difference": float(np.abs(a - b).mean()),
    }


def run_evaluate(
    predictor: Predictor, options: EvaluateOptions, *, other: Predictor | None = None
) -> int:
    """Judge, print, write. Returns the exit code: 1 when an image could not be read.

    Args:
        other: the model of ``--against``, opened.
    """
    images = labelled_images(options, predictor.facts)
    found = evaluate(
        predictor, images, batch_size=options.batch_size, workers=options.workers,
        latency_batches=options.latency_batches, other=other,
    )  # fmt: skip
    bad = found["data"]["unreadable"]
    for one in bad:
        say(f"unreadable: {one['path']}: {one['reason']}", sys.stderr)
    print_evaluation(found)
    if options.json is not None:
        write_json(options.json, found)
    if options.report is not None:
        write_evaluation(options.report, found)
    return 1 if bad else 0

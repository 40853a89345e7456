"""Predictions in a file, from which every metric can be computed again.

``.npz`` keeps the arrays as they are; ``.csv`` is for people and spreadsheets, and gives
back the same numbers to the last bit (as float64).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.metrics.arrays import Integers, as_labels, as_scores


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of N samples."""

    probs: npt.NDArray[Any]  # (N, C), fractions in [0, 1]
    labels: Integers  # (N,), the true classes
    keys: tuple[str, ...]  # N names of the samples
    class_names: tuple[str, ...]  # C names


def save_predictions(
    path: str | Path,
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    keys: Sequence[str],
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write predictions to a ``.npz`` or ``.csv`` file, whole or not at all.

    Args:
        path: its ending chooses the format.
        probs: (N, C); any scores are kept as they are.
        labels: (N,).
        keys: N names of the samples, such as relative paths.
        class_names: C names; the class numbers when absent.
    """
    target = Path(path)
    table = np.asarray(probs)
    checked = as_scores(table)
    truth = as_labels(labels, num_classes=checked.shape[1])
    names = [str(i) for i in range(checked.shape[1])] if class_names is None else list(class_names)
    if not len(checked) == len(truth) == len(keys):
        raise ValueError(
            f"got {len(checked)} rows, {len(truth)} labels and {len(keys)} keys, expected as many"
        )
    if len(names) != checked.shape[1]:
        raise ValueError(f"got {len(names)} class names for {checked.shape[1]} classes")
    if target.suffix not in (".npz", ".csv"):
        raise ValueError(f"{target} ends in {target.suffix!r}, expected .npz or .csv")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".tmp")
    try:
        if target.suffix == ".npz":
            with scratch.open("wb") as file:
                np.savez(
                    file,
                    probs=table,
                    labels=truth,
                    keys=np.array(list(keys), dtype=np.str_),
                    class_names=np.array(names, dtype=np.str_),
                )
        else:
            with scratch.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text:
                writer = csv.writer(text)
                writer.writerow(["key", "label", *names])
                for key, label, row in zip(keys, truth, checked, strict=True):
                    writer.writerow([key, int(label), *(repr(float(p)) for p in row)])
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def load_predictions(path: str | Path) -> Predictions:
    """Read what ``save_predictions`` wrote. Nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or broken.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no predictions at {source}")
    if source.suffix not in (".npz", ".csv"):
        raise ValueError(f"{source} ends in {source.suffix!r}, expected .npz or .csv")
    try:
        found = _from_npz(source) if source.suffix == ".npz" else _from_csv(source)
        table = as_scores(found.probs, rows=len(found.labels))
        as_labels(found.labels, num_classes=table.shape[1])
        if len(found.keys) != len(table) or len(found.class_names) != table.shape[1]:
            raise ValueError("names do not fit the table")
    except Exception as error:  # numpy, zip and csv each raise their own for a broken file
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} is not a file of predictions: {reason}") from error
    return found


def _from_npz(source: Path) -> Predictions:
    with np.load(source, allow_pickle=False) as file:
        return Predictions(
            probs=file["probs"],
            labels=as_labels(file["labels"]),
            keys=tuple(str(key) for key in file["keys"]),
            class_names=tuple(str(name) for name in file["class_names"]),
        )


def _from_csv(source: Path) -> Predictions:
    with source.open(encoding="utf-8", errors="surrogateescape", newline="") as text:
        head, *rows = list(csv.reader(text))
    if head[:2] != ["key", "label"]:
        raise ValueError(f"the first line begins with {head[:2]}, expected key,label")
    return Predictions(
        probs=np.array([[float(p) for p in row[2:]] for row in rows]).reshape(-1, len(head) - 2),
        labels=as_labels(np.array([int(row[1]) for row in rows], dtype=np.int64)),
        keys=tuple(row[0] for row in rows),
        class_names=tuple(head[2:]),
    )

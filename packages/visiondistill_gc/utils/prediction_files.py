"""Predictions in a file, from which every metric can be computed again.

``.npz`` keeps the arrays as they are; ``.csv`` is for people and spreadsheets, and gives
back the same numbers to the last bit (as float64).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_core.checkpoints import atomic_write
from shared_core.metrics.arrays import as_labels, as_scores


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of N samples."""

    probs: NDArray[Any]  # (N, C), fractions in [0, 1]
    labels: NDArray[np.int64]  # (N,), the true classes
    keys: tuple[str, ...]  # N names of the samples
    class_names: tuple[str, ...]  # C names


def save_predictions(
    path: str | Path,
    probs: ArrayLike,
    labels: ArrayLike,
    keys: Sequence[str],
    *,
    class_names: Sequence[str],
) -> None:
    """Write predictions to a ``.npz`` or ``.csv`` file, whole or not at all.

    Args:
        path: its ending chooses the format.
        probs: (N, C); any scores are kept as they are.
        labels: (N,).
        keys: N names of the samples, such as relative paths.
        class_names: C names.

    Raises:
        ValueError: lengths that do not fit, or another ending.
    """
    target, table, truth = Path(path), np.asarray(probs), as_labels(labels)
    found = Predictions(table, truth, tuple(keys), tuple(class_names))
    _check(found)
    writers = {".npz": _write_npz, ".csv": _write_csv}
    if target.suffix not in writers:
        raise ValueError(f"{target} ends in {target.suffix!r}, expected .npz or .csv")
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, lambda scratch: writers[target.suffix](scratch, found))


def load_predictions(path: str | Path) -> Predictions:
    """Read what ``save_predictions`` wrote. Nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or broken.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no predictions at {source}")
    try:
        found = _from_npz(source) if source.suffix == ".npz" else _from_csv(source)
        _check(found)
    except Exception as error:  # numpy, zip and csv each raise their own for a broken file
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} is not a file of predictions: {reason}") from error
    return found


def _check(found: Predictions) -> None:
    table = as_scores(found.probs)
    as_labels(found.labels, num_classes=table.shape[1])
    if not len(table) == len(found.labels) == len(found.keys):
        raise ValueError(
            f"got {len(table)} rows, {len(found.labels)} labels and {len(found.keys)} keys, "
            "expected as many"
        )
    if len(found.class_names) != table.shape[1]:
        raise ValueError(f"got {len(found.class_names)} class names for {table.shape[1]} classes")


def _write_npz(path: Path, found: Predictions) -> None:
    with path.open("wb") as file:
        np.savez(
            file,
            probs=found.probs,
            labels=found.labels,
            keys=np.array(found.keys, dtype=np.str_),
            class_names=np.array(found.class_names, dtype=np.str_),
        )


def _write_csv(path: Path, found: Predictions) -> None:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["key", "label", *found.class_names])
        for key, label, row in zip(found.keys, found.labels, found.probs, strict=True):
            writer.writerow([key, int(label), *(repr(float(p)) for p in row)])


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

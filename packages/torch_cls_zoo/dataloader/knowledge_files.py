"""Teachers' probabilities as ``distill*.txt``: written and averaged, a missing one refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torch_cls_zoo.dataloader.sample_files import (
    missing_line,
    read_sample_file,
    rows_for,
    write_sample_file,
)

PATTERN, LABEL_FILE = "distill*.txt", "label.txt"
ROW_SUM = 1e-3  # how far from 1 a row of a softmax teacher may sum


@dataclass(frozen=True)
class SoftTargets:
    """What the training learns from in place of the labels."""

    values: np.ndarray  # float32 (N, C), in the order of the images
    files: tuple[str, ...]
    missing: int  # samples that had no teacher and keep their label


def write_knowledge(
    folder: Path,
    paths: Sequence[str],
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    name: str,
    about: Mapping[str, Any],
) -> tuple[Path, Path]:
    """Write the teacher's file and ``label.txt`` with the true classes in the same form.

    Args:
        folder: where; the data folder by default of the command.
        paths: below the data folder.
        probabilities: float ``(N, C)``.
        labels: class numbers ``(N,)``.
        name: of the teacher's file, to match ``distill*.txt``.
        about: who the teacher is; ``classes`` among it.

    Raises:
        ValueError: a name that ``--distill`` would not find.
    """
    if not Path(name).match(PATTERN) or Path(name).name != name:
        raise ValueError(f"knowledge file is {name!r}, expected a name like distill_b0.txt")
    soft, hard = folder / name, folder / LABEL_FILE
    write_sample_file(soft, paths, np.asarray(probabilities), about={**about, "what": "teacher"})
    rows = np.eye(np.asarray(probabilities).shape[1], dtype=np.float32)[np.asarray(labels)]
    kept = {key: about[key] for key in ("classes", "split") if key in about}
    write_sample_file(hard, paths, rows, about={**kept, "what": "labels"})
    return soft, hard


def read_knowledge(
    folder: Path,
    paths: Sequence[str],
    labels: np.ndarray,
    *,
    classes: Sequence[str],
    sums_to_one: bool,
    allow_missing: int = 0,
) -> SoftTargets:
    """Average the vectors of each image over all ``distill*.txt`` that have it.

    Args:
        folder: of the files.
        paths: of the training images, below the data folder.
        labels: class numbers ``(N,)``, used where a missing sample is allowed.
        classes: class names; a file that names others is refused.
        sums_to_one: whether the loss wants probabilities of one choice (softmax).
        allow_missing: how many images may have no teacher; they keep their label.

    Raises:
        FileNotFoundError: no such file.
        ValueError: more images without a teacher than allowed, other classes, rows that do not
            sum to 1 where the loss wants that.
    """
    files = sorted(folder.glob(PATTERN))
    if not files:
        raise FileNotFoundError(
            f"no {PATTERN} in {folder}; write one by --knowledge train --resume WEIGHTS"
        )
    total = np.zeros((len(paths), len(classes)))
    count = np.zeros(len(paths), np.int64)
    for path in files:
        read = read_sample_file(path, columns=len(classes), known=paths)
        theirs = read.about.get("classes")
        if theirs is not None and list(theirs) != list(classes):
            raise ValueError(f"{path}: classes are {theirs}, the data has {list(classes)}")
        if sums_to_one:
            sums = read.values.sum(axis=1)
            worst = int(np.abs(sums - 1).argmax())
            if abs(sums[worst] - 1) > ROW_SUM:
                raise ValueError(
                    f"{path}: the row of {read.names[worst]} sums to {sums[worst]:.3f}, expected 1 "
                    "for --criterion softmax; a teacher trained by bce wants --criterion bce"
                )
        rows = rows_for(read, paths)
        found = rows >= 0
        total[found] += read.values[rows[found]]
        count[found] += 1
    absent = count == 0
    if absent.sum() > allow_missing:
        raise ValueError(
            f"{', '.join(path.name for path in files)}: {missing_line(paths, absent)}; write them "
            "by --knowledge train, or allow their number by --distill_allow_missing"
        )
    values = total / np.maximum(count, 1)[:, None]
    values[absent] = np.eye(len(classes))[np.asarray(labels)[absent]]
    return SoftTargets(
        values.astype(np.float32), tuple(path.name for path in files), int(absent.sum())
    )

"""Class matrices from a YAML file: what confusions cost, and the thresholds, for any classes.

The file may name its classes; rows and columns are then put into the order of the data set. Each of
``weights``, ``low`` and ``up`` is a square matrix (rows: true class) or a short form for any size::

    classes: [cat, dog, panda]
    weights: [[1, 0.5, 2], [0.5, 1, 2], [2, 2, 1]]
    low: {diagonal: -0.1, other: 0.05}
    up: {diagonal: 0.95, other: 1.1}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
KEYS = ("classes", "weights", "low", "up")
LOW = {"diagonal": -0.1, "other": 0.05}  # below 0: the true class has no lower limit
UP = {"diagonal": 0.95, "other": 1.1}  # above 1: a wrong class has no upper limit


@dataclass(frozen=True)
class Matrices:
    """``(K, K)`` each: weights (None when the file has none), lower and upper thresholds."""

    weights: Matrix | None
    low: Matrix
    up: Matrix

    @classmethod
    def defaults(cls, num_classes: int) -> Matrices:
        """The published thresholds for ``num_classes``, and no weights."""
        return cls(None, *(_square("", "", short, num_classes) for short in (LOW, UP)))


def load_matrices(
    path: str | Path, *, num_classes: int, classes: Sequence[str] | None = None
) -> Matrices:
    """Read class matrices; what the file leaves out has its default.

    Args:
        path: a YAML file, see the module.
        num_classes: K.
        classes: the data set's classes in its order; needed when the file names classes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, unknown keys, another size, other classes, what is no number, a
            negative weight, or a lower threshold that is not below the upper one.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"class matrices {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"class matrices {path}: not YAML ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"class matrices {path}: expected keys out of {', '.join(KEYS)}")
    if unknown := [str(key) for key in content if key not in KEYS]:
        raise ValueError(
            f"class matrices {path}: key {unknown[0]!r}, expected some of {', '.join(KEYS)}"
        )
    order = _order(path, content.get("classes"), num_classes, classes)
    read = {}
    for key, fallback in (("weights", None), ("low", LOW), ("up", UP)):
        value = content.get(key, fallback)
        if value is None:
            read[key] = None
            continue
        matrix = _square(f"class matrices {path}: ", key, value, num_classes)
        read[key] = matrix[np.ix_(order, order)]
    weights, low, up = read["weights"], read["low"], read["up"]
    if low is None or up is None:
        raise ValueError(f"class matrices {path}: low and up must not be empty")
    if weights is not None and weights.min() < 0:
        raise ValueError(
            f"class matrices {path}: weights has {weights.min():g}, expected 0 or more"
        )
    if (low >= up).any():
        row, column = np.argwhere(low >= up)[0]
        raise ValueError(
            f"class matrices {path}: low {low[row, column]:g} is not below up {up[row, column]:g} "
            f"in row {row + 1}, column {column + 1}"
        )
    return Matrices(weights, low, up)


def _order(path: Path, named: Any, num_classes: int, classes: Sequence[str] | None) -> list[int]:
    """Where the data set's classes stand in the file."""
    if named is None:
        return list(range(num_classes))
    if not isinstance(named, list):
        raise ValueError(f"class matrices {path}: classes is {named!r}, expected a list of names")
    names = [str(name) for name in named]
    if classes is None:
        if len(names) != num_classes:
            raise ValueError(f"class matrices {path}: {len(names)} classes, expected {num_classes}")
        return list(range(num_classes))
    if sorted(names) != sorted(classes):
        odd = sorted(set(names) ^ set(classes))
        raise ValueError(
            f"class matrices {path}: its classes are not those of the data ({', '.join(odd[:4])}), "
            f"expected {', '.join(classes[:8])}"
        )
    return [names.index(name) for name in classes]


def _square(where: str, key: str, value: Any, num_classes: int) -> Matrix:
    if isinstance(value, dict):
        if set(value) != {"diagonal", "other"} or not all(
            isinstance(v, int | float) for v in value.values()
        ):
            raise ValueError(f"{where}{key} is {value}, expected numbers diagonal and other")
        matrix = np.full((num_classes, num_classes), float(value["other"]))
        np.fill_diagonal(matrix, float(value["diagonal"]))
    else:
        try:
            matrix = np.array(value, dtype=np.float64)
        except (ValueError, TypeError):
            raise ValueError(f"{where}{key} is no matrix of numbers") from None
    if matrix.shape != (num_classes, num_classes):
        size = " x ".join(str(side) for side in matrix.shape) or "one number"
        raise ValueError(
            f"{where}{key} is {size}, expected {num_classes} x {num_classes} for "
            f"{num_classes} classes"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(f"{where}{key} has a value that is not finite")
    return matrix

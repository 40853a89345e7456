"""Small text and JSON files of a run, written whole or not at all; read with one-line errors."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Write a small UTF-8 file so that a crash leaves the old one or the new one."""
    from shared_core.checkpoints.atomic import atomic_write  # loads NumPy, which --help must not

    atomic_write(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write ``value`` as indented JSON, see :func:`write_text`; NaN and infinities are refused."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False)
    write_text(path, text + "\n")


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or another value than an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is damaged: JSON that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: expected JSON, {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object of JSON")
    return value


def as_plain(value: Any) -> Any:
    """``value`` as JSON gives it back: paths become text, tuples become lists.

    Raises:
        TypeError: something that is neither plain nor a path.
    """

    def text(other: object) -> str:
        if isinstance(other, PurePath):
            return str(other)
        raise TypeError(f"{other!r} is {type(other).__name__}, expected plain JSON or a path")

    return json.loads(json.dumps(value, default=text))

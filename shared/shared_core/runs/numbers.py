"""Numbers on a command line: one that is out of range is refused, and the range is told."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", int, float)


def number(kind: type[T], low: float, high: float, *, open_low: bool = False) -> Callable[[str], T]:
    """A ``type=`` of argparse for finite numbers in ``[low, high]``.

    Args:
        kind: ``int`` or ``float``.
        open_low: ``low`` itself is refused.
    """

    def parse(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {kind.__name__}") from None
        inside = (low < value if open_low else low <= value) and value <= high
        if not inside or not math.isfinite(value):
            left, right = "(" if open_low else "[", "]" if math.isfinite(high) else ")"
            raise argparse.ArgumentTypeError(f"{text}: expected {left}{low:g}, {high:g}{right}")
        return value

    return parse


POSITIVE = number(float, 0, math.inf, open_low=True)
WEIGHT = number(float, 0, math.inf)
FRACTION = number(float, 0, 1)
COUNT = number(int, 0, 10**9)
SIZE = number(int, 1, 10**9)

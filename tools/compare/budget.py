"""A budget as it is typed: ``ms<=5 mb<=4 accuracy>=0.95``, wishes of which the winner keeps all."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from compare.contract import Limit
from shared_core.runs.command import UsageError

# What may be limited: which side, and what the number means.
KINDS = {
    "ms": ("<=", "milliseconds an image, the median, at the batch of --batch"),
    "mb": ("<=", "megabytes (10^6 bytes) of the network's files on disk"),
    "accuracy": (">=", "on calibration images, a fraction, 0.95 or 95%"),
    "macs": ("<=", "multiply-accumulates an image, 300M or 3e8"),
    "memory": ("<=", "megabytes of memory that answering needs, at its peak"),
}
_WISH = re.compile(r"\s*([A-Za-z]+)\s*(<=|>=|<|>|=)?\s*([^\s,;<>=]*)\s*[,;]?")
_UNITS = {
    "ms": {"": 1.0, "ms": 1.0, "s": 1000.0},
    "mb": {"": 1.0, "mb": 1.0, "kb": 1e-3, "gb": 1e3},
    "accuracy": {"": 1.0, "%": 0.01},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "memory": {"": 1.0, "mb": 1.0, "kb": 1e-3, "gb": 1e3},
}


def parse_budget(text: str) -> tuple[Limit, ...]:
    """The wishes in ``text``, in the order in which they stand; an empty text is no wish.

    Raises:
        UsageError: an unknown wish, the wrong side, a number that makes no sense, one named twice.
    """
    limits: list[Limit] = []
    rest = text.strip()
    while rest:
        found = _WISH.match(rest)
        if found is None:
            raise UsageError(f"--budget {text!r}: cannot read {rest!r}, expected {_expected()}")
        limits.append(_limit(*found.groups(), whole=text))
        rest = rest[found.end() :]
    twice = [one.what for n, one in enumerate(limits) if one.what in {x.what for x in limits[:n]}]
    if twice:
        raise UsageError(f"--budget {text!r} names {twice[0]} twice, expected it once")
    return tuple(limits)


def budget_text(limits: Sequence[Limit]) -> str:
    """The wishes as they are typed, or ``none``."""
    return " ".join(limit.text for limit in limits) or "none"


def _limit(name: str, side: str | None, number: str, *, whole: str) -> Limit:
    what = name.lower()
    if what not in KINDS:
        raise UsageError(f"--budget {whole!r}: {name!r} is unknown, expected {_expected()}")
    right, means = KINDS[what]
    if side != right:
        raise UsageError(f"--budget {whole!r}: expected {what}{right}NUMBER, {means}")
    parts = re.fullmatch(r"([0-9.]+(?:[eE][+-]?\d+)?)([A-Za-z%]*)", number)
    unit = None if parts is None else _UNITS[what].get(parts[2].lower())
    try:
        value = (
            math.nan if parts is None or unit is None else float(f"{float(parts[1]) * unit:.12g}")
        )
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf) or (what == "accuracy" and value > 1):
        raise UsageError(
            f"--budget {whole!r}: {what}{right}{number or '?'}, expected a number above 0: {means}"
        )
    return Limit(what, value)


def _expected() -> str:
    return "wishes such as " + " ".join(
        f"{what}{side}{'0.9' if what == 'accuracy' else '5'}" for what, (side, _) in KINDS.items()
    )

"""Which file wins: inside the budget, by calibration images alone, within the noise the smaller."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from compare.contract import FORMS, Choice, Judged, Limit, Value
from shared_core.metrics.intervals import Z95

WITHIN = 0.01  # accuracy, a fraction, that a smaller file may give away
SAME_SIZE = 1.05  # sizes within this factor count as one
FASTER = 1.5  # another runtime of the same files must be so much faster to be taken
UNITS = {"ms": " ms", "mb": " MB", "memory": " MB", "macs": " MACs"}

Bits = npt.NDArray[np.bool_]


def pack_bits(right: Bits) -> str:
    """Bits ``(N,)`` as text: their number, a colon, hexadecimal digits."""
    return f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def unpack_bits(text: str) -> Bits:
    """What :func:`pack_bits` packed."""
    count, _, digits = text.partition(":")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=int(count))
    return bits.astype(bool)


def paired(first: Bits, second: Bits) -> Value:
    """How much more often ``first`` is right than ``second`` on the same images, a fraction.

    The interval holds 95 % and is not empty where both answer alike.

    Source: Agresti and Min 2005, Statistics in Medicine 24(5): Wald's interval of a difference of
    matched pairs after half an image is added to each cell of the table.
    """
    count = len(first)
    if not count or len(second) != count:
        raise ValueError(f"{count} and {len(second)} answers, expected as many and at least one")
    gained, lost = int((first & ~second).sum()), int((~first & second).sum())
    total, above, below = count + 2.0, gained + 0.5, lost + 0.5
    middle = (above - below) / total
    half = Z95 * math.sqrt(above + below - (above - below) ** 2 / total) / total
    return Value((gained - lost) / count, max(-1.0, middle - half), min(1.0, middle + half))


def at_least(right: int, total: int, *, confidence: float = 0.95) -> float:
    """The accuracy that a network has at least, given what it answered of a random sample.

    Source: Clopper and Pearson 1934, Biometrika 26(4), one-sided: exact for every sample size.
    """
    if not 0 <= right <= total or not total:
        raise ValueError(f"{right} of {total}, expected a count of 0 to at least 1 images")
    if right == 0:
        return 0.0
    from scipy.special import betaincinv

    return float(betaincinv(right, total - right + 1, 1 - confidence))


def milliseconds(row: Judged, batch: int) -> float:
    """The median time of an image at this batch size."""
    if str(batch) not in row.latency:
        raise ValueError(f"{row.name} was not timed at batch {batch}, expected it for the budget")
    return row.latency[str(batch)]["p50"]


def pareto(rows: Sequence[Judged], batch: int) -> tuple[tuple[str, str], ...]:
    """(candidate, form) of the rows that no other one matches in time, bytes and accuracy.

    Accuracy is that on calibration; the most accurate comes first. Of rows equal in all three the
    simplest is kept.
    """
    ordered = sorted(rows, key=_simplicity)
    points = np.array(
        [[milliseconds(row, batch), row.bytes, -row.calibration_accuracy] for row in ordered]
    )
    kept = []
    for number, point in enumerate(points):
        no_worse, better = (points <= point).all(axis=1), (points < point).any(axis=1)
        equal_before = (points[:number] == point).all(axis=1).any()
        if not (no_worse & better).any() and not equal_before:
            kept.append(ordered[number])
    kept.sort(key=lambda row: -row.calibration_accuracy)
    return tuple((row.candidate, row.form) for row in kept)


def choose(
    rows: Sequence[Judged], budget: Sequence[Limit], *, batch: int = 1, within: float = WITHIN
) -> Choice:
    """The winner, or the nearest where none keeps to the budget.

    With a budget: the most accurate of those that keep to it; one that gives away at most
    ``within`` of accuracy, and whose paired 95 % interval holds 0, is as good, and of these the
    smallest is taken. Without one: the smallest that gives away at most ``within``. Only
    calibration images count; the test split gives the promise ``at_least`` alone.

    Args:
        batch: images at once that the budget's ms means.
        within: a fraction of accuracy.

    Raises:
        ValueError: no row that can be shipped.
    """
    shipped = [row for row in rows if row.form in FORMS and row.form != "paddle"]
    if not shipped:
        raise ValueError(f"none of {len(rows)} judged files can be shipped, expected at least one")
    over = {row.name: _over(row, budget, batch) for row in shipped}
    fitting = [row for row in shipped if not any(over[row.name].values())]
    front = pareto(shipped, batch)
    if not fitting:
        nearest = min(shipped, key=lambda row: (sum(over[row.name].values()), *_simplicity(row)))
        missed = tuple(
            f"{limit.text}: {_told(nearest, limit, batch)}"
            for limit in budget if over[nearest.name][limit.what]
        )  # fmt: skip
        sentence = (
            f"None of {len(shipped)} files keeps to {_typed(budget)}; the nearest is "
            f"{nearest.name} ({'; '.join(missed)})."
        )
        return Choice(nearest.candidate, nearest.form, False, sentence, front, missed,
                      _promise(nearest))  # fmt: skip
    best = min(fitting, key=lambda row: (-row.calibration_accuracy, *_simplicity(row)))
    good = [row for row in fitting if _as_good(row, best, within, noise=bool(budget))]
    winner = _fastest_runtime(min(good, key=_simplicity), good, batch)
    sentence = _reason(winner, best, len(good), len(fitting), budget, batch, within)
    return Choice(winner.candidate, winner.form, True, sentence, front, (), _promise(winner))


def _as_good(row: Judged, best: Judged, within: float, *, noise: bool) -> bool:
    gap = paired(unpack_bits(row.right), unpack_bits(best.right))
    return gap.value >= -within - 1e-12 and (not noise or gap.high >= 0)


def _over(row: Judged, budget: Sequence[Limit], batch: int) -> dict[str, float]:
    """By wish, the part of its limit by which a row misses it; 0 where it keeps to it."""
    found = {}
    for limit in budget:
        value = _measured(row, limit, batch)
        ratio = 2.0 if value is None else value / limit.value
        found[limit.what] = max(0.0, 1 - ratio if limit.least else ratio - 1)
    return found


def _measured(row: Judged, limit: Limit, batch: int) -> float | None:
    if limit.what == "ms":
        return milliseconds(row, batch)
    numbers = {"mb": row.bytes / 1e6, "accuracy": row.calibration_accuracy,
               "macs": row.macs, "memory": row.memory_mb}  # fmt: skip
    return numbers[limit.what]


def _simplicity(row: Judged) -> tuple[float, float, int, int, int, str, str]:
    """Smaller first, then less work, then as planned: nothing that differs from run to run."""
    size = math.floor(math.log(max(row.bytes, 1)) / math.log(SAME_SIZE))
    macs = math.inf if row.macs is None else row.macs
    form = list(FORMS).index(row.form)
    return (size, macs, row.order, row.bytes, form, row.candidate, row.form)


def _fastest_runtime(winner: Judged, good: Sequence[Judged], batch: int) -> Judged:
    """The same files under another runtime, where that is clearly faster."""
    same = [row for row in good
            if (row.candidate, row.files) == (winner.candidate, winner.files)]  # fmt: skip
    fastest = min(same, key=lambda row: (milliseconds(row, batch), row.form))
    clearly = milliseconds(fastest, batch) * FASTER < milliseconds(winner, batch)
    return fastest if clearly else winner


def _promise(row: Judged) -> float:
    total = sum(one.support for one in row.per_class)
    return at_least(round(row.accuracy.value * total), total)


def _typed(budget: Sequence[Limit]) -> str:
    return " ".join(limit.text for limit in budget)


def _told(row: Judged, limit: Limit, batch: int) -> str:
    value = _measured(row, limit, batch)
    if value is None:
        return "not known"
    return f"{value:.4g}{UNITS.get(limit.what, '')}"


def _reason(
    winner: Judged, best: Judged, good: int, fitting: int, budget: Sequence[Limit], batch: int,
    within: float,
) -> str:  # fmt: skip
    about = f"{milliseconds(winner, batch):.3g} ms at batch {batch}, {winner.bytes / 1e6:.3g} MB"
    among = f"the {fitting} files that keep to {_typed(budget)}" if budget else f"{fitting} files"
    right = unpack_bits(winner.right), unpack_bits(best.right)
    gap, on = paired(*right), f"the {len(right[0])} calibration images"
    own = f"{winner.calibration_accuracy:.4f}"
    if good == 1:
        return (
            f"{winner.name} ({about}) is the most accurate of {among} on {on} ({own}), and no "
            f"smaller one comes close."
        )
    if gap.value >= 0:
        return (
            f"{winner.name} ({about}) is the smallest or simplest of the {good} of {among} that "
            f"count as equally accurate on {on}: none is right more often ({own})."
        )
    noise = " and lies within the noise" if budget else ""
    return (
        f"{winner.name} ({about}) is the smallest or simplest of the {good} of {among} that count "
        f"as equally accurate on {on}: it gives away at most {100 * within:g} point"
        f"{'' if within == 0.01 else 's'}{noise}, {own} against {best.calibration_accuracy:.4f} of "
        f"{best.name} ({100 * gap.value:+.1f}, 95 % interval {100 * gap.low:+.1f} to "
        f"{100 * gap.high:+.1f})."
    )

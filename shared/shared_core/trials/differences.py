"""What settings say of one another: their difference paired by seed, its interval, a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared_core.trials.results import Metric, Trials


@dataclass(frozen=True)
class Difference:
    """``a - b`` in one number, paired by the seeds that both have.

    Attributes:
        a, b: names of the settings.
        values: the difference by seed.
        mean: of them.
        interval: ends of Student's 95 % interval of the mean; None of a single seed.
        std: sample deviation; None of a single seed.
        wins: seeds on which ``a`` is greater.
    """

    a: str
    b: str
    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None
    std: float | None
    wins: int

    @property
    def name(self) -> str:
        """``a - b``."""
        return f"{self.a} - {self.b}"

    @property
    def text(self) -> str:
        """In points of a fraction: ``+1.2 points (95 % interval +0.3 to +2.1, 3 of 3 seeds)``."""
        said = f"{100 * self.mean:+.1f} points"
        if self.interval is None:
            return f"{said} (one seed)"
        low, high = (100 * end for end in self.interval)
        seeds = f"{self.wins} of {len(self.values)} seeds"
        return f"{said} (95 % interval {low:+.1f} to {high:+.1f}, {seeds})"

    def plain(self) -> dict[str, Any]:
        """For a record: ``mean``, ``std``, ``low``, ``high``, ``wins``, ``n``, ``values``."""
        low, high = self.interval or (None, None)
        return {
            "mean": self.mean,
            "std": self.std,
            "low": low,
            "high": high,
            "wins": self.wins,
            "n": len(self.values),
            "values": list(self.values),
        }


def compare(trials: Trials, a: str, b: str, metric: Metric) -> Difference:
    """``a - b`` over the seeds that are done for both.

    Raises:
        ValueError: there is none, or a result lacks the number.
    """
    from shared_core.metrics import paired_difference

    seeds = trials.seeds(a, b)
    if not seeds:
        raise ValueError(f"{a} and {b} have no seed in common, expected one or more")
    first, second = (trials.values(name, metric, seeds) for name in (a, b))
    values = tuple(x - y for x, y in zip(first, second, strict=True))
    if len(values) == 1:
        return Difference(a, b, values, values[0], None, None, int(values[0] > 0))
    gap = paired_difference(first, second)
    return Difference(a, b, values, gap.mean, (gap.low, gap.high), gap.std, gap.wins)


def verdict(
    difference: Difference, *, least: float = 0.0, equal_within: float | None = None
) -> str:
    """What a difference says of the claim that ``a`` is ahead of ``b``, in a few words.

    ``holds`` and ``contradicted`` need an interval that lies on one side; between them nothing is
    shown, with so few seeds.

    Args:
        least: the claim speaks of at least so much.
        equal_within: the claim is that both are equal, up to so much.

    Returns:
        ``holds``, ``contradicted``, ``not shown``, ``less than claimed``, ``no difference`` (in
        any seed) or ``one seed only``.
    """
    if difference.interval is None:
        return "one seed only"
    low, high = difference.interval
    if equal_within is not None:
        if -equal_within <= low and high <= equal_within:
            return "holds"
        return "contradicted" if low > equal_within or high < -equal_within else "not shown"
    if not any(difference.values):
        return "no difference"
    if high < 0:
        return "contradicted"
    if low <= 0:
        return "not shown"
    return "less than claimed" if difference.mean < least else "holds"

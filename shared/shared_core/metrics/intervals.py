"""How sure a share is: the 95 % interval of a count of successes."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %


def wilson_interval(successes: int, total: int, *, z: float = Z95) -> tuple[float, float]:
    """Ends in [0, 1] of the interval of a share ``successes / total``.

    It is never empty at 0 and 1, where the usual one is, and holds for small counts.

    Args:
        z: quantile of the normal distribution; the default gives 95 %.

    Raises:
        ValueError: no samples, or a count outside ``[0, total]``.

    Source: E. B. Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} of {total}, expected a count of 0 to at least 1 samples")
    share = successes / total
    weight = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / weight
    half = z / weight * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == total else min(1.0, centre + half)

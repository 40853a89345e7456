"""Uniform quantization that training can see through: grids, rounding, scales.

A number ``x`` becomes ``s * (clip(round(x / s) + z, low, high) - z)``: one of ``2 ** bits`` values.
Rounding has no gradient; it is taken as the identity (the straight-through estimator), so that
``x``, the scale ``s`` and the offset ``z`` can all be learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 16
SMALLEST_SCALE = 1e-8
GRID_STEPS = 80


@dataclass(frozen=True)
class Grid:
    """The integers that ``bits`` bits can hold.

    Attributes:
        bits: 2 to 16.
        signed: ``-2^(b-1) .. 2^(b-1) - 1``, else ``0 .. 2^b - 1``.
        narrow: without the lowest of the signed integers, so that the grid is symmetric.

    Raises:
        ValueError: bits out of range, or narrow without a sign.
    """

    bits: int
    signed: bool
    narrow: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"{self.bits} bits, expected {MIN_BITS} to {MAX_BITS}")
        if self.narrow and not self.signed:
            raise ValueError("a narrow grid is a signed one, expected signed=True")

    @property
    def low(self) -> int:
        """The lowest integer."""
        return -(2 ** (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def high(self) -> int:
        """The highest integer."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def levels(self) -> int:
        """How many values there are: ``2 ** bits``, one less on a narrow grid (ternary at 2)."""
        return self.high - self.low + 1


def round_through(x: Tensor) -> Tensor:
    """``round(x)`` (half to even) with the gradient of ``x``.

    Source: Bengio et al. 2013, arXiv:1308.3432.
    """
    return x + (x.round() - x).detach()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` with its gradient times ``factor``."""
    return x.detach() * (1 - factor) + x * factor


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """``x`` on the grid, in the units of ``x``: ``s * round(clip(x / s, low - z, high - z))``.

    First clipped, then rounded: clipping passes no gradient at its ends, and rounding first would
    put every value of the outer half steps there. The gradient is that of LSQ: 1 for ``x``
    strictly within the grid and 0 outside; for the scale ``round(x / s) - x / s`` within, the
    grid's end (less ``z``) outside; for the offset 0 within and ``-s`` outside.

    Args:
        x: float, any shape.
        scale: positive, of a shape that broadcasts to ``x`` (``(C, 1, 1, 1)`` for a weight).
        zero_point: offset in integers, of the scale's shape; None = 0.

    Source: Esser et al. 2020, arXiv:1902.08153, equations 1 to 3; with an offset Bhalgat et al.
        2020, arXiv:2004.09576, equations 1 to 4.
    """
    scaled = x / scale
    if zero_point is None:
        return round_through(F.hardtanh(scaled, grid.low, grid.high)) * scale
    offset = round_through(zero_point)
    low, high = grid.low - offset, grid.high - offset
    # torch.clamp would give an end that is a tensor half of the gradient of what lies on it.
    held = torch.where(scaled <= low, low, torch.where(scaled >= high, high, scaled))
    return round_through(held) * scale


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """``(C,)`` in a shape that broadcasts along the first axis of ``like``."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def scale_from_range(
    low: Tensor, high: Tensor, grid: Grid, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and offset with which the grid spans ``[low, high]``; zero stays exactly zero.

    Args:
        low, high: ends of the range, any shape; widened to hold 0.
        symmetric: offset 0, the range is ``[-max, max]`` for a signed grid.

    Returns:
        scale (positive) and zero point (an integer as float), of the shape of ``low``.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        reach = (
            torch.maximum(-low / max(-grid.low, 1), high / grid.high)
            if grid.signed
            else (high / grid.high)
        )
        return reach.clamp(min=SMALLEST_SCALE), torch.zeros_like(reach)
    scale = ((high - low) / (grid.high - grid.low)).clamp(min=SMALLEST_SCALE)
    return scale, (grid.low - low / scale).round().clamp(grid.low, grid.high)


def best_scale(
    x: Tensor,
    grid: Grid,
    *,
    symmetric: bool,
    channels: bool,
    power: float = 2.4,
    steps: int = GRID_STEPS,
) -> tuple[Tensor, Tensor]:
    """The scale and offset of the least error ``mean |x - q(x)|^power`` among shrunken ranges.

    The range is that of the values times ``1 - 0.01 k`` for ``k`` in ``0 .. steps - 1``. At few
    bits it pays to cut off the few largest values.

    Args:
        x: float; with ``channels`` each slice along the first axis gets its own scale.
        power: 2.4 weighs large errors more than a square, which suits accuracy better.

    Returns:
        scale and zero point, ``(C,)`` with ``channels``, else scalars.

    Source: Nagel et al. 2020, arXiv:2004.10568, appendix, and Li et al. 2021, arXiv:2102.05426:
        the search and the power are those of BRECQ's published code.
    """
    rows = x.detach().reshape(x.shape[0], -1) if channels else x.detach().reshape(1, -1)
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    best = torch.full_like(low, torch.inf)
    scale, zero = scale_from_range(low, high, grid, symmetric=symmetric)
    for step in range(steps):
        share = 1.0 - 0.01 * step
        trial, offset = scale_from_range(low * share, high * share, grid, symmetric=symmetric)
        found = fake_quantize(rows, trial[:, None], offset[:, None], grid)
        error = (found - rows).abs().pow(power).mean(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, trial, scale), torch.where(better, offset, zero)
    return (scale, zero) if channels else (scale[0], zero[0])

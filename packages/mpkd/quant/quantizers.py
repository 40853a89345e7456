"""Quantisers as modules: weights by channel, activations by tensor, scales learned or fixed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mpkd.quant.fake_quant import (
    SMALLEST_SCALE,
    Grid,
    best_scale,
    fake_quantize,
    per_channel,
    scale_from_range,
    scale_gradient,
)

METHODS = ("minmax", "mse")


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"range method {method!r}: expected one of {', '.join(METHODS)}")


class WeightQuantizer(nn.Module):
    """A weight on a grid of its own for each output channel.

    Args:
        weight: ``(out, ...)``; sets the scales.
        bits: 2 to 16.
        symmetric: offset 0 and a symmetric grid (what TensorRT wants), else an offset as well.
        method: ``mse`` searches the range of the least error, ``minmax`` takes all values.
        learned: the scales get gradients (LSQ).
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        bits: int,
        symmetric: bool = True,
        method: str = "mse",
        learned: bool = False,
    ) -> None:
        super().__init__()
        _check_method(method)
        self.symmetric = symmetric
        self.grid = Grid(bits, signed=symmetric, narrow=symmetric)
        if method == "mse":
            scale, zero = best_scale(weight, self.grid, symmetric=symmetric, channels=True)
        else:
            rows = weight.detach().reshape(weight.shape[0], -1)
            scale, zero = scale_from_range(
                rows.amin(dim=1), rows.amax(dim=1), self.grid, symmetric=symmetric
            )
        self.scale = nn.Parameter(scale.clone(), requires_grad=learned)
        self.register_buffer("zero_point", zero.clone())
        self._factor = 1.0 / math.sqrt(weight[0].numel() * self.grid.high)

    @property
    def bits(self) -> int:
        """Bits a weight."""
        return self.grid.bits

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` on the grid, same shape."""
        scale = self.scale.clamp(min=SMALLEST_SCALE)
        if self.scale.requires_grad:
            scale = scale_gradient(scale, self._factor)
        zero = None if self.symmetric else per_channel(self.zero_point, weight)
        return fake_quantize(weight, per_channel(scale, weight), zero, self.grid)

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """The integers that would be stored, int32, same shape."""
        scale, zero = per_channel(self.scale, weight), per_channel(self.zero_point, weight)
        found = (weight / scale).round() + zero
        return found.clamp(self.grid.low, self.grid.high).to(torch.int32)


class ActivationQuantizer(nn.Module):
    """A layer's input on one grid; its range comes from calibration images.

    Call ``observe`` on calibration batches, then ``set_range``. Where no value was below zero the
    grid has no sign and the offset is 0; else there is an offset (LSQ+), or a symmetric grid.

    Args:
        bits: 2 to 16.
        symmetric: never an offset.
        learned: scale (and offset) get gradients.
    """

    def __init__(self, *, bits: int, symmetric: bool = False, learned: bool = False) -> None:
        super().__init__()
        self.symmetric, self.learned = symmetric, learned
        self._bits = Grid(bits, signed=False).bits
        self.scale = nn.Parameter(torch.tensor(1.0), requires_grad=learned)
        self.zero_point = nn.Parameter(torch.tensor(0.0), requires_grad=learned)
        # Buffers, so that a resumed training goes on with what calibration found.
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("signed", torch.tensor(False))
        self.register_buffer("offset", torch.tensor(False))
        self.register_buffer("factor", torch.tensor(1.0))
        self._seen: list[Tensor] = []
        self._grid = Grid(bits, signed=False)

    @property
    def bits(self) -> int:
        """Bits an activation."""
        return self._bits

    @property
    def grid(self) -> Grid:
        """Signed where a symmetric grid has to hold negative values."""
        signed = bool(self.signed)
        if self._grid.signed != signed:
            self._grid = Grid(self._bits, signed=signed, narrow=signed)
        return self._grid

    def observe(self, x: Tensor, *, keep: int = 4096) -> None:
        """Remember ``x``'s extremes and up to ``keep`` values of it, evenly spread."""
        flat = x.detach().float().reshape(-1)
        step = max(1, flat.numel() // keep)
        self._seen.append(torch.cat([flat[::step], flat.amin()[None], flat.amax()[None]]))

    @torch.no_grad()
    def set_range(self, *, method: str = "mse", values_per_image: int | None = None) -> None:
        """Set scale and offset from what was observed.

        Args:
            method: ``mse`` or ``minmax``.
            values_per_image: for LSQ's gradient scale ``1 / sqrt(n * high)``.

        Raises:
            ValueError: nothing was observed.
        """
        _check_method(method)
        if not self._seen:
            raise ValueError("no activations were observed, expected calibration images first")
        seen = torch.cat(self._seen)
        self._seen = []
        negative = bool((seen < 0).any())
        self.signed.fill_(negative and self.symmetric)
        symmetric = self.symmetric or not negative
        if method == "mse":
            scale, zero = best_scale(seen, self.grid, symmetric=symmetric, channels=False)
        else:
            scale, zero = scale_from_range(seen.amin(), seen.amax(), self.grid, symmetric=symmetric)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)
        self.ready.fill_(True)
        count = values_per_image or seen.numel()
        self.factor.fill_(1.0 / math.sqrt(count * self.grid.high))
        self.offset.fill_(not symmetric)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid; before ``set_range`` ``x`` as it is."""
        if not self.ready:
            return x
        scale = self.scale.clamp(min=SMALLEST_SCALE)
        zero = self.zero_point if self.offset else None
        if self.learned:
            scale = scale_gradient(scale, float(self.factor))
            zero = None if zero is None else scale_gradient(zero, float(self.factor))
        return fake_quantize(x, scale, zero, self.grid)

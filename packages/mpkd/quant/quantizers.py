"""Quantisers as modules: weights by channel, activations by tensor, scales learned or fixed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

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
KEPT = 4096  # values of an input that are remembered of a batch


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"range method {method!r}: expected one of {', '.join(METHODS)}")


class WeightQuantizer(nn.Module):
    """A weight on a grid of its own for each output channel.

    Args:
        weight: ``(out, ...)``; sets the scales.
        bits: 2 to 16.
        symmetric: offset 0 and a symmetric grid (what TensorRT wants; ternary at 2 bits), else an
            offset as well.
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

    def learning_units(self) -> Iterator[tuple[nn.Parameter, float]]:
        """What learns here with the size that a step of it is relative to."""
        if self.scale.requires_grad:
            yield self.scale, float(self.scale.detach().abs().mean())

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` on the grid, same shape."""
        scale = self.scale.clamp(min=SMALLEST_SCALE)
        if self.scale.requires_grad:
            scale = scale_gradient(scale, self._factor)
        zero = None if self.symmetric else per_channel(self.zero_point, weight)
        return fake_quantize(weight, per_channel(scale, weight), zero, self.grid)

    @torch.no_grad()
    def stretch(self, factor: Tensor) -> None:
        """Make the grid fit weights times ``factor`` ``(out,)``, of either sign."""
        self.scale.mul_(factor.abs()).clamp_(min=SMALLEST_SCALE)
        mirrored = self.grid.low + self.grid.high - self.zero_point
        self.zero_point.copy_(torch.where(factor < 0, mirrored, self.zero_point))

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """The integers that would be stored, int32, same shape."""
        scale = per_channel(self.scale.clamp(min=SMALLEST_SCALE), weight)
        found = (weight / scale).round() + per_channel(self.zero_point, weight)
        return found.clamp(self.grid.low, self.grid.high).to(torch.int32)


class ActivationQuantizer(nn.Module):
    """A layer's input on one unsigned grid; its range comes from calibration images.

    Call ``observe`` on calibration batches, then ``set_range``. Where no value was below zero the
    offset is 0; else there is one (LSQ+), a whole number on the grid, so that zero stays exact.

    Args:
        bits: 2 to 16.
        learned: scale (and offset) get gradients.
    """

    def __init__(self, *, bits: int, learned: bool = False) -> None:
        super().__init__()
        self.grid, self.learned = Grid(bits, signed=False), learned
        self.scale = nn.Parameter(torch.tensor(1.0), requires_grad=learned)
        self.zero_point = nn.Parameter(torch.tensor(0.0), requires_grad=learned)
        # Buffers, so that a resumed training goes on with what calibration found. What decides
        # the way through ``forward`` is kept as plain values too: an exporter cannot branch on
        # what a tensor holds.
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("offset", torch.tensor(False))
        self.register_buffer("factor", torch.tensor(1.0))
        self._seen: list[Tensor] = []
        self._values = 1  # of an image
        self._read_buffers()

    def _read_buffers(self) -> None:
        self.is_ready, self.has_offset = bool(self.ready), bool(self.offset)
        self._factor = float(self.factor)
        if self.learned and self.is_ready:  # without an offset there is nothing to learn of it
            self.zero_point.requires_grad_(self.has_offset)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_buffers()

    @property
    def bits(self) -> int:
        """Bits an activation."""
        return self.grid.bits

    def learning_units(self) -> Iterator[tuple[nn.Parameter, float]]:
        """What learns here with the size that a step of it is relative to; an offset's is the grid.

        Moving the scale by a share moves the grid's end by as many steps as the offset then does.
        """
        if self.scale.requires_grad:
            yield self.scale, float(self.scale.detach().abs())
        if self.zero_point.requires_grad:
            yield self.zero_point, float(self.grid.levels - 1)

    def observe(self, x: Tensor) -> None:
        """Remember ``x``'s extremes and up to ``KEPT`` of its values, chosen at random by a seed.

        Values in even distances would be those of the same few pixels in every image: such a
        distance is mostly a multiple of a map's side.
        """
        self._values = x[0].numel()
        flat = x.detach().float().reshape(-1)
        chosen = flat
        if len(flat) > KEPT:
            generator = torch.Generator().manual_seed(len(self._seen))
            rows = torch.randint(len(flat), (KEPT,), generator=generator)
            chosen = flat[rows.to(flat.device)]
        self._seen.append(torch.cat([chosen, flat.amin()[None], flat.amax()[None]]))

    @torch.no_grad()
    def set_range(self, *, method: str = "mse") -> None:
        """Set scale and offset from what was observed, and LSQ's factor of their gradients.

        That factor is ``1 / sqrt(n * high)`` for ``n`` values of an image.

        Args:
            method: ``mse`` or ``minmax``.

        Raises:
            ValueError: nothing was observed.
        """
        _check_method(method)
        if not self._seen:
            raise ValueError("no activations were observed, expected calibration images first")
        seen = torch.cat(self._seen)
        self._seen = []
        symmetric = not bool((seen < 0).any())
        if method == "mse":
            scale, zero = best_scale(seen, self.grid, symmetric=symmetric, channels=False)
        else:
            ends = seen.amin(), seen.amax()
            scale, zero = scale_from_range(*ends, self.grid, symmetric=symmetric)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)
        self.ready.fill_(True)
        self.offset.fill_(not symmetric)
        self.factor.fill_(1.0 / math.sqrt(self._values * self.grid.high))
        self._read_buffers()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid; before ``set_range`` ``x`` as it is."""
        if not self.is_ready:
            return x
        scale = self.scale.clamp(min=SMALLEST_SCALE)
        zero = None
        if self.has_offset:
            held = self.zero_point.clamp(self.grid.low, self.grid.high)
            zero = self.zero_point + (held - self.zero_point).detach()
        if self.learned:
            scale = scale_gradient(scale, self._factor)
            zero = None if zero is None else scale_gradient(zero, self._factor)
        return fake_quantize(x, scale, zero, self.grid)

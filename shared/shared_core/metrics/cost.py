"""What a layer costs: parameters and multiply-accumulates (MACs), by formula.

One MAC is one multiplication and one addition. All functions count MACs; a FLOP count is
``flops(macs)`` and nothing else here. Biases, activations and residual additions are left
out, as ``torch.utils.flop_counter`` leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shared_core.metrics.arrays import Floats


@dataclass(frozen=True)
class LayerCost:
    """One layer: its own parameters and its MACs for one forward of the stated input."""

    name: str
    params: int = 0
    macs: int = 0
    elementwise: int = 0  # operations on single elements, such as LayerNorm's; not in macs

    def __post_init__(self) -> None:
        if min(self.params, self.macs, self.elementwise) < 0:
            raise ValueError(f"cost of {self.name!r} is negative, expected counts of at least 0")


def linear(
    tokens: int, inputs: int, outputs: int, *, bias: bool = True, name: str = "linear"
) -> LayerCost:
    """A linear layer applied to ``tokens`` vectors: ``tokens * inputs * outputs`` MACs."""
    _positive(tokens=tokens, inputs=inputs, outputs=outputs)
    params = inputs * outputs + (outputs if bias else 0)
    return LayerCost(name, params, tokens * inputs * outputs)


def conv2d(
    size: tuple[int, int],
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = True,
    name: str = "conv2d",
) -> LayerCost:
    """A 2-D convolution of a map of ``size`` (h, w) pixels.

    ``out_h * out_w * outputs * (inputs / groups) * kernel_h * kernel_w`` MACs.
    """
    kernels = _pair(kernel)
    _positive(inputs=inputs, outputs=outputs, groups=groups, kernel=min(kernels))
    if inputs % groups or outputs % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of {inputs} and {outputs}")
    out = conv2d_size(size, kernels, stride=stride, padding=padding, dilation=dilation)
    weights = outputs * (inputs // groups) * kernels[0] * kernels[1]
    return LayerCost(name, weights + (outputs if bias else 0), out[0] * out[1] * weights)


def conv2d_size(
    size: tuple[int, int],
    kernel: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> tuple[int, int]:
    """Height and width, in pixels, of a convolution's or a pooling's output."""
    kernels, strides, pads, steps = _pair(kernel), _pair(stride), _pair(padding), _pair(dilation)
    out = tuple(
        (size[i] + 2 * pads[i] - steps[i] * (kernels[i] - 1) - 1) // strides[i] + 1 for i in (0, 1)
    )
    if min(out) < 1:
        raise ValueError(f"a map of {size} is smaller than the kernel {kernels}")
    return out[0], out[1]


def attention(
    queries: int,
    dim: int,
    *,
    keys: int | None = None,
    projections: bool = True,
    bias: bool = True,
    name: str = "attention",
) -> LayerCost:
    """Multi-head attention over ``queries`` tokens; the number of heads does not matter.

    Scores and their product with the values take ``queries * keys * dim`` MACs each; with
    ``projections`` also ``(2 * queries + 2 * keys) * dim^2`` for q, the output, k and v.
    """
    others = queries if keys is None else keys
    _positive(queries=queries, keys=others, dim=dim)
    macs = 2 * queries * others * dim
    params = 0
    if projections:
        macs += (2 * queries + 2 * others) * dim * dim
        params = 4 * dim * dim + (4 * dim if bias else 0)
    return LayerCost(name, params, macs)


def rfft2(grid: tuple[int, int], channels: int, *, name: str = "rfft2") -> LayerCost:
    """A real 2-D FFT of an (h, w) grid: ``N * channels * ceil(log2 N)``, N = h w.

    The convention of the published GFNet figures: N is the size of the grid that enters.

    Source: Rao et al. 2021, arXiv:2107.00645, section 3.2 (N log N), with fvcore's rounding.
    """
    return LayerCost(name, 0, fft_macs(grid[0] * grid[1], channels))


def irfft2(grid: tuple[int, int], channels: int, *, name: str = "irfft2") -> LayerCost:
    """The inverse of ``rfft2``; ``grid`` is that of its **output**, (h, w) pixels.

    Its input is the half spectrum of ``h * (w // 2 + 1)`` points, which is N here.
    """
    return LayerCost(name, 0, fft_macs(grid[0] * (grid[1] // 2 + 1), channels))


def fft_macs(points: int, channels: int) -> int:
    """``points * channels * ceil(log2 points)`` MACs."""
    _positive(points=points, channels=channels)
    return points * channels * (points - 1).bit_length()


def layernorm(tokens: int, dim: int, *, affine: bool = True, name: str = "layernorm") -> LayerCost:
    """Layer normalisation: ``5 * tokens * dim`` elementwise operations, no MACs."""
    _positive(tokens=tokens, dim=dim)
    return LayerCost(name, 2 * dim if affine else 0, 0, 5 * tokens * dim)


def total_params(costs: Iterable[LayerCost]) -> int:
    """Parameters of all layers."""
    return sum(cost.params for cost in costs)


def total_macs(costs: Iterable[LayerCost], *, elementwise: bool = False) -> int:
    """MACs of all layers; ``elementwise`` adds those operations, one for one."""
    return sum(cost.macs + (cost.elementwise if elementwise else 0) for cost in costs)


def flops(macs: int) -> int:
    """Floating-point operations of ``macs`` multiply-accumulates: two each."""
    return 2 * macs


def exit_costs(segments: Sequence[float], exits: Sequence[float]) -> Floats:
    """MACs spent by a sample that leaves at each exit, shape (E,).

    Args:
        segments: MACs of the layers between one exit and the next, (E,).
        exits: MACs of each exit's own head and gate, (E,); a sample that leaves at exit e
            has paid for those of exits 0 to e.
    """
    if len(segments) != len(exits) or not len(exits):
        raise ValueError(f"got {len(segments)} segments for {len(exits)} exits, expected as many")
    both = np.asarray(segments, np.float64) + np.asarray(exits, np.float64)
    return np.cumsum(both)


def expected_cost(costs: Sequence[float], exit_rates: Sequence[float]) -> float:
    """Mean cost of a sample: ``sum_e rate_e * cost_e``, with rates that sum to 1."""
    rates = np.asarray(exit_rates, np.float64)
    if rates.shape != (len(costs),) or rates.min() < 0 or abs(rates.sum() - 1) > 1e-6:
        raise ValueError(f"exit rates are {rates.tolist()}, expected {len(costs)} that sum to 1")
    return float(rates @ np.asarray(costs, np.float64))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected at least 1")

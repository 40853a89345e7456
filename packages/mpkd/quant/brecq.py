"""Block reconstruction: weights to few bits without labels, by learning which way each one rounds.

Rounding to the nearest value minimises the error of every weight, not that of the network. Here
each weight goes up or down so that the *output* of its block stays what it was:

    W_q = s * (clip(floor(W / s) + h(V) + z, low, high) - z),   h(V) in [0, 1]
    min over V of  || block(x_q; W_q) - block(x; W) ||^2 + lambda * sum(1 - |2 h - 1|^beta)

``x_q`` is the block's input in the network quantized so far, ``x`` that of the original. ``h`` is a
sigmoid stretched to [-0.1, 1.1] and clipped; ``beta`` falls from 20 to 2, which drives every ``h``
to 0 or 1. Then the scales of the inputs are learned in the same way (LSQ).

Source: Li et al. 2021, arXiv:2102.05426, equations 6 to 10 and algorithm 1; the rounding variable
is that of Nagel et al. 2020, arXiv:2004.10568, equations 21 to 24. (The reference list of this
project's first README gives another paper's number for it, that of LSQ+.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpkd.quant.fake_quant import fake_quantize, per_channel
from mpkd.quant.layers import QuantLayer, quant_layers, unquantized

ZETA, GAMMA = 1.1, -0.1  # ends of the stretched sigmoid
BETA_START, BETA_END = 20.0, 2.0
WARM = 0.2  # share of the steps without the regulariser


@dataclass(frozen=True)
class Reconstruction:
    """What became of one block.

    Attributes:
        name: dotted name of the block.
        before, after: mean squared error of its output against the original's, rounding to the
            nearest and learned.
    """

    name: str
    before: float
    after: float


class LearnedRounding(nn.Module):
    """Up or down for every weight of a layer, learned; begins where the weight lies.

    Args:
        layer: a layer with a weight quantizer.
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        quantizer, weight = layer.weight_quantizer, layer.base.weight.detach()
        if quantizer is None:
            raise ValueError("the layer's weights are not quantized, expected bits below 32")
        self.grid = quantizer.grid
        self.register_buffer("scale", per_channel(quantizer.scale.detach().clone(), weight))
        self.register_buffer("zero", per_channel(quantizer.zero_point.clone(), weight))
        scaled = weight / self.scale
        self.register_buffer("floor", scaled.floor())
        rest = (scaled - scaled.floor()).clamp(1e-4, 1 - 1e-4)
        # The sigmoid's inverse, so that h is the fraction at the start.
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1))

    def up(self) -> Tensor:
        """``h``: 0 for down, 1 for up, in between while learning."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def weight(self, *, hard: bool = False) -> Tensor:
        """The weight on the grid; ``hard`` decides every rounding."""
        up = (self.alpha >= 0).to(self.floor.dtype) if hard else self.up()
        whole = (self.floor + up + self.zero).clamp(self.grid.low, self.grid.high)
        return (whole - self.zero) * self.scale

    def regulariser(self, beta: float) -> Tensor:
        """Sum over the weights of ``1 - |2 h - 1|^beta``: 0 when all are decided."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()


def beta_at(step: int, steps: int) -> float | None:
    """``beta`` of the regulariser: None in the first fifth, then linear from 20 down to 2."""
    first = int(WARM * steps)
    if step < first:
        return None
    share = (step - first) / max(1, steps - first)
    return BETA_END + (BETA_START - BETA_END) * max(0.0, 1 - share)


def blocks_of(net: nn.Module) -> list[str]:
    """Names of the units to reconstruct: residual blocks whole, other quantized layers alone.

    A module whose class name holds "Block", "Bottleneck" or "Residual" is a unit, the outermost
    one that is; the units together hold every quantized layer once, in the order of the network.
    """
    marks = ("Block", "Bottleneck", "Residual")
    units: list[str] = []
    for name, module in net.named_modules():
        if any(name == unit or name.startswith(f"{unit}.") for unit in units):
            continue
        marked = any(mark in type(module).__name__ for mark in marks)
        if isinstance(module, QuantLayer) or (name and marked and quant_layers(module)):
            units.append(name)
    return units


@torch.no_grad()
def _collect(net: nn.Module, name: str, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a module over all batches."""
    inputs, outputs = [], []

    def note(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # Copies: an in-place activation that follows would change what is kept.
        inputs.append(args[0].detach().clone())
        outputs.append(output.detach().clone())

    hook = net.get_submodule(name).register_forward_hook(note)
    try:
        for images in batches:
            net(images)
    finally:
        hook.remove()
    return torch.cat(inputs), torch.cat(outputs)


def reconstruct(
    net: nn.Module,
    batches: Sequence[Tensor],
    *,
    steps: int = 20_000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    strength: float = 0.01,
    generator: torch.Generator | None = None,
    report: Callable[[Reconstruction], None] | None = None,
) -> list[Reconstruction]:
    """Learn the rounding of every quantized layer of ``net``, block after block, in place.

    Args:
        net: batch norms folded, layers quantized (``quantize_net``), in evaluation mode. Inputs
            must be calibrated when they are quantized.
        batches: calibration images ``(N, 3, H, W)``; labels are not needed. 1,024 images in the
            paper.
        steps: of Adam, for each block.
        batch_size: images a step.
        learning_rate: of the rounding variables.
        strength: lambda, relative to the squared error of the block's output summed over its
            channels and averaged over images and positions.
        generator: chooses the images of each step.
        report: called after each block.

    Returns:
        One entry a block, in order.

    Raises:
        ValueError: nothing is quantized, or the network is in training mode.
    """
    if net.training:
        raise ValueError("the network is in training mode, expected evaluation mode")
    units = blocks_of(net)
    if not units:
        raise ValueError("the network has no quantized layer, expected quantize_net before")
    found = []
    for name in units:
        unit = net.get_submodule(name)
        inputs, _ = _collect(net, name, batches)  # of the network quantized so far
        with unquantized(net):
            _, targets = _collect(net, name, batches)
        found.append(
            _reconstruct_block(
                name, unit, inputs, targets,
                steps=steps, batch_size=batch_size, learning_rate=learning_rate,
                strength=strength, generator=generator,
            )
        )  # fmt: skip
        if report is not None:
            report(found[-1])
    return found


def _block_error(unit: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int) -> float:
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(inputs), batch_size):
            chosen = slice(start, start + batch_size)
            total += float((unit(inputs[chosen]) - targets[chosen]).square().sum())
    return total / targets.numel()


def _reconstruct_block(
    name: str,
    unit: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    strength: float,
    generator: torch.Generator | None,
) -> Reconstruction:
    layers = [layer for layer in unit.modules() if isinstance(layer, QuantLayer)]
    layers = [layer for layer in layers if layer.weight_quantizer is not None]
    before = _block_error(unit, inputs, targets, batch_size)
    roundings = [LearnedRounding(layer) for layer in layers]
    originals = [layer.base.weight for layer in layers]
    for layer, rounding in zip(layers, roundings, strict=True):
        _use(layer, rounding.weight)
    optimizer = torch.optim.Adam([r.alpha for r in roundings], lr=learning_rate)
    for step in range(steps):
        index = torch.randint(len(inputs), (min(batch_size, len(inputs)),), generator=generator)
        # Summed over the channels, averaged over images and positions, as in the published code.
        error = (unit(inputs[index]) - targets[index]).square().sum(dim=1).mean()
        beta = beta_at(step, steps)
        if beta is not None:
            error = error + strength * sum(r.regulariser(beta) for r in roundings)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    for layer, rounding, weight in zip(layers, roundings, originals, strict=True):
        del layer.quantized_weight  # type: ignore[method-assign]  # back to the class's own
        with torch.no_grad():
            weight.copy_(rounding.weight(hard=True))
    return Reconstruction(name, before, _block_error(unit, inputs, targets, batch_size))


def _use(layer: QuantLayer, weight: Callable[[], Tensor]) -> None:
    """Let the layer compute with ``weight()`` until the attribute is deleted again."""
    layer.quantized_weight = weight  # type: ignore[method-assign]  # for the time of learning


def is_on_grid(layer: QuantLayer) -> bool:
    """Whether the stored weight is what the quantizer makes of it: rounding again moves nothing."""
    weight = layer.base.weight.detach()
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return False
    shown = fake_quantize(
        weight,
        per_channel(quantizer.scale.detach(), weight),
        per_channel(quantizer.zero_point, weight),
        quantizer.grid,
    )
    return bool(torch.allclose(shown, weight, rtol=0, atol=1e-5 * float(quantizer.scale.max())))


def learn_input_scales(
    net: nn.Module,
    batches: Sequence[Tensor],
    *,
    steps: int = 5_000,
    batch_size: int = 32,
    learning_rate: float = 4e-4,
    generator: torch.Generator | None = None,
) -> list[Reconstruction]:
    """Learn the scales of the inputs block after block, the weights standing, in place.

    Args:
        net: as for :func:`reconstruct`, which comes first; input quantizers calibrated.
        steps, batch_size, learning_rate: of Adam with a cosine schedule, for each block.

    Source: Li et al. 2021, arXiv:2102.05426, section 4.1 and published code.
    """
    found = []
    for name in blocks_of(net):
        unit = net.get_submodule(name)
        scales = [
            layer.input_quantizer.scale
            for layer in unit.modules()
            if isinstance(layer, QuantLayer) and layer.input_quantizer is not None
        ]
        if not scales:
            continue
        inputs, _ = _collect(net, name, batches)
        with unquantized(net):
            _, targets = _collect(net, name, batches)
        before = _block_error(unit, inputs, targets, batch_size)
        learned = [scale.requires_grad for scale in scales]
        for scale in scales:
            scale.requires_grad_(True)
        optimizer = torch.optim.Adam(scales, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            index = torch.randint(len(inputs), (min(batch_size, len(inputs)),), generator=generator)
            error = (unit(inputs[index]) - targets[index]).abs().pow(2.4).sum(dim=1).mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
        for scale, wanted in zip(scales, learned, strict=True):
            scale.requires_grad_(wanted)
        found.append(Reconstruction(name, before, _block_error(unit, inputs, targets, batch_size)))
    return found

"""Block reconstruction: weights to few bits without labels, by learning which way each one rounds.

Rounding to the nearest value minimises the error of every weight, not that of the network. Here
each weight goes up or down so that the *output* of its unit stays what it was:

    W_q = s * (clip(floor(W / s) + h(V) + z, low, high) - z),   h(V) in [0, 1]
    min over V of  || block(x_q; W_q) - block(x; W) ||^2 + lambda * sum(1 - |2 h - 1|^beta)

``x_q`` is the block's input in the network quantized so far, ``x`` that of the original. ``h`` is a
sigmoid stretched to [-0.1, 1.1] and clipped; ``beta`` falls from 20 to 2, which drives every ``h``
to 0 or 1. Then the scales of the inputs are learned in the same way (LSQ).

A unit is a residual block. A layer outside of any block is a unit together with the activation and
the pooling behind it, which is AdaRound's unit: a network without blocks, such as ``simple_cnn``,
is reconstructed by AdaRound. The error is not weighted by the gradient of the task (equation 10 of
the paper).

Source: Li et al. 2021, arXiv:2102.05426, equations 6 to 10 and algorithm 1; the rounding variable
is that of Nagel et al. 2020, arXiv:2004.10568, equations 21 to 25. (The reference list of this
project's first README gives another paper's number for it, that of LSQ+.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpkd.quant.fake_quant import per_channel
from mpkd.quant.layers import QuantLayer, quant_layers, trace

ZETA, GAMMA = 1.1, -0.1  # ends of the stretched sigmoid
BETA_START, BETA_END = 20.0, 2.0
BLOCKS = ("Block", "Bottleneck", "Residual")
BEHIND = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.MaxPool2d,
    nn.AvgPool2d, nn.Dropout,
)  # fmt: skip
WARM = 0.2  # share of the steps without the regulariser


@dataclass(frozen=True)
class Reconstruction:
    """What became of one unit.

    Attributes:
        name: of the unit.
        before, after: mean squared error of its output against the original's, rounding to the
            nearest and learned.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Unit:
    """What is reconstructed at once.

    Attributes:
        names: dotted names of modules that compute one after another; the first holds the
            quantized layers.
        block: whether it is a residual block.
    """

    names: tuple[str, ...]
    block: bool

    @property
    def name(self) -> str:
        """Of its first module; says which kind of unit it is."""
        return f"{'block' if self.block else 'layer'} {self.names[0]}"

    def run(self, net: nn.Module, inputs: Tensor) -> Tensor:
        """Its output."""
        for name in self.names:
            inputs = net.get_submodule(name)(inputs)
        return inputs


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


def units_of(net: nn.Module) -> list[Unit]:
    """Residual blocks whole, every other quantized layer with the activation behind it.

    A module whose class name holds "Block", "Bottleneck" or "Residual" is a block, the outermost
    one that is; the units together hold every quantized layer once, in the order of the network.
    """
    tails = _tails(net)
    units: list[Unit] = []
    for name, module in net.named_modules():
        if any(name.startswith(f"{unit.names[0]}.") for unit in units):
            continue
        marked = any(mark in type(module).__name__ for mark in BLOCKS)
        if isinstance(module, QuantLayer):
            units.append(Unit((name, *tails.get(name, ())), block=False))
        elif name and marked and quant_layers(module):
            units.append(Unit((name,), block=True))
    return units


def _tails(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """By quantized layer the activations and poolings that it alone feeds."""
    modules, found = dict(net.named_modules()), {}
    for node in trace(net).nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], QuantLayer):
            continue
        tail, last = [], node
        while len(last.users) == 1:
            last = next(iter(last.users))
            if last.op != "call_module" or not isinstance(modules[last.target], BEHIND):
                break
            tail.append(last.target)
        found[node.target] = tuple(tail)
    return found


@torch.no_grad()
def _collect(net: nn.Module, unit: Unit, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a unit over all batches."""
    inputs: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach().clone())

    hook = net.get_submodule(unit.names[0]).register_forward_pre_hook(note)
    try:
        for images in batches:
            net(images)
    finally:
        hook.remove()
    return torch.cat(inputs), torch.cat([unit.run(net, part.clone()) for part in inputs])


def reconstruct(
    net: nn.Module,
    original: nn.Module,
    batches: Sequence[Tensor],
    *,
    steps: int = 20_000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    strength: float = 0.01,
    generator: torch.Generator | None = None,
    report: Callable[[Reconstruction], None] | None = None,
) -> list[Reconstruction]:
    """Learn the rounding of every quantized layer of ``net``, unit after unit, in place.

    Args:
        net: batch norms folded, layers quantized (``quantize_net``), in evaluation mode. Inputs
            must be calibrated when they are quantized.
        original: the network without quantization, under the same names (``plain(net)``, before):
            the weights of ``net`` do not stay what they were.
        batches: calibration images ``(N, 3, H, W)``; labels are not needed. 1,024 images in the
            paper.
        steps: of Adam, for each unit.
        batch_size: images a step.
        learning_rate: of the rounding variables.
        strength: lambda, relative to the squared error of the unit's output summed over its
            channels and averaged over images and positions.
        generator: chooses the images of each step.
        report: called after each unit.

    Returns:
        One entry a unit, in order.

    Raises:
        ValueError: nothing is quantized, or the network is in training mode.
    """
    if net.training:
        raise ValueError("the network is in training mode, expected evaluation mode")
    units = units_of(net)
    if not units:
        raise ValueError("the network has no quantized layer, expected quantize_net before")
    found = []
    for unit in units:
        inputs, _ = _collect(net, unit, batches)  # of the network quantized so far
        _, targets = _collect(original, unit, batches)
        found.append(
            _reconstruct_unit(
                net, unit, inputs, targets,
                steps=steps, batch_size=batch_size, learning_rate=learning_rate,
                strength=strength, generator=generator,
            )
        )  # fmt: skip
        if report is not None:
            report(found[-1])
    return found


def _error(net: nn.Module, unit: Unit, inputs: Tensor, targets: Tensor, batch_size: int) -> float:
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(inputs), batch_size):
            chosen = slice(start, start + batch_size)
            total += float((unit.run(net, inputs[chosen]) - targets[chosen]).square().sum())
    return total / targets.numel()


def _layers(net: nn.Module, unit: Unit) -> list[QuantLayer]:
    inside = net.get_submodule(unit.names[0]).modules()
    return [layer for layer in inside if isinstance(layer, QuantLayer)]


def _reconstruct_unit(
    net: nn.Module,
    unit: Unit,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    strength: float,
    generator: torch.Generator | None,
) -> Reconstruction:
    layers = [layer for layer in _layers(net, unit) if layer.weight_quantizer is not None]
    before = _error(net, unit, inputs, targets, batch_size)
    roundings = [LearnedRounding(layer) for layer in layers]
    originals = [layer.base.weight for layer in layers]
    for layer, rounding in zip(layers, roundings, strict=True):
        _use(layer, rounding.weight)
    optimizer = torch.optim.Adam([r.alpha for r in roundings], lr=learning_rate)
    for step in range(steps):
        index = torch.randint(len(inputs), (min(batch_size, len(inputs)),), generator=generator)
        # Summed over the channels, averaged over images and positions, as in the published code.
        error = (unit.run(net, inputs[index]) - targets[index]).square().sum(dim=1).mean()
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
    return Reconstruction(unit.name, before, _error(net, unit, inputs, targets, batch_size))


def _use(layer: QuantLayer, weight: Callable[[], Tensor]) -> None:
    """Let the layer compute with ``weight()`` until the attribute is deleted again."""
    layer.quantized_weight = weight  # type: ignore[method-assign]  # for the time of learning


def learn_input_scales(
    net: nn.Module,
    original: nn.Module,
    batches: Sequence[Tensor],
    *,
    steps: int = 5_000,
    batch_size: int = 32,
    learning_rate: float = 4e-4,
    generator: torch.Generator | None = None,
) -> list[Reconstruction]:
    """Learn the scales of the inputs unit after unit, the weights standing, in place.

    Args:
        net, original: as for :func:`reconstruct`, which comes first; inputs calibrated.
        steps, batch_size, learning_rate: of Adam with a cosine schedule, for each unit.

    Source: Li et al. 2021, arXiv:2102.05426, section 4.1 and published code.
    """
    found = []
    for unit in units_of(net):
        quantizers = [layer.input_quantizer for layer in _layers(net, unit)]
        scales = [quantizer.scale for quantizer in quantizers if quantizer is not None]
        if not scales:
            continue
        inputs, _ = _collect(net, unit, batches)
        _, targets = _collect(original, unit, batches)
        before = _error(net, unit, inputs, targets, batch_size)
        learned = [scale.requires_grad for scale in scales]
        for scale in scales:
            scale.requires_grad_(True)
        optimizer = torch.optim.Adam(scales, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            index = torch.randint(len(inputs), (min(batch_size, len(inputs)),), generator=generator)
            missed = unit.run(net, inputs[index]) - targets[index]
            optimizer.zero_grad()
            missed.abs().pow(2.4).sum(dim=1).mean().backward()
            optimizer.step()
            schedule.step()
        for scale, wanted in zip(scales, learned, strict=True):
            scale.requires_grad_(wanted)
        after = _error(net, unit, inputs, targets, batch_size)
        found.append(Reconstruction(unit.name, before, after))
    return found

"""SDQ: each layer learns with which probability it needs its bits, and falls to fewer.

Every layer has a candidate ``b_i`` and a parameter ``beta`` in [0, 1]. In each step its weights
have ``b_i`` bits with probability ``beta`` and the next lower candidate ``b_(i-1)`` else: a sample
of a two-way Gumbel softmax, hard forwards and soft backwards. Below a threshold the layer falls to
``b_(i-1)`` and begins anew with a fresh ``beta``; bits never rise. As soon as the bits fit the
budget the search ends. When its steps run out before, the layers fall for which an error of
quantization buys the most cost.

What moves ``beta``. The merit of a layer's bits is how fast the loss of the task falls with its
``beta`` (a moving average of the gradient), and how much error a fall would add. The budget says
how fast the expected cost must fall, the merits say who pays: with savings ``c`` (what the next
fall of each layer saves)

    step = pace * (-c / |c|^2 + TASK * m / (|m| |c|)),   m = merits without their part along c

so that ``c . step = -pace`` whatever the merits are, and no term outweighs the other whatever the
units of the loss. (The paper states no budget: pace and end are ours. A fixed price of the cost
beside the loss, which we had before, was hundreds of times as strong as the task, and every task
got the same bits.)

Phase 2 is quantization-aware training with the bits fixed, the bin regulariser and the teacher.

Source: Huang et al. 2022, arXiv:2206.04459, section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkd.quant.budget import BitPlan, Budget
from mpkd.quant.companion import Companion
from mpkd.quant.fake_quant import Grid, best_scale, fake_quantize, per_channel
from mpkd.quant.layers import FLOAT, put

START = 0.9  # of a fresh beta
THRESHOLD = 0.3  # below it a layer falls
TEMPERATURE = 1.0  # of the Gumbel softmax
EDGE = 1e-4  # betas are kept this far from 0 and 1 inside the logarithms
TASK = 2.0  # how far the merits move the betas apart, in units of what the budget moves them
ERROR = 0.5  # share of the quantization error in the merits, beside the task's 1
MEMORY = 0.9  # of the moving average of the task's gradient, a step
REFRESH = 50  # steps between searches for the best scales


def gumbel_gate(beta: Tensor, noise: Tensor, *, temperature: float) -> Tensor:
    """1 with probability ``beta`` and 0 else; the gradient is that of the softened sample.

    The difference of two Gumbel variables is logistic: ``noise`` is uniform in ``(0, 1)``.

    Source: Jang et al. 2017, arXiv:1611.01144, section 2 (two categories).
    """
    beta = beta.clamp(EDGE, 1 - EDGE)
    logistic = torch.log(noise) - torch.log1p(-noise)
    soft = torch.sigmoid((torch.log(beta) - torch.log1p(-beta) + logistic) / temperature)
    return soft + ((soft > 0.5).to(soft.dtype) - soft).detach()


class TwoWayLayer(nn.Module):
    """A convolution or linear layer whose weight has one of two numbers of bits, by chance.

    Args:
        base: the layer.
        options: candidates, rising.
    """

    def __init__(self, base: nn.Conv2d | nn.Linear, options: tuple[int, ...]) -> None:
        super().__init__()
        self.base, self.options = base, options
        self.level = len(options) - 1
        self.gate: Tensor | None = None  # of this step; None = the upper candidate
        self.scales: dict[int, Tensor] = {}
        self.growth = 0.0  # what a fall adds to the squared error, relative to that of the weights

    @property
    def upper(self) -> int:
        """The present candidate."""
        return self.options[self.level]

    @property
    def lower(self) -> int | None:
        """The next lower one; None at the last."""
        return self.options[self.level - 1] if self.level else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Search the best scales for the weights as they are now, and what a fall costs them."""
        weight = self.base.weight
        chosen = [bits for bits in (self.upper, self.lower) if bits is not None]
        for bits in {*chosen} - {FLOAT}:
            grid = Grid(bits, signed=True, narrow=True)
            self.scales[bits] = best_scale(weight, grid, symmetric=True, channels=True)[0]
        errors = [float((self.at(bits) - weight).square().sum()) for bits in chosen]
        energy = max(float(weight.square().sum()), 1e-12)
        self.growth = (errors[1] - errors[0]) / energy if len(errors) > 1 else 0.0

    def at(self, bits: int) -> Tensor:
        """The weight with ``bits``."""
        weight = self.base.weight
        if bits == FLOAT:
            return weight
        if bits not in self.scales:
            self.refresh()
        scale = per_channel(self.scales[bits], weight)
        return fake_quantize(weight, scale, None, Grid(bits, signed=True, narrow=True))

    def sampled(self) -> Tensor:
        """The weight of this step."""
        upper = self.at(self.upper)
        if self.gate is None or self.lower is None:
            return upper
        return self.gate * upper + (1 - self.gate) * self.at(self.lower)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        weight = self.sampled()
        if isinstance(self.base, nn.Linear):
            return F.linear(x, weight, self.base.bias)
        return self.base._conv_forward(x, weight, self.base.bias)


class Sdq(Companion):
    """Phase 1: weights and betas learn together until the bits fit the budget.

    Args:
        net: trained, not quantized; a copy of it is trained, :attr:`net`.
        budget: choices and limit.
        seed: of the samples; no global generator is touched.

    Attributes:
        net: what is to be trained with this companion.
        history: number of the step and bits by layer, at the start and after each fall.
    """

    def __init__(self, net: nn.Module, budget: Budget, *, seed: int = 0) -> None:
        self.budget, self.net = budget, copy.deepcopy(net)
        self.layers: dict[str, TwoWayLayer] = {}
        for name in budget.names:
            layer = TwoWayLayer(self.net.get_submodule(name), budget.w_options[name])
            put(self.net, name, layer)
            self.layers[name] = layer
        place = next(self.net.parameters()).device
        self.beta = torch.full((len(self.layers),), START, device=place, requires_grad=True)
        self.merit = torch.zeros(len(self.layers), device=place)
        self.generator = torch.Generator().manual_seed(seed)
        # What is too much at the start, as a share of the limit.
        self._excess = max(0.0, budget.cost(self.plan()) / budget.limit - 1)
        self._done, self._pace = 0, 0.0
        self._held: tuple[Tensor, ...] = ()
        self.history: list[tuple[int, dict[str, int]]] = [(0, self.bits())]

    @property
    def finished(self) -> bool:
        """Whether the bits fit the budget."""
        return self.budget.fits(self.plan())

    def bits(self) -> dict[str, int]:
        """Present candidates by layer."""
        return {name: layer.upper for name, layer in self.layers.items()}

    def betas(self) -> dict[str, float]:
        """Present betas by layer, in [0, 1]."""
        return dict(zip(self.layers, self.beta.detach().tolist(), strict=True))

    def plan(self) -> BitPlan:
        """Present bits of weights, inputs at their most."""
        return BitPlan(self.bits(), self.budget.largest().a)

    def savings(self) -> list[float]:
        """What the next fall of each layer saves, as a share of the limit; 0 at the last one."""
        a, table = self.budget.largest().a, self.budget.table
        return [
            0.0
            if layer.lower is None
            else (table[name][layer.upper, a[name]] - table[name][layer.lower, a[name]])
            / self.budget.limit
            for name, layer in self.layers.items()
        ]

    # -- what happens around a step ---------------------------------------------------------------

    def tensors(self) -> Sequence[Tensor]:
        """The gates of this step."""
        return self._held

    def before_step(self, step: int, total: int) -> None:
        """Draw which bits every layer has in this step; once all fit the budget, the upper ones."""
        self._done = step
        # So fast that the bits fit the budget after half of the steps.
        self._pace = (START - THRESHOLD) * self._excess / max(1.0, 0.5 * total)
        if step % REFRESH == 0:
            for layer in self.layers.values():
                layer.refresh()
        self._held = ()
        if self.finished:
            return
        noise = torch.rand(len(self.layers), generator=self.generator).clamp(1e-6, 1 - 1e-6)
        self._gates = gumbel_gate(self.beta, noise.to(self.beta.device), temperature=TEMPERATURE)
        # Cut off from the betas: several batches of one step go through the same gates.
        self._held = tuple(gate.detach().requires_grad_() for gate in self._gates)
        for gate, layer in zip(self._held, self.layers.values(), strict=True):
            layer.gate = gate

    def after_step(self) -> None:
        """Move the betas; layers whose beta is small fall."""
        for layer in self.layers.values():
            layer.gate = None
        self._done += 1
        if self._held:
            given = torch.stack(
                [torch.zeros_like(g) if g.grad is None else g.grad for g in self._held]
            )
            (gradient,) = torch.autograd.grad(self._gates, self.beta, given)
            if bool(torch.isfinite(gradient).all()):  # a step in fp16 may have overflowed
                self._move(gradient)

    @torch.no_grad()
    def _move(self, gradient: Tensor) -> None:
        self.merit.lerp_(-_unit(gradient), 1 - MEMORY)
        self.beta += self._movement()
        self.beta.clamp_(0, 1)
        for index in torch.argsort(self.beta).tolist():  # the least first
            if self.finished or not float(self.beta[index]) < THRESHOLD:
                break
            self._fall(index)

    def _movement(self) -> Tensor:
        """How far each beta moves; see the module."""
        saved = self.beta.new_tensor(self.savings())
        falls = saved > 0
        size = saved.norm()
        error = self.beta.new_tensor([layer.growth for layer in self.layers.values()])
        merit = _unit(self.merit * falls) + ERROR * _unit(error * falls)
        merit = (merit - saved * (merit @ saved) / size.square().clamp(min=1e-30)) * falls
        towards = -saved / size.clamp(min=1e-15) + TASK * _unit(merit)
        return self._pace / size.clamp(min=1e-15) * towards

    def _fall(self, index: int) -> None:
        """The layer goes to its next lower candidate and begins anew."""
        layer = list(self.layers.values())[index]
        if layer.lower is None:
            return
        layer.level -= 1
        layer.refresh()
        self.beta[index], self.merit[index] = START, 0.0
        self.history.append((self._done, self.bits()))

    # -- afterwards -------------------------------------------------------------------------------

    @torch.no_grad()
    def settle(self) -> BitPlan:
        """The bits, within the budget whatever happened before."""
        layers = list(self.layers.values())
        for layer in layers:
            layer.refresh()
        while not self.finished:
            saved = self.savings()
            movable = [i for i, layer in enumerate(layers) if layer.level and saved[i] > 0]
            if not movable:
                break
            self._fall(min(movable, key=lambda i: layers[i].growth / saved[i]))
        return self.budget.check(self.budget.bring_within(self.plan()))

    def trained(self) -> nn.Module:
        """The network with the weights learned so far, plain again."""
        made = copy.deepcopy(self.net)
        for name in self.layers:
            put(made, name, made.get_submodule(name).base)
        return made.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on exactly."""
        return {
            "beta": self.beta.detach().clone(),
            "merit": self.merit.clone(),
            "generator": self.generator.get_state(),
            "levels": [layer.level for layer in self.layers.values()],
            "growths": [layer.growth for layer in self.layers.values()],
            "scales": [
                {str(bits): scale for bits, scale in layer.scales.items()}
                for layer in self.layers.values()
            ],
            "history": [[step, list(bits.values())] for step, bits in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        with torch.no_grad():
            self.beta.copy_(state["beta"])
            self.merit.copy_(state["merit"])
        self.generator.set_state(state["generator"])
        kept = (state["levels"], state["growths"], state["scales"])
        for layer, level, growth, scales in zip(self.layers.values(), *kept, strict=True):
            layer.level, layer.growth = int(level), float(growth)
            layer.scales = {int(bits): scale.to(self.beta.device) for bits, scale in scales.items()}
        self.history = [
            (int(step), dict(zip(self.layers, map(int, bits), strict=True)))
            for step, bits in state["history"]
        ]


def _unit(vector: Tensor) -> Tensor:
    """``vector`` at length 1; nothing stays nothing."""
    return vector / vector.norm().clamp(min=1e-30)

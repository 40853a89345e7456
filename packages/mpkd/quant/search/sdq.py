"""SDQ: each layer learns with which probability it needs its bits, and falls to fewer.

Every layer has a candidate ``b_i`` and a parameter ``beta`` in [0, 1]. In each step its weights
have ``b_i`` bits with probability ``beta`` and the next lower candidate ``b_(i-1)`` else: a sample
of a two-way Gumbel softmax, hard forwards and soft backwards. The loss is

    task + strength * quantization error + pressure * expected cost / limit

with the error relative to the energy of the weights, and a pressure that grows fivefold on the way.
``beta`` goes up where few bits hurt and down elsewhere. Below a threshold the layer falls to
``b_(i-1)`` and begins anew with a fresh ``beta``; bits never rise. As soon as the bits fit the
budget the search ends. When its steps run out before, the layers fall for which an error of
quantization buys the most cost.

The last term of the loss and the end at the budget are ours: the paper states no budget. Phase 2
is :class:`mpkd.quant.qat.QatRun` with the bits fixed, the bin regulariser and the teacher.

Source: Huang et al. 2022, arXiv:2206.04459, section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkd.quant.budget import BitPlan, Budget
from mpkd.quant.fake_quant import Grid, best_scale, fake_quantize, per_channel
from mpkd.quant.layers import FLOAT
from mpkd.quant.qat import QatLoss, QatRun

START = 0.9  # of a fresh beta
EDGE = 1e-4  # betas are kept this far from 0 and 1 inside the logarithms
GROWTH = 5.0  # of the pressure, from the first step to the last
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

    @property
    def upper(self) -> int:
        """The present candidate."""
        return self.options[self.level]

    @property
    def lower(self) -> int | None:
        """The next lower one; None at the last."""
        return self.options[self.level - 1] if self.level else None

    def refresh(self) -> None:
        """Search the best scales for the weights as they are now."""
        weight = self.base.weight.detach()
        for bits in {self.upper, self.lower} - {None, FLOAT}:
            grid = Grid(bits, signed=True, narrow=True)
            self.scales[bits] = best_scale(weight, grid, symmetric=True, channels=True)[0]

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

    def error(self) -> Tensor:
        """Quantization error of this step's weight, relative to the weight's energy."""
        weight = self.base.weight.detach()
        return (self.sampled() - weight).square().sum() / weight.square().sum().clamp(min=1e-12)

    @torch.no_grad()
    def growth(self) -> float:
        """How much a fall adds to the relative quantization error."""
        weight, energy = self.base.weight, self.base.weight.square().sum().clamp(min=1e-12)
        errors = [(self.at(b) - weight).square().sum() for b in (self.lower, self.upper)]
        return float((errors[0] - errors[1]) / energy)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        weight = self.sampled()
        if isinstance(self.base, nn.Linear):
            return F.linear(x, weight, self.base.bias)
        return self.base._conv_forward(x, weight, self.base.bias)


class SdqRun:
    """Phase 1: weights and betas learn together until the bits fit the budget.

    Args:
        net: trained, not quantized; a copy is trained.
        budget: choices and limit.
        loss: of the student, see :class:`QatLoss`.
        steps: of the search at most.
        learning_rate: of the weights.
        beta_rate: how far one step moves the beta of the layer with the most to save, under the
            first pressure alone; other betas move in proportion to their gradients. None = so fast
            that this layer can go through all its candidates in half of the steps.
        strength: of the quantization error.
        pressure: of the expected cost relative to the limit.
        threshold: below it a layer falls.
        temperature: of the Gumbel softmax.
        seed: of the samples; no global generator is touched.
        teacher: images to logits.
        weight_decay: of the weights.

    Attributes:
        history: number of the step and bits by layer, at the start and after each fall.
    """

    def __init__(
        self,
        net: nn.Module,
        budget: Budget,
        loss: QatLoss,
        *,
        steps: int,
        learning_rate: float,
        beta_rate: float | None = None,
        strength: float = 1.0,
        pressure: float = 1.0,
        threshold: float = 0.3,
        temperature: float = 1.0,
        seed: int = 0,
        teacher: nn.Module | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 < threshold < START:
            raise ValueError(f"threshold is {threshold}, expected between 0 and {START}")
        self.budget, self.threshold, self.temperature = budget, threshold, temperature
        self.strength, self.pressure = strength, pressure
        self.net = copy.deepcopy(net)
        self.layers: dict[str, TwoWayLayer] = {}
        for name in budget.names:
            parent, _, leaf = name.rpartition(".")
            owner = self.net.get_submodule(parent)
            layer = TwoWayLayer(getattr(owner, leaf), budget.w_options[name])
            setattr(owner, leaf, layer)
            self.layers[name] = layer
        place = next(self.net.parameters()).device
        self.beta = torch.full((len(self.layers),), START, device=place, requires_grad=True)
        falls = max(layer.level for layer in self.layers.values())
        whole = (START - threshold) * falls / max(1.0, 0.5 * steps)
        self.beta_rate = whole if beta_rate is None else beta_rate
        self.generator = torch.Generator().manual_seed(seed)
        self.inner = QatRun(
            self.net, loss, steps=steps, learning_rate=learning_rate, teacher=teacher,
            weight_decay=weight_decay, extra=self._extra,
        )  # fmt: skip
        self.history: list[tuple[int, dict[str, int]]] = [(0, self.bits())]

    @property
    def done(self) -> int:
        """Steps so far."""
        return self.inner.done

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
        a = self.budget.largest().a
        return [
            0.0
            if layer.lower is None
            else (
                self.budget.table[name][layer.upper, a[name]]
                - self.budget.table[name][layer.lower, a[name]]
            )
            / self.budget.limit
            for name, layer in self.layers.items()
        ]

    def _extra(self, _net: nn.Module) -> Tensor:
        """Quantization error and expected cost (that of the lower candidates is a constant)."""
        if self.finished:
            return self.beta.new_zeros(())
        error = torch.stack([layer.error() for layer in self.layers.values()]).sum()
        cost = (self.beta * self.beta.new_tensor(self.savings())).sum()
        grown = self.pressure * (1 + (GROWTH - 1) * self.inner.done / self.inner.steps)
        return self.strength * error + grown * cost

    def step(
        self, images: Tensor, labels: Tensor | None = None, teacher_logits: Tensor | None = None
    ) -> dict[str, float]:
        """One update of weights and betas; layers whose beta is small fall.

        Once the bits fit the budget only the weights go on learning.
        """
        if self.inner.done % REFRESH == 0:
            for layer in self.layers.values():
                layer.refresh()
        if self.finished:
            return self.inner.step(images, labels, teacher_logits)
        noise = torch.rand(len(self.layers), generator=self.generator).clamp(1e-6, 1 - 1e-6)
        gates = gumbel_gate(self.beta, noise.to(self.beta.device), temperature=self.temperature)
        for gate, layer in zip(gates, self.layers.values(), strict=True):
            layer.gate = gate
        self.beta.grad = None
        try:
            found = self.inner.step(images, labels, teacher_logits)
        finally:
            for layer in self.layers.values():
                layer.gate = None
        unit = self.pressure * max(self.savings())
        with torch.no_grad():
            self.beta -= self.beta_rate * self.beta.grad / max(unit, 1e-12)
            self.beta.clamp_(0, 1)
        for index in torch.argsort(self.beta.detach()).tolist():  # the least first
            if self.finished or not float(self.beta[index].detach()) < self.threshold:
                break
            self._fall(index)
        return found

    @torch.no_grad()
    def _fall(self, index: int) -> None:
        """The layer goes to its next lower candidate and begins anew."""
        layer = list(self.layers.values())[index]
        if layer.lower is None:
            return
        layer.level -= 1
        layer.refresh()
        self.beta[index] = START
        self.history.append((self.inner.done, self.bits()))

    def settle(self) -> BitPlan:
        """The bits, within the budget whatever happened before."""
        layers = list(self.layers.values())
        while not self.finished:
            saved = self.savings()
            movable = [i for i, layer in enumerate(layers) if layer.level and saved[i] > 0]
            if not movable:
                break
            price = {i: layers[i].growth() / saved[i] for i in movable}
            self._fall(min(movable, key=price.__getitem__))
        return self.budget.check(self.budget.bring_within(self.plan()))

    def trained(self) -> nn.Module:
        """The network with the weights learned so far, plain again."""
        plain = copy.deepcopy(self.net)
        for name in self.layers:
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, plain.get_submodule(name).base)
        return plain.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on exactly."""
        return {
            "inner": self.inner.state_dict(),
            "beta": self.beta.detach().clone(),
            "generator": self.generator.get_state(),
            "levels": [layer.level for layer in self.layers.values()],
            "scales": [
                {str(bits): scale for bits, scale in layer.scales.items()}
                for layer in self.layers.values()
            ],
            "history": [[step, list(bits.values())] for step, bits in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.inner.load_state_dict(state["inner"])
        with torch.no_grad():
            self.beta.copy_(state["beta"])
        self.generator.set_state(state["generator"])
        rows = zip(self.layers.values(), state["levels"], state["scales"], strict=True)
        for layer, level, scales in rows:
            layer.level = int(level)
            layer.scales = {int(bits): scale for bits, scale in scales.items()}
        self.history = [
            (int(step), dict(zip(self.layers, map(int, bits), strict=True)))
            for step, bits in state["history"]
        ]

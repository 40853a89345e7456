"""Gates: from an exit's logits to one number that says whether a sample may leave there."""

import math

import torch
from torch import Tensor, nn

from gfnet_dynn.models.custom_modules.uncertainty import uncertainty

GATES = ("unc", "identity")
GATE_INITS = ("uniform", "torch")


class UncertaintyGate(nn.Module):
    """Logistic regression on the four uncertainty features: 5 parameters, one logit a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, logits: Tensor) -> Tensor:
        """Logits ``(N, K)`` of an exit to gate logits ``(N,)``; sigmoid of it is the gate."""
        return self.linear(uncertainty(logits)).squeeze(-1)


class IdentityGate(nn.Module):
    """No parameters: the gate's probability is the exit's own largest softmax probability."""

    def forward(self, logits: Tensor) -> Tensor:
        """Logits ``(N, K)`` to ``ln(p / (1 - p))`` of ``p = p_max``, ``(N,)``, within +-16."""
        p_max = uncertainty(logits)[..., 0]
        return torch.logit(p_max, eps=1e-7)


def make_gate(kind: str, *, num_gates: int, init: str = "uniform") -> nn.Module:
    """A gate of one kind (``unc``, ``identity``).

    Args:
        kind: which gate.
        num_gates: gates of the network; sets where ``uniform`` starts.
        init: ``torch`` keeps torch's default for Linear, as the original did. Those gates start
            near 0.5, and two of them use up all of a sample's exit mass: under the conditional
            rule nearly everything leaves at the first two exits, and the later heads get no
            weight. ``uniform`` (default) starts at weights 0 and bias ``-ln(num_gates)``: every
            exit, the final one included, owns the same mass ``1 / (num_gates + 1)``.
    """
    if init not in GATE_INITS:
        raise ValueError(f"gate init: got {init!r}, expected one of {GATE_INITS}")
    if kind == "identity":
        return IdentityGate()
    if kind != "unc":
        raise ValueError(f"gate: got {kind!r}, expected one of {GATES}")
    gate = UncertaintyGate()
    if init == "uniform":
        nn.init.zeros_(gate.linear.weight)
        nn.init.constant_(gate.linear.bias, -math.log(num_gates))
    return gate

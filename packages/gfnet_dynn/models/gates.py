"""Gates: from an exit's logits, by four uncertainty features, to one number: may a sample leave?"""

import math

import torch
from torch import Tensor, nn

from gfnet_dynn.choices import GATES

GATE_INITS = ("uniform", "torch")
FEATURE_NAMES = ("p_max", "entropy", "margin", "pow_entropy")


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of the softmax of ``logits (N, K)``: ``(N,)``, in [0, ln K]."""
    return entropy_terms(torch.softmax(logits, dim=-1)).sum(dim=-1)


def entropy_terms(p: Tensor) -> Tensor:
    """``-p ln p``, 0 where p is 0."""
    if torch.onnx.is_in_onnx_export():  # opsets before 18 are written by an exporter without entr
        return -p * p.clamp_min(torch.finfo(p.dtype).tiny).log()
    return torch.special.entr(p)


def uncertainty(logits: Tensor) -> Tensor:
    """Features of ``logits (N, K)``: ``(N, 4)``, in the order of ``FEATURE_NAMES``.

    - p_max: the largest softmax probability.
    - entropy: ``-sum p ln p``, nats, not normalised.
    - margin: largest minus second largest probability.
    - pow_entropy: entropy of ``q = p^2 / sum p^2``, which is the softmax of ``2 * logits``.

    Finite for all finite logits; nothing leaves the device. The input is detached: gates do not
    train the heads that they look at. At batch 1 it is the number of operations that costs time, a
    block having just emptied the caches: sharing kernels between both entropies costs more of them
    than it saves.

    Source: the gate features of JEI-DNN, Regol et al. 2023, arXiv:2310.09163.
    """
    logits = logits.detach()
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    log_p = torch.log_softmax(logits, dim=-1)  # at most 0: doubling it cannot overflow to +inf
    p = torch.softmax(log_p, dim=-1)
    entropy = entropy_terms(p).sum(dim=-1)
    pow_entropy = entropy_terms(torch.softmax(log_p + log_p, dim=-1)).sum(dim=-1)
    if p.shape[-1] == 1:
        p_max, second = p[..., 0], torch.zeros_like(entropy)
    else:
        p_max, second = p.topk(2, dim=-1).values.unbind(-1)
    return torch.stack([p_max, entropy, p_max - second, pow_entropy], dim=-1)


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

"""The four uncertainty features of an exit's logits that its gate looks at."""

import torch
from torch import Tensor

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

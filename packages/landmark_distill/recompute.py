"""Gradient checkpointing of a block: compute it again in backward instead of keeping it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def _counted_once(block: nn.Module) -> Iterator[None]:
    """Batch norms use the batch, but do not count it a second time in their running statistics."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # running = 1 * running + 0 * batch
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked -= 1


def run_block(block: nn.Module, *inputs: Any, again: bool) -> Tensor:
    """``block(*inputs)``; with ``again`` its inner activations are dropped and computed anew.

    Random numbers are replayed, and running statistics are updated once, so that the result is
    the same with and without.
    """
    if not (again and block.training):
        return block(*inputs)
    contexts = (contextlib.nullcontext(), _counted_once(block))
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: contexts)

"""A moving average of a model's weights, with a warm-up so that short runs are not left behind."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shared_core.checkpoints import CheckpointError, check_fit


class Ema:
    """``average = d * average + (1 - d) * weights`` after every step.

    The decay of step ``t`` (from 1) is ``min(decay, (1 + t) / (10 + t))``: with a constant decay of
    0.9999 a run of 1,000 steps would still hold 90 % of its random start. Floating-point buffers
    (batch-norm statistics) are averaged too, whole-number ones (counters) are copied.

    Args:
        model: the model that is trained; only read.
        decay: fraction in [0, 1).
        warmup: False keeps the decay constant from the first step.

    Raises:
        ValueError: ``decay`` out of range.

    Source: the warm-up is that of TensorFlow's ExponentialMovingAverage (``num_updates``).
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}, expected 0 <= decay < 1")
        self.decay = decay
        self.warmup = warmup
        self.step = 0
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def decay_at(self, step: int) -> float:
        """The decay of update number ``step``, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights of this step in."""
        self.step += 1
        decay = self.decay_at(self.step)
        for name, value in model.state_dict().items():
            average = self.weights[name]
            if average.is_floating_point() or average.is_complex():
                average.lerp_(value.to(average), 1.0 - decay)
            else:
                average.copy_(value)

    def copy_to(self, model: nn.Module) -> None:
        """Put the averages into ``model``, of which nothing remains."""
        model.load_state_dict(self.weights)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """``model`` with the averages inside the ``with``, with its own weights again after it."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.copy_to(model)
        try:
            yield model
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on exactly."""
        return {
            "step": self.step,
            "decay": self.decay,
            "warmup": self.warmup,
            "weights": dict(self.weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            CheckpointError: weights of another model, or another decay than this run's.
        """
        for name in ("decay", "warmup"):
            if state[name] != getattr(self, name):
                raise CheckpointError(
                    f"EMA: stored {name} is {state[name]}, expected {getattr(self, name)}"
                )
        weights: Mapping[str, Tensor] = state["weights"]
        check_fit(
            "EMA",
            model={name: value.shape for name, value in self.weights.items()},
            weights={name: value.shape for name, value in weights.items()},
        )
        self.step = int(state["step"])
        for name, value in weights.items():
            self.weights[name].copy_(value)

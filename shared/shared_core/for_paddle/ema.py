"""A moving average of a network's weights: the twin of :mod:`shared_core.for_torch.ema`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import nn

from shared_core.checkpoints import CheckpointError, check_fit


class Ema:
    """``average = d * average + (1 - d) * weights`` after every step.

    The decay of step ``t`` (from 1) is ``min(decay, (1 + t) / (10 + t))``, so that a short run is
    not left with its random start. Batch-norm statistics are averaged too, whole numbers copied.

    Args:
        model: the network that is trained; only read.
        decay: fraction in [0, 1).
        warmup: False keeps the decay constant from the first step.

    Raises:
        ValueError: ``decay`` out of range.

    Source: the warm-up is that of TensorFlow's ExponentialMovingAverage (``num_updates``).
    """

    def __init__(self, model: nn.Layer, *, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}, expected 0 <= decay < 1")
        self.decay, self.warmup, self.step = decay, warmup, 0
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def decay_at(self, step: int) -> float:
        """The decay of update number ``step``, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @paddle.no_grad()
    def update(self, model: nn.Layer) -> None:
        """Take the model's weights of this step in."""
        self.step += 1
        decay = self.decay_at(self.step)
        for name, value in model.state_dict().items():
            average = self.weights[name]
            if average.is_floating_point():
                # In this form weights that do not change stay as they are, to the bit.
                value = average + (value.astype(average.dtype) - average) * (1.0 - decay)
            average.set_value(value)

    def copy_to(self, model: nn.Layer) -> None:
        """Put the averages into ``model``, of which nothing remains."""
        model.set_state_dict(self.weights)

    @contextmanager
    def applied(self, model: nn.Layer) -> Iterator[nn.Layer]:
        """``model`` with the averages inside the ``with``, with its own weights again after it."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.copy_to(model)
        try:
            yield model
        finally:
            model.set_state_dict(own)

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
        check_fit(
            "EMA",
            model={name: list(value.shape) for name, value in self.weights.items()},
            weights={name: list(value.shape) for name, value in state["weights"].items()},
        )
        self.step = int(state["step"])
        for name, value in state["weights"].items():
            self.weights[name].set_value(paddle.to_tensor(value))

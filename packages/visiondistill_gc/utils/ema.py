"""A moving average of a network's weights, with a warm-up for short runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import nn

from shared_core.checkpoints import CheckpointError


class Ema:
    """``average = d * average + (1 - d) * weights``; ``d = min(decay, (1 + t) / (10 + t))``.

    Batch-norm statistics are averaged too.

    Args:
        net: only read.
        decay: fraction in [0, 1).

    Raises:
        ValueError: ``decay`` out of range.

    Source: the warm-up is that of TensorFlow's ExponentialMovingAverage (``num_updates``).
    """

    def __init__(self, net: nn.Layer, *, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}, expected 0 <= decay < 1")
        self.decay, self.step = decay, 0
        self.weights = {k: v.detach().clone() for k, v in net.state_dict().items()}

    @paddle.no_grad()
    def update(self, net: nn.Layer) -> None:
        """Take the weights after a step in."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for name, value in net.state_dict().items():
            average = self.weights[name]
            average.set_value(average * decay + value.astype(average.dtype) * (1.0 - decay))

    @contextmanager
    def applied(self, net: nn.Layer) -> Iterator[nn.Layer]:
        """``net`` with the averages inside the ``with``, with its own weights again after it."""
        own = {name: value.detach().clone() for name, value in net.state_dict().items()}
        net.set_state_dict(self.weights)
        try:
            yield net
        finally:
            net.set_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on exactly."""
        return {"step": self.step, "decay": self.decay, "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            CheckpointError: of another network or decay.
        """
        if state["decay"] != self.decay or set(state["weights"]) != set(self.weights):
            raise CheckpointError("EMA: stored state is of another network or decay")
        self.step = int(state["step"])
        for name, value in state["weights"].items():
            self.weights[name].set_value(paddle.to_tensor(value))

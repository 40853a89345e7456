"""What may learn beside a network: told of every step, with a term of its own in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Companion:
    """Does nothing; a search or a regulariser says what it does instead.

    Whatever trains the network calls ``before_step``, adds ``term`` to the loss of every batch,
    steps, and calls ``after_step``. Its state is kept with that of the training.
    """

    def tensors(self) -> Sequence[Tensor]:
        """What has gradients and is no parameter of the network: averaged over the processes."""
        return ()

    def before_step(self, step: int, total: int) -> None:
        """Step ``step`` (from 0) of ``total`` begins."""

    def term(self, net: nn.Module) -> Tensor | None:
        """What is added to the loss, a scalar; None for nothing."""
        return None

    def after_step(self) -> None:
        """The step is done; gradients of what is no parameter of the network are still there."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""

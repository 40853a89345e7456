"""The warm-up: each exit learns until its own patience is out, then is frozen at its best."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfnet_dynn.train.phases import forget_momentum
from shared_core.checkpoints import atomic_write

PATIENCE = 2  # epochs without improvement; the original has no flag for it


def warmup_weights(num_exits: int) -> list[float]:
    """Weights of the exits' losses, ``G+1-l``: 5, 4, 3, 2 for four exits; the final head has 1."""
    return [float(num_exits + 1 - index) for index in range(num_exits)]


def warmup_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """``CE_final + sum_l (G+1-l) CE_l``, nats; early exits weigh most.

    Args:
        logits: G+1 tensors ``(N, K)``, final head last.
        labels: int64 ``(N,)``.
    """
    weights = [*warmup_weights(len(logits) - 1), 1.0]
    losses = [F.cross_entropy(z.float(), labels) for z in logits]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


class WarmUp:
    """Patience of every exit. Call :meth:`update` once an epoch with the validation accuracies.

    Improvement is strict. At ``patience`` epochs without it the exit gets its best weights back
    and is frozen; all frozen, or ``max_epochs`` reached, ends the warm-up, and every exit then
    holds its best weights.

    Args:
        exits: block index of each exit; names the files.
        patience: epochs, at least 1.
        max_epochs: ``--max_warmup_epoch``, 0 for no warm-up.
        folder: where the best weights of each exit are also written, as
            ``{'state', 'acc', 'epoch'}``; nothing is written if None.
    """

    def __init__(
        self,
        exits: Sequence[int],
        *,
        patience: int = PATIENCE,
        max_epochs: int = 10,
        folder: str | Path | None = None,
    ):
        if patience < 1:
            raise ValueError(f"patience of the warm-up is {patience}; expected 1 or more epochs")
        if max_epochs < 0:
            raise ValueError(f"max_warmup_epoch is {max_epochs}; expected 0 or more")
        if not exits:
            raise ValueError("no exits to warm up; expected one or more")
        self.exits = tuple(int(exit_block) for exit_block in exits)
        self.patience, self.max_epochs = int(patience), int(max_epochs)
        self.folder = None if folder is None else Path(folder)
        self.epoch = 0  # epochs finished
        self.best_accuracy = [-1.0] * len(self.exits)  # fractions; -1: none yet
        self.best_epoch = [-1] * len(self.exits)
        self.waited = [0] * len(self.exits)
        self.is_frozen = [False] * len(self.exits)
        self.best_state: list[dict[str, Tensor] | None] = [None] * len(self.exits)

    @property
    def frozen_exits(self) -> tuple[int, ...]:
        """Numbers ``0..G-1`` of the exits that are frozen."""
        return tuple(index for index, frozen in enumerate(self.is_frozen) if frozen)

    @property
    def all_frozen(self) -> bool:
        return all(self.is_frozen)

    @property
    def done(self) -> bool:
        """Whether the warm-up is over."""
        return self.all_frozen or self.epoch >= self.max_epochs

    def update(
        self,
        heads: Sequence[nn.Module],
        accuracies: Sequence[float],
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> list[int]:
        """One epoch is finished. Returns the numbers of the exits that were frozen by it.

        Args:
            heads: the exit heads; best weights are put back into them.
            accuracies: validation accuracy of each exit, fractions in [0, 1].
            optimizer: forgets the momentum of weights that were put back.
        """
        if not len(heads) == len(accuracies) == len(self.exits):
            raise ValueError(
                f"{len(heads)} heads and {len(accuracies)} accuracies; "
                f"expected {len(self.exits)} of each"
            )
        if self.done:
            raise ValueError(f"the warm-up ended after epoch {self.epoch}; expected no update")
        newly_frozen = []
        for index, (head, accuracy) in enumerate(zip(heads, accuracies, strict=True)):
            if self.is_frozen[index]:
                continue
            if float(accuracy) > self.best_accuracy[index]:
                self._keep(index, head, float(accuracy))
            else:
                self.waited[index] += 1
            if self.waited[index] >= self.patience:
                self.is_frozen[index] = True
                newly_frozen.append(index)
                self._restore(index, head, optimizer)
        self.epoch += 1
        if self.epoch >= self.max_epochs:
            for index, head in enumerate(heads):
                if not self.is_frozen[index]:
                    self._restore(index, head, optimizer)
        return newly_frozen

    def _keep(self, index: int, head: nn.Module, accuracy: float) -> None:
        self.best_accuracy[index] = accuracy
        self.best_epoch[index] = self.epoch
        self.waited[index] = 0
        state = {name: value.detach().cpu().clone() for name, value in head.state_dict().items()}
        self.best_state[index] = state
        if self.folder is not None:
            content = {"state": state, "acc": accuracy, "epoch": self.epoch}
            path = self.folder / f"{self.exits[index]}.pth"
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda scratch: torch.save(content, scratch))

    def _restore(
        self, index: int, head: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> None:
        state = self.best_state[index]
        if state is None:  # never better than nothing: the accuracies were not numbers
            return
        head.load_state_dict(state)
        if optimizer is not None:
            forget_momentum(optimizer, head.parameters())

    def state_dict(self) -> dict:
        """Tensors and plain values, enough to go on exactly here without the files."""
        return copy.deepcopy(
            {
                "exits": list(self.exits),
                "patience": self.patience,
                "max_epochs": self.max_epochs,
                "epoch": self.epoch,
                "best_accuracy": self.best_accuracy,
                "best_epoch": self.best_epoch,
                "waited": self.waited,
                "is_frozen": self.is_frozen,
                "best_state": self.best_state,
            }
        )

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: the state is that of other exits or another patience.
        """
        for key, mine in {
            "exits": list(self.exits),
            "patience": self.patience,
            "max_epochs": self.max_epochs,
        }.items():
            if state[key] != mine:
                raise ValueError(f"the saved warm-up has {key} {state[key]!r}; expected {mine!r}")
        state = copy.deepcopy(state)
        self.epoch = state["epoch"]
        self.best_accuracy, self.best_epoch = state["best_accuracy"], state["best_epoch"]
        self.waited, self.is_frozen = state["waited"], state["is_frozen"]
        self.best_state = state["best_state"]

"""In which order the samples of an epoch come, on which rank, and how far the epoch has got."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.datasets.errors import DatasetError
from shared_core.datasets.views.view_random import view_rng

UNEVEN = ("keep", "wrap", "drop")


class EpochOrder:
    """The order of ``n`` samples in each epoch, shared out among ranks, with a position to save.

    Rank r gets every ``world_size``-th sample from the r-th on, so the batches of all ranks
    together are the batch that one rank would have had.

    Args:
        n: number of samples.
        seed: decides every epoch's permutation.
        shuffle: a new permutation each epoch; otherwise 0 to n - 1.
        rank, world_size: this process among how many.
        uneven: when ``world_size`` does not divide ``n``: ``keep`` gives some ranks one sample
            more, so that no sample is lost or doubled (evaluation); ``wrap`` repeats samples from
            the start and ``drop`` leaves the last out, so that all ranks get as many (training).

    ``epoch`` and ``position`` (samples of this rank already handed out in this epoch) may be read.

    Raises:
        ValueError: a rank outside the world, a negative ``n``, an unknown ``uneven``.
    """

    def __init__(
        self,
        n: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        uneven: str = "keep",
    ) -> None:
        if n < 0:
            raise ValueError(f"{n} samples, expected at least 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}, expected 0 <= rank < world size")
        if uneven not in UNEVEN:
            raise ValueError(f"uneven {uneven!r}, expected one of {', '.join(UNEVEN)}")
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self.rank, self.world_size, self.uneven = rank, world_size, uneven
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        if self.uneven == "wrap":
            return -(-self.n // self.world_size)
        if self.uneven == "drop":
            return self.n // self.world_size
        return (self.n - self.rank + self.world_size - 1) // self.world_size

    def indices(self, epoch: int | None = None) -> npt.NDArray[np.int64]:
        """All samples of this rank in an epoch (the current one by default), in order."""
        epoch = self.epoch if epoch is None else epoch
        if self.shuffle:
            order = view_rng(self.seed, "order", epoch).permutation(self.n)
        else:
            order = np.arange(self.n)
        if self.uneven == "wrap":
            order = np.resize(order, len(self) * self.world_size)
        elif self.uneven == "drop":
            order = order[: len(self) * self.world_size]
        return np.ascontiguousarray(order[self.rank :: self.world_size], dtype=np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        if epoch < 0:
            raise ValueError(f"epoch {epoch}, expected at least 0")
        self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, as plain JSON; the rank is not part of it."""
        return {**self._identity(), "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where ``state`` stood.

        Raises:
            DatasetError: it is of another set of samples, seed or number of ranks.
        """
        for name, value in self._identity().items():
            if name not in state or state[name] != value:
                raise DatasetError(
                    f"saved sample order has {name} {state.get(name)!r}, expected {value!r}"
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= len(self):
            raise DatasetError(
                f"saved sample order stands at epoch {epoch}, position {position},"
                f" expected a position of at most {len(self)}"
            )
        self.epoch, self.position = epoch, position

    def _identity(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "world_size": self.world_size,
            "uneven": self.uneven,
        }

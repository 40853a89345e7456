"""An epoch in which every class comes as often as any other, whatever its number of images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_core.datasets import EpochOrder
from shared_core.datasets.views.view_random import view_rng


class BalancedOrder(EpochOrder):
    """As many samples an epoch as there are images, an equal share of each class that has any.

    Of a large class some images wait for a later epoch, those of a small one come several times,
    none twice before all of its class came once. Where the shares do not divide, the classes that
    get one more are drawn.

    Args:
        labels: of all images, ``(N,)``.
        sharing: see :class:`EpochOrder`.
    """

    def __init__(self, labels: ArrayLike, **sharing: Any) -> None:
        self.labels = np.asarray(labels)
        super().__init__(len(self.labels), **sharing)

    def indices(self, epoch: int | None = None) -> NDArray[np.int64]:
        """All samples of this rank in an epoch (the current one by default), in order."""
        rng = view_rng(self.seed, "balanced", self.epoch if epoch is None else epoch)
        members = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        extra = rng.permutation(len(members)) < self.n % len(members)
        order = rng.permutation(
            np.concatenate(
                [
                    np.resize(rng.permutation(rows), self.n // len(members) + more)
                    for rows, more in zip(members, extra, strict=True)
                ]
            )
        )
        if self.uneven == "wrap":
            order = np.resize(order, len(self) * self.world_size)
        return np.ascontiguousarray(order[self.rank :: self.world_size], dtype=np.int64)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "balanced": True}

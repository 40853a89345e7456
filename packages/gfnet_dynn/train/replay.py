"""Embeddings of a frozen network, computed once for every training that sees the same images.

Settings of exits on one student differ in what stands on the network, not in what the network says
of an image: with the same seed they see the same views in the same order. A first training records
what the others replay, which leaves them heads and gates to compute.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from shared_core.for_torch.precision import Precision

LIMIT = 2 * 2**30  # bytes that one recording may take


class Replay:
    """Batches of embeddings by the name of an epoch, held in memory.

    Args:
        blocks: blocks of every exit that will be trained; the last block is recorded in any case.
        network: what names the frozen network, such as the hash of its file.
    """

    def __init__(self, blocks: Sequence[int], *, network: str) -> None:
        self.blocks = sorted(set(blocks))
        self.network = network
        self._kept: dict[Hashable, list[tuple[dict[int, Tensor], Tensor]]] = {}

    @staticmethod
    def fits(images: int, blocks: int, channels: int) -> bool:
        """Whether float32 embeddings of so many images and blocks stay below the limit."""
        return 4 * images * (blocks + 1) * channels <= LIMIT

    def batches(
        self,
        epoch: Hashable,
        images: Iterable[tuple[Tensor, Tensor]],
        model: GFNetDynn,
        *,
        network: str,
        precision: Precision,
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """``(embeddings, labels)`` in place of ``(images, labels)``, bit for bit what
        ``model.exit_features(images)`` gives.

        Args:
            epoch: two trainings that name it alike see the same images in it.
            images: not touched when the epoch is known. One that is left before its end is not
                kept.
            network: of the model's backbone.

        Raises:
            ValueError: another network, or an exit behind a block that is not recorded.
        """
        if network != self.network:
            raise ValueError(f"replay: got network {network}, recorded is {self.network}")
        if missing := set(model.exits) - set(self.blocks):
            raise ValueError(f"replay: blocks {sorted(missing)} are not in {self.blocks}")
        last = model.backbone.depth - 1
        wanted = (*model.exits, last)
        if epoch in self._kept:
            for embeddings, labels in self._kept[epoch]:
                yield [embeddings[block] for block in wanted], labels
            return
        heard = []
        blocks = sorted({*self.blocks, last})
        for batch, labels in images:
            with torch.no_grad(), precision.autocast():
                tokens = model.backbone.block_tokens(batch, blocks)
                embeddings = {
                    block: model.backbone.pool(t) for block, t in zip(blocks, tokens, strict=True)
                }
            heard.append((embeddings, labels.clone()))  # a loader may use its buffers again
            yield [embeddings[block] for block in wanted], labels
        self._kept[epoch] = heard

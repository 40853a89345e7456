"""One loop over a data set in evaluation mode: each image's logits once, from all processes.

The twin of :mod:`shared_core.for_torch.accuracy`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import paddle
from paddle import nn

from shared_core.for_paddle.data import PaddleLoader
from shared_core.for_paddle.distributed import World, gather_objects, gather_samples, unwrap
from shared_core.for_paddle.precision import Precision


@dataclass(frozen=True)
class Answers:
    """What a network said of the images that could be read."""

    logits: npt.NDArray[np.float32]  # (N, C)
    labels: npt.NDArray[np.int64]  # (N,)
    rows: npt.NDArray[np.int64]  # (N,): their numbers in the image set, rising
    lost: tuple[int, ...] = ()  # numbers of the images that could not be read

    @property
    def accuracy(self) -> float:
        """Share of the images whose largest logit is that of their label, in [0, 1]."""
        return float((self.logits.argmax(axis=1) == self.labels).mean())


@paddle.no_grad()
def answers_of(
    net: nn.Layer, loader: PaddleLoader, world: World, *, precision: Precision | None = None
) -> Answers:
    """Logits of every image of the loader's set, in its order; the same in all processes.

    The network is in evaluation mode meanwhile and afterwards as it was. Wrapped or not, each
    process uses its own copy, whose batch-norm statistics are its own.

    Args:
        net: images ``(n, 3, H, W)`` to logits ``(n, C)``.
        loader: in order; the processes of ``world`` have the images shared out among them.
        world: from :func:`shared_core.for_paddle.distributed.start`.
        precision: of the forward pass; None computes in fp32.

    Raises:
        ValueError: no image could be read, or images that no process has.
    """
    plain = unwrap(net)
    training, source = plain.training, loader.loader
    precision = precision or Precision(world.device, "fp32")
    plain.eval()
    source.skipped.clear()
    logits, indices = [], []
    try:
        for batch in loader:
            with precision.autocast():
                logits.append(plain(batch.images).astype("float32").numpy())
            indices.append(batch.indices)
    finally:
        if training:
            plain.train()
    skipped = [item.index for item in source.skipped]
    total = len(source.image_set)
    widths = gather_objects([found.shape[1] for found in logits[:1]], world)
    classes = next((found[0] for found in widths if found), 0)
    if not classes:
        raise ValueError(f"none of the {total} images can be read")
    # An image that cannot be read gets a row of NaN, so that none is lost on the way.
    logits.append(np.full((len(skipped), classes), np.nan, np.float32))
    indices.append(np.array(skipped, np.int64))
    every = gather_samples(
        paddle.to_tensor(np.concatenate(logits)),
        paddle.to_tensor(np.concatenate(indices)),
        world,
        total=total,
    )
    lost = sorted(set().union(*gather_objects(set(skipped), world)))
    rows = np.delete(np.arange(total, dtype=np.int64), np.asarray(lost, np.int64))
    if not len(rows):
        raise ValueError(f"none of the {total} images can be read")
    labels = np.asarray(source.image_set.labels, np.int64)[rows]
    return Answers(every.numpy()[rows], labels, rows, tuple(lost))

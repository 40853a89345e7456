"""From uint8 batches to Paddle tensors: moved as bytes, normalised on the device, once a batch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, fractions of 255
IMAGENET_STD = (0.229, 0.224, 0.225)


class Batch(Protocol):
    """What a loader of :mod:`shared_core.datasets` gives."""

    images: NDArray[np.uint8]  # (N, H, W, 3), RGB
    labels: NDArray[np.int64]  # (N,)
    indices: NDArray[np.int64]  # (N,)
    view_id: int


class Normalizer:
    """Turns uint8 ``(N, H, W, 3)`` into ``(x / 255 - mean) / std``, float32 ``(N, 3, H, W)``.

    Args:
        mean: of each channel, fractions of 255 in RGB order.
        std: likewise.

    Raises:
        ValueError: not three channels, or a std of 0 or below.
    """

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean}, std {std}, expected three of each and std above 0")
        self.mean, self.std = tuple(mean), tuple(std)
        # x * scale + shift, computed in float64 so that float32 gets the nearest values.
        spread = np.asarray(std, dtype=np.float64)
        self._scale = (1 / (255 * spread)).astype(np.float32)
        self._shift = (-np.asarray(mean) / spread).astype(np.float32)

    def __call__(self, images: NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalise a batch on Paddle's current device.

        Args:
            images: uint8 ``(N, H, W, 3)``, array or tensor.

        Returns:
            float32, shape ``(N, 3, H, W)``.

        Raises:
            ValueError: another type or shape.
        """
        batch = images if isinstance(images, Tensor) else paddle.to_tensor(images)
        if batch.dtype != paddle.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
            raise ValueError(
                f"images {batch.dtype} of shape {tuple(batch.shape)}, expected uint8 (N, H, W, 3)"
            )
        scale, shift = paddle.to_tensor(self._scale), paddle.to_tensor(self._shift)
        pixels = batch.astype("float32") * scale + shift
        return pixels.transpose([0, 3, 1, 2])


class PaddleBatch(NamedTuple):
    """A batch on Paddle's current device."""

    images: Tensor  # float32 (N, 3, H, W), normalised
    labels: Tensor  # int64 (N,)
    indices: NDArray[np.int64]  # (N,)
    view_id: int


def to_device(batch: Batch, normalizer: Normalizer) -> PaddleBatch:
    """Move a batch to the device as bytes and normalise it there."""
    return PaddleBatch(
        normalizer(batch.images), paddle.to_tensor(batch.labels), batch.indices, batch.view_id
    )


class PaddleLoader:
    """A loader of :mod:`shared_core.datasets` whose batches come out as Paddle tensors."""

    def __init__(self, loader: Any, normalizer: Normalizer) -> None:
        self.loader, self.normalizer = loader, normalizer

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[PaddleBatch]:
        for batch in self.loader:
            yield to_device(batch, self.normalizer)

    def state_dict(self) -> dict[str, Any]:
        """Position of the loader; see there."""
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from that position."""
        self.loader.load_state_dict(state)

"""From uint8 batches to tensors: moved to the device as bytes, normalised there, once a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from shared_core.datasets.reading.buffers import BufferPool
from shared_core.datasets.reading.loader import Batch, BatchLoader

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, fractions of 255
IMAGENET_STD = (0.229, 0.224, 0.225)

# torch splits work of 32768 numbers or more among its threads. Beside the loader's threads that
# costs more than it brings: each operation would wait for the slowest.
_SERIAL = 32767


class Normalizer:
    """Turns uint8 ``(N, H, W, 3)`` into ``(x / 255 - mean) / std``, ``(N, 3, H, W)`` on a device.

    The result is a permuted view of the batch's own layout, so it is in ``channels_last`` format
    without a copy. On a CPU its memory is used again once nothing refers to it.

    Args:
        mean, std: of each channel, fractions of 255 in RGB order.
        device: where the result lies.
        dtype: of the result; the arithmetic is float32.

    Raises:
        ValueError: not three channels, or a std of 0 or below.
    """

    def __init__(
        self,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean}, std {std}, expected three of each and std above 0")
        self.mean, self.std = tuple(mean), tuple(std)
        self.device, self.dtype = torch.device(device), dtype
        # x * scale + shift, computed in float64 so that float32 gets the nearest values.
        spread = np.asarray(std, dtype=np.float64)
        self._scale = torch.from_numpy((1 / (255 * spread)).astype(np.float32)).to(self.device)
        self._shift = torch.from_numpy((-np.asarray(mean) / spread).astype(np.float32)).to(
            self.device
        )
        self._pool = BufferPool()
        self._runs: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, images: npt.NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
        """Normalise a batch.

        Args:
            images: uint8 ``(N, H, W, 3)``, array or tensor.

        Returns:
            ``(N, 3, H, W)`` on the device, ``channels_last``.

        Raises:
            ValueError: another type or shape.
        """
        batch = _as_tensor(images)
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
            raise ValueError(
                f"images {batch.dtype} of shape {tuple(batch.shape)}, expected uint8 (N, H, W, 3)"
            )
        if self.device.type == "cpu" and batch.device.type == "cpu" and batch.is_contiguous():
            pixels = self._on_cpu(batch)
        else:
            moved = move(batch, self.device)
            pixels = torch.addcmul(self._shift, moved.to(torch.float32), self._scale)
        return pixels.permute(0, 3, 1, 2).to(self.dtype)

    def _on_cpu(self, batch: torch.Tensor) -> torch.Tensor:
        """The same on flat runs of pixels, a part at a time that stays in the cache."""
        number, height, width, _ = batch.shape
        # A run is a row of the image, or all of a small image: short runs would be slow.
        run = 3 * width * (height if height * width <= 2048 else 1)
        if self._runs is None or len(self._runs[0]) != run:
            self._runs = (self._scale.repeat(run // 3), self._shift.repeat(run // 3))
        scale, shift = self._runs
        total = number * height * width * 3 // max(1, run)
        out = torch.from_numpy(self._pool.take((total, run), np.float32))
        source = batch.view(total, run)
        step = max(1, _SERIAL // max(1, run))
        buffer = torch.empty((min(step, total), run))
        for n in range(0, total, step):
            part = source[n : n + step]
            floats = buffer[: len(part)].copy_(part)
            torch.addcmul(shift, floats, scale, out=out[n : n + step])
        return out.view(number, height, width, 3)


class TorchBatch(NamedTuple):
    """A batch on its device."""

    images: torch.Tensor  # (N, 3, H, W), normalised
    labels: torch.Tensor  # int64 (N,)
    indices: torch.Tensor  # int64 (N,), on the CPU
    view_id: int


def to_device(batch: Batch, normalizer: Normalizer) -> TorchBatch:
    """Move a batch to the normalizer's device as bytes and normalise it there."""
    return TorchBatch(
        normalizer(batch.images),
        move(torch.from_numpy(batch.labels), normalizer.device),
        torch.from_numpy(batch.indices),
        batch.view_id,
    )


class TorchLoader:
    """A ``BatchLoader`` whose batches come out as tensors on the normalizer's device."""

    def __init__(self, loader: BatchLoader, normalizer: Normalizer) -> None:
        self.loader, self.normalizer = loader, normalizer

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[TorchBatch]:
        for batch in self.loader:
            yield to_device(batch, self.normalizer)

    def state_dict(self) -> dict[str, object]:
        """See ``BatchLoader.state_dict``."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """See ``BatchLoader.load_state_dict``."""
        self.loader.load_state_dict(state)


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device; from pinned memory where that lets the copy run beside the computing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _as_tensor(images: npt.NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    if isinstance(images, torch.Tensor):
        return images
    if not images.flags.writeable:  # torch would warn; a copy of bytes is cheap
        images = images.copy()
    return torch.from_numpy(images)

"""Micro-batching: images that arrive close together go through the network as one batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Put = Callable[[Sequence[Image]], "list[Future[Any]]"]


class BusyError(RuntimeError):
    """No room in the queue, or it is closed; the caller should try again later."""


class Batcher:
    """One thread that gathers images and runs the network.

    The first image of a batch waits at most ``max_wait`` for company, and not at all when the
    batch is full. What is in the queue when :meth:`close` is called is still answered.

    Args:
        run: uint8 images ``(N, H, W, 3)`` to N answers; called in one thread only.
        max_batch: most images a batch.
        max_wait: seconds; 0 takes what is there.
        max_queue: images that may wait; more are refused.

    Raises:
        ValueError: a limit below 1, or a negative wait.
    """

    def __init__(
        self,
        run: Callable[[Image], Sequence[Any]],
        *,
        max_batch: int = 16,
        max_wait: float = 0.002,
        max_queue: int = 256,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or not max_wait >= 0:
            raise ValueError(
                f"batch {max_batch}, queue {max_queue}, wait {max_wait}: expected at least 1, 1, 0"
            )
        self._run, self._max_batch, self._max_wait = run, max_batch, max_wait
        self.max_queue = max_queue
        self._waiting: deque[tuple[Image, Future[Any]]] = deque()
        self._promised = 0  # images that have room and are not there yet
        self._changed = threading.Condition()
        self._closed = False
        self.images = self.batches = self.largest = 0  # what went through
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._waiting)

    @contextmanager
    def room(self, count: int) -> Iterator[Put]:
        """Keep room for ``count`` images, so that decoding them is not in vain.

        What it gives puts exactly these images into the queue and returns a future each. Room that
        was not used is free again when the block ends.

        Raises:
            BusyError: the queue has no room for all of them, or is closed; nothing was kept.
        """
        with self._changed:
            if self._closed:
                raise BusyError("the service is shutting down")
            taken = len(self._waiting) + self._promised
            if taken + count > self.max_queue:
                raise BusyError(f"{taken} images are waiting already, try again later")
            self._promised += count
        left = count

        def put(images: Sequence[Image]) -> list[Future[Any]]:
            nonlocal left
            if len(images) > left:
                raise ValueError(f"{len(images)} images where {left} have room")
            pairs: list[tuple[Image, Future[Any]]] = [(image, Future()) for image in images]
            with self._changed:
                if self._closed:
                    raise BusyError("the service is shutting down")
                self._promised -= len(pairs)
                left -= len(pairs)
                self._waiting.extend(pairs)
                self._changed.notify()
            return [future for _, future in pairs]

        try:
            yield put
        finally:
            with self._changed:
                self._promised -= left

    def submit_many(self, images: Sequence[Image]) -> list[Future[Any]]:
        """Queue all of ``images``, or none: a future each, of its answer.

        Raises:
            BusyError: the queue has no room for all of them, or is closed.
        """
        with self.room(len(images)) as put:
            return put(images)

    def close(self) -> None:
        """Answer what waits, then stop the thread; more is refused."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _gather(self) -> list[tuple[Image, Future[Any]]]:
        """The next batch; empty when the queue is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            due = time.monotonic() + self._max_wait
            while len(self._waiting) < self._max_batch and not self._closed:
                left = due - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            size = min(len(self._waiting), self._max_batch)
            return [self._waiting.popleft() for _ in range(size)]

    def _work(self) -> None:
        while batch := self._gather():
            # One whose asker went away is not computed.
            batch = [(i, f) for i, f in batch if f.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                answers = self._run(np.stack([image for image, _ in batch]))
                if len(answers) != len(batch):
                    raise RuntimeError(f"{len(answers)} answers for {len(batch)} images")
            except Exception as error:  # whatever it is, those who wait must hear of it
                for _, future in batch:
                    future.set_exception(error)
                continue
            self.images += len(batch)
            self.batches += 1
            self.largest = max(self.largest, len(batch))
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

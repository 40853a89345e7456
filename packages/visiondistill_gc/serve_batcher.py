"""Micro-batching: images that arrive close together go through the network as one batch."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError

import numpy as np


class BusyError(RuntimeError):
    """No room in the queue, or it is closed; the caller should try again later."""


class Batcher:
    """One thread that gathers images and runs the network.

    The first image of a batch waits at most ``max_wait`` for company, and not at all when the
    batch is full. What is in the queue when :meth:`close` is called is still answered.

    Args:
        run: uint8 images ``(N, H, W, 3)`` to probabilities ``(N, K)``; called in one thread only.
        max_batch: most images a batch.
        max_wait: seconds; 0 takes what is there.
        max_queue: images that may wait; more are refused.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], np.ndarray],
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
        self._queue: queue.Queue[tuple[np.ndarray, Future] | None] = queue.Queue()
        self._max_queue = max_queue
        self._lock = threading.Lock()
        self._closed = False
        self.images = self.batches = self.largest = 0  # what went through
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self._queue.qsize()

    def submit(self, image: np.ndarray) -> Future:
        """Put one image ``(H, W, 3)`` into the queue; the future gives its probabilities ``(K,)``.

        Raises:
            BusyError: the queue is full, or closed.
        """
        answer: Future = Future()
        with self._lock:
            if self._closed:
                raise BusyError("the service is shutting down")
            if self._queue.qsize() >= self._max_queue:
                raise BusyError(f"{self._max_queue} images are waiting already, try again later")
            self._queue.put((image, answer))
        return answer

    def close(self) -> None:
        """Answer what waits, then stop the thread; more is refused."""
        with self._lock:
            already, self._closed = self._closed, True
            if not already:
                self._queue.put(None)
        self._thread.join()

    def _gather(self) -> tuple[list[tuple[np.ndarray, Future]], bool]:
        """The next batch, and whether more may come."""
        first = self._queue.get()
        if first is None:
            return [], False
        batch, due = [first], time.monotonic() + self._max_wait
        while len(batch) < self._max_batch:
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return batch, False
            batch.append(item)
        return batch, True

    def _work(self) -> None:
        more = True
        while more:
            batch, more = self._gather()
            # One whose asker went away is not computed.
            batch = [(i, f) for i, f in batch if f.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                rows = self._run(np.stack([image for image, _ in batch]))
            except Exception as error:  # whatever it is, those who wait must hear of it
                for _, future in batch:
                    future.set_exception(error)
                continue
            self.images += len(batch)
            self.batches += 1
            self.largest = max(self.largest, len(batch))
            for (_, future), row in zip(batch, rows, strict=True):
                try:
                    future.set_result(row)
                except InvalidStateError:  # pragma: no cover - it cannot be cancelled while running
                    continue

"""Batches of views: decoded and augmented by threads, straight into preallocated uint8 batches.

Threads are enough because decoding and resizing release the interpreter lock, and they save what
processes pay for: copying batches between them. Normalisation is left to the device.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared_core.datasets.errors import DatasetError
from shared_core.datasets.reading.buffers import BufferPool
from shared_core.datasets.reading.decode import EncodedImage, dct_factor
from shared_core.datasets.reading.image_headers import Pixels
from shared_core.datasets.reading.image_set import ImageSet
from shared_core.datasets.reading.order import EpochOrder
from shared_core.datasets.views.augment import Plan, SmallView, View
from shared_core.datasets.views.view_random import ViewRandom


@dataclass(frozen=True)
class Batch:
    """One batch; valid for as long as anything refers to its arrays."""

    images: Pixels  # uint8 (N, H, W, 3), RGB
    labels: npt.NDArray[np.int64]  # (N,)
    indices: npt.NDArray[np.int64]  # (N,), into the image set
    view_id: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read."""

    index: int
    name: str
    reason: str


class BatchLoader:
    """Iterates over the rest of the current epoch of ``order``, then moves it to the next.

    Batches come in order and are the same for any number of threads. Saving ``state_dict()`` in the
    loop's body and loading it later goes on with the batch after the one in hand. Leaving the loop
    early stops the threads; the position stays, so the next loop goes on there.

    Args:
        image_set: where images and labels come from.
        view: a ``TrainView``, ``EvalView``, ``SmallView``, or another with their methods.
        batch_size: samples a batch.
        order: an ``EpochOrder`` over the image set; by default every image once, in order.
        threads: how many decode; by default the cores this process may use, at most 8. 0 works in
            the caller's thread.
        prefetch: batches made ahead.
        drop_last: leave out the last batch of an epoch when it is not full.
        on_error: ``raise``, or ``skip``: a batch then lacks the images that cannot be read, and
            ``skipped`` lists them.
        view_of_epoch: the view's number from the epoch's; the same number by default.

    Raises:
        ValueError: a size below 1, an order over another number of samples, a bad ``on_error``.
    """

    def __init__(
        self,
        image_set: ImageSet,
        *,
        view: View | SmallView,
        batch_size: int,
        order: EpochOrder | None = None,
        threads: int | None = None,
        prefetch: int = 2,
        drop_last: bool = False,
        on_error: str = "raise",
        view_of_epoch: Callable[[int], int] | None = None,
    ) -> None:
        order = EpochOrder(len(image_set), shuffle=False) if order is None else order
        if batch_size < 1 or prefetch < 1:
            raise ValueError(f"batch size {batch_size}, prefetch {prefetch}, expected at least 1")
        if threads is not None and threads < 0:
            raise ValueError(f"{threads} threads, expected at least 0")
        if order.n != len(image_set):
            raise ValueError(f"an order over {order.n} samples for {len(image_set)} images")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error {on_error!r}, expected raise or skip")
        if isinstance(view, SmallView) and (
            image_set.array is None or image_set.array.shape[1:3] != view.size
        ):
            raise ValueError(f"a small view of {view.size} needs images of that size in an array")
        self.image_set, self.view, self.order = image_set, view, order
        self.batch_size, self.prefetch, self.drop_last = batch_size, prefetch, drop_last
        self.threads = usable_cores() if threads is None else threads
        self.on_error = on_error
        self.skipped: list[Skipped] = []
        self._view_of_epoch = view_of_epoch
        self._pool = BufferPool()

    def __len__(self) -> int:
        """Batches of a whole epoch of this rank."""
        return self._count(len(self.order))

    def _count(self, samples: int) -> int:
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def state_dict(self) -> dict[str, object]:
        """Where the order stands: after the batch that was handed out last."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on where ``state`` stood."""
        self.order.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        order = self.order
        epoch, start = order.epoch, order.position
        view_id = epoch if self._view_of_epoch is None else self._view_of_epoch(epoch)
        rest = order.indices()[start:]
        number = self._count(len(rest))
        workers = _Workers(self.image_set, self.view, self.threads)
        jobs: list[_Job] = []
        given = 0
        try:
            for n in range(number):
                while given < number and len(jobs) <= self.prefetch:
                    chosen = rest[given * self.batch_size : (given + 1) * self.batch_size]
                    images = self._pool.take((len(chosen), *self.view.size, 3), np.uint8)
                    jobs.append(_Job(images, chosen, view_id))
                    del images
                    workers.start(jobs[-1])
                    given += 1
                batch = self._collect(workers.finish(jobs.pop(0)))
                order.position = start + min((n + 1) * self.batch_size, len(rest))
                if len(batch):
                    yield batch
                del batch  # or its memory could not be used again while the next is waited for
            order.set_epoch(epoch + 1)
        finally:
            workers.stop()

    def _collect(self, job: _Job) -> Batch:
        images, indices = job.images, job.indices
        if job.errors:
            if self.on_error == "raise":
                raise job.errors[min(job.errors)]
            for slot in sorted(job.errors):
                index = int(indices[slot])
                reason = str(job.errors[slot])
                self.skipped.append(Skipped(index, self.image_set.name(index), reason))
            good = [slot for slot in range(len(indices)) if slot not in job.errors]
            images, indices = images[good], indices[good]
        return Batch(images, self.image_set.labels[indices], indices, job.view_id)


def usable_cores(most: int = 8) -> int:
    """The cores this process may use, at most ``most``."""
    if hasattr(os, "sched_getaffinity"):
        return min(most, len(os.sched_getaffinity(0)))
    return min(most, os.cpu_count() or 1)


class _Job:
    """A batch in the making."""

    __slots__ = ("done", "errors", "images", "indices", "open_chunks", "view_id")

    def __init__(self, images: Pixels, indices: npt.NDArray[np.int64], view_id: int) -> None:
        self.images, self.indices, self.view_id = images, indices, view_id
        self.errors: dict[int, Exception] = {}  # by slot
        self.open_chunks = 0
        self.done = threading.Event()


_Chunk = tuple[_Job, int, int]  # slots from, to


class _Workers:
    """Threads that fill the slots of jobs, oldest job first."""

    def __init__(self, image_set: ImageSet, view: View | SmallView, threads: int) -> None:
        self._set, self._view, self._number = image_set, view, threads
        self._queue: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopping = False
        self._own_random = ViewRandom()
        self._threads = [
            threading.Thread(target=self._run, name=f"image-loader-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, job: _Job) -> None:
        slots = len(job.indices)
        if not self._threads:
            _fill(self._set, self._view, job, 0, slots, self._own_random)
            job.done.set()
            return
        # Small chunks keep all threads busy to the end of a batch; larger ones cost less.
        size = slots if isinstance(self._view, SmallView) else max(1, min(8, slots // 8))
        bounds = list(range(0, slots, size))
        job.open_chunks = len(bounds)
        for first in bounds:
            self._queue.put((job, first, min(first + size, slots)))

    def finish(self, job: _Job) -> _Job:
        job.done.wait()
        return job

    def stop(self) -> None:
        self._stopping = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        random = ViewRandom()
        while (chunk := self._queue.get()) is not None:
            job, first, last = chunk
            if not self._stopping:
                _fill(self._set, self._view, job, first, last, random)
            with self._lock:
                job.open_chunks -= 1
                finished = job.open_chunks == 0
            if finished:
                job.done.set()
            del job, chunk  # or an idle thread would hold the batch's memory


def _fill(
    images: ImageSet, view: View | SmallView, job: _Job, first: int, last: int, random: ViewRandom
) -> None:
    """Make the views of the slots ``first`` to ``last - 1``; errors are kept for the consumer."""
    indices = job.indices[first:last].tolist()
    if isinstance(view, SmallView):
        try:
            if images.array is None:
                raise DatasetError("a small view needs images in an array")
            keys = [images.keys[index] for index in indices]
            source = images.array[indices]
            view.batch(source, keys, job.view_id, random, job.images[first:last])
        except Exception as error:  # told in order, by the thread that asked for the batch
            job.errors[first] = error
        return
    for slot, index in enumerate(indices, start=first):
        try:
            rng = random.at(view.seed, images.keys[index], job.view_id)
            write_view(images.open(index), view, rng, job.images[slot])
        except Exception as error:  # told in order, by the thread that asked for the batch
            job.errors[slot] = error


def write_view(
    image: EncodedImage | Pixels, view: View, rng: np.random.Generator, out: Pixels
) -> None:
    """Make one view of an image, decoding no more of a JPEG than the view needs."""
    if not isinstance(image, EncodedImage):
        view.finish(image, view.plan(rng, image.shape[0], image.shape[1]), rng, out)
        return
    plan = view.plan(rng, image.height, image.width)
    top, left, height, width = plan.box
    factor = 1
    if image.reducible and view.dct_scaled:
        # Floors, so that the box of the reduced image is never smaller than the target.
        target = plan.size
        factor = dct_factor((height, width), target)
        while factor > 1 and (height // factor < target[0] or width // factor < target[1]):
            factor //= 2
    if factor > 1:
        plan = reduced_plan(plan, factor)
        top, height = plan.box[0], plan.box[2]
    pixels = image.pixels(factor=factor, rows=top + height)
    view.finish(pixels, plan, rng, out)


def reduced_plan(plan: Plan, factor: int) -> Plan:
    """The plan for an image decoded at ``1 / factor``: its box to the nearest reduced pixels."""
    top, left, height, width = plan.box
    reduced = (top // factor, left // factor, height // factor, width // factor)
    return plan._replace(box=reduced)

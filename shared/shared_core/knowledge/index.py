"""Which row of the value file belongs to which sample and view: an append-only log.

The log is a sequence of batches. A batch is a header (magic, number of records, number of its
first row, checksum of its rows, checksum of itself and its records) and one record a row (16 bytes
of key, 8 bytes of view id). The rows are on the disk before their batch is appended here, and a
batch counts only when it is whole and its checksum holds, so a batch that was cut off by a crash
does not exist.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared_core.knowledge.errors import KnowledgeError

KEY_CHARS = 32
RECORD = np.dtype([("key", "S16"), ("view", "<i8")])
_HEADER = struct.Struct("<4sIQII")  # magic, records, first row, crc of rows, crc of this batch
_MAGIC = b"SVK1"


def key_bytes(keys: Sequence[str]) -> NDArray[np.bytes_]:
    """Content keys (32 hex digits each) as 16 bytes each, shape ``(N,)``.

    Raises:
        KnowledgeError: a key of another form.
    """
    joined = "".join(keys)
    try:
        raw = bytes.fromhex(joined) if joined.isalnum() else b""
    except ValueError:
        raw = b""
    if len(raw) != 16 * len(keys) or len(joined) != KEY_CHARS * len(keys):
        raise _bad_key(keys)
    if any(len(key) != KEY_CHARS for key in keys):
        raise _bad_key(keys)
    return np.frombuffer(raw, dtype="S16")


def _bad_key(keys: Sequence[str]) -> KnowledgeError:
    digits = set("0123456789abcdefABCDEF")
    bad = next(key for key in keys if len(key) != KEY_CHARS or not set(key) <= digits)
    return KnowledgeError(f"key {bad[:48]!r} is no content key, expected {KEY_CHARS} hex digits")


@dataclass(frozen=True)
class Batch:
    """One whole batch of the log."""

    first_row: int
    rows_crc: int
    records: NDArray[np.void]


def pack(records: NDArray[np.void], *, first_row: int, rows_crc: int) -> bytes:
    """A batch as it stands in the log."""
    payload = records.tobytes()
    start = _HEADER.pack(_MAGIC, len(records), first_row, rows_crc, 0)
    crc = zlib.crc32(payload, zlib.crc32(start))
    return _HEADER.pack(_MAGIC, len(records), first_row, rows_crc, crc) + payload


def unpack(log: bytes, *, rows_available: int) -> tuple[list[Batch], int]:
    """The whole batches at the start of ``log`` and how many bytes they take.

    Args:
        log: content of the index file.
        rows_available: whole rows in the value file; a batch that needs more does not count.
    """
    batches: list[Batch] = []
    position, next_row = 0, 0
    while position + _HEADER.size <= len(log):
        magic, count, first_row, rows_crc, crc = _HEADER.unpack_from(log, position)
        end = position + _HEADER.size + count * RECORD.itemsize
        if magic != _MAGIC or end > len(log) or first_row != next_row:
            break
        payload = log[position + _HEADER.size : end]
        start = _HEADER.pack(magic, count, first_row, rows_crc, 0)
        if zlib.crc32(payload, zlib.crc32(start)) != crc or first_row + count > rows_available:
            break
        batches.append(Batch(first_row, rows_crc, np.frombuffer(payload, dtype=RECORD)))
        position, next_row = end, first_row + count
    return batches, position


class Lookup:
    """From keys to row numbers, a whole batch at a time, by binary search in sorted keys.

    New batches go to a small table first, which is merged when it has grown to half of the rest, so
    that writing a million rows does not sort them a thousand times.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = list(batches)
        self._recent: dict[int, dict[bytes, int]] = {}
        self._num_recent = 0
        self._views = self._sorted()

    def _sorted(self) -> dict[int, tuple[NDArray[np.bytes_], NDArray[np.int64]]]:
        if not self._batches:
            return {}
        records = np.concatenate([batch.records for batch in self._batches])
        views = {}
        for view in np.unique(records["view"]):
            rows = np.flatnonzero(records["view"] == view)
            keys = records["key"][rows]
            order = np.argsort(keys, kind="stable")
            views[int(view)] = (keys[order], rows[order])
        return views

    def add(self, batch: Batch) -> None:
        """Know the rows of one more batch, which comes right behind the others."""
        self._batches.append(batch)
        for offset, (key, view) in enumerate(batch.records.tolist()):
            self._recent.setdefault(view, {})[key] = batch.first_row + offset
        self._num_recent += len(batch.records)
        if self._num_recent > max(8192, (batch.first_row + len(batch.records)) // 3):
            self._views, self._recent, self._num_recent = self._sorted(), {}, 0

    @property
    def views(self) -> tuple[int, ...]:
        """View ids that are stored, sorted."""
        return tuple(sorted({*self._views, *self._recent}))

    def count(self, view: int) -> int:
        """Samples that are stored for this view."""
        known = len(self._views[view][0]) if view in self._views else 0
        return known + len(self._recent.get(view, {}))

    def rows(self, keys: NDArray[np.bytes_], view: int) -> NDArray[np.int64]:
        """Row number per key, shape ``(N,)``; -1 where nothing is stored."""
        found = np.full(len(keys), -1, dtype=np.int64)
        if view in self._views:
            known, rows = self._views[view]
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            found = np.where(known[place] == keys, rows[place], -1).astype(np.int64)
        recent = self._recent.get(view)
        if recent:
            for i in np.flatnonzero(found < 0).tolist():
                found[i] = recent.get(bytes(keys[i]), -1)
        return found

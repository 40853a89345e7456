"""Teacher outputs on disk: computed once, read by any framework, never used when stale."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from shared_core.checkpoints.atomic import atomic_write
from shared_core.knowledge import index, topk
from shared_core.knowledge.errors import KnowledgeError

Array = NDArray[Any]
View = str | Mapping[str, Any]
SCHEMA = "smallvision-knowledge/1"
KINDS = ("logits", "probs", "features")
DTYPES = ("float16", "float32")


def _canonical(value: Any) -> Any:
    """``value`` after a way through JSON, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value, sort_keys=True))


def _shown(value: Any) -> str:
    text = json.dumps(value, sort_keys=True) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


class KnowledgeStore:
    """Rows of teacher outputs, found by content key and view id.

    A folder holds ``store.json`` (whose outputs these are), ``values.bin`` (rows, memory-mapped)
    and ``index.bin`` (see :mod:`shared_core.knowledge.index`). One process writes at a time; a
    reader sees the batches that were whole when it opened the store.

    Use :meth:`create` to write and :meth:`open` to read.
    """

    def __init__(self, folder: Path, about: dict[str, Any], *, writable: bool) -> None:
        self.folder = folder
        self.about = about
        self._row = self._row_dtype()
        self._values: Array | None = None
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        if writable:
            self._files = self._open_files()
        self._batches, used = self._whole_batches()
        self._lookup = index.Lookup(self._batches)
        self._num_rows = sum(len(batch.records) for batch in self._batches)
        if self._files is not None:  # cut off what a killed writer left half-done
            rows_file, index_file = self._files
            index_file.truncate(used)
            index_file.seek(used)
            rows_file.truncate(len(self) * self._row.itemsize)
            rows_file.seek(len(self) * self._row.itemsize)

    # -- making and opening -------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        teacher_hash: str,
        classes: Sequence[str] | int,
        view: View,
        kind: str = "logits",
        dtype: str = "float16",
        top_k: int | None = None,
        num_samples: int | None = None,
    ) -> "KnowledgeStore":
        """A store to write to; one that is there already is continued when it is the same.

        Args:
            folder: made when it is missing.
            teacher_hash: sha256 of the teacher's weights (``facts["sha256"]``).
            classes: the class names in the order of the outputs, or their number (or, for
                ``kind="features"``, the length of a feature).
            view: what the teacher saw: size, crop, augmentation, seed... as text or plain JSON.
            kind: ``"logits"``, ``"probs"`` or ``"features"``.
            dtype: ``"float16"`` or ``"float32"``.
            top_k: keep only the k largest outputs and the weight of the others; not for features.
            num_samples: how many samples a complete view has, if known.

        Raises:
            KnowledgeError: a bad value; another teacher, view, ... in the folder; another writer.
        """
        names = classes if isinstance(classes, int) else list(classes)
        width = names if isinstance(names, int) else len(names)
        if width < 1:
            raise KnowledgeError(f"classes is {classes!r}, expected at least one")
        if kind not in KINDS:
            raise KnowledgeError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
        if dtype not in DTYPES:
            raise KnowledgeError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        if top_k is not None and (kind == "features" or not 1 <= top_k < width):
            raise KnowledgeError(f"top_k is {top_k}, expected 1 to {width - 1}, and no features")
        about = _canonical(
            {
                "schema": SCHEMA,
                "teacher_hash": teacher_hash,
                "classes": names,
                "view": view,
                "kind": kind,
                "dtype": dtype,
                "top_k": top_k,
                "num_samples": num_samples,
            }
        )
        folder = Path(folder)
        if (folder / "store.json").exists():
            found = cls._read_about(folder)
            for name, value in about.items():
                cls._check(folder, name, found.get(name), value)
        else:
            text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
            atomic_write(folder / "store.json", lambda path: _write_text(path, text))
        return cls(folder, about, writable=True)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        teacher_hash: str | None = None,
        view: View | None = None,
        classes: Sequence[str] | int | None = None,
    ) -> "KnowledgeStore":
        """A store to read from.

        Args:
            folder: where :meth:`create` put it.
            teacher_hash: the teacher that is wanted; None takes any.
            view: the view that is wanted; None takes any.
            classes: the classes that are wanted; None takes any.

        Raises:
            FileNotFoundError: no store there.
            KnowledgeError: another teacher, view or classes (both values are named), or damage.
        """
        folder = Path(folder)
        if not (folder / "store.json").is_file():
            raise FileNotFoundError(f"no knowledge store at {folder}")
        about = cls._read_about(folder)
        for name, wanted in (("teacher_hash", teacher_hash), ("view", view), ("classes", classes)):
            if wanted is not None:
                cls._check(folder, name, about.get(name), _canonical(wanted))
        return cls(folder, about, writable=False)

    @staticmethod
    def _read_about(folder: Path) -> dict[str, Any]:
        path = folder / "store.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise KnowledgeError(f"{path}: is not JSON") from error
        if not isinstance(about, dict) or about.get("schema") != SCHEMA:
            got = about.get("schema") if isinstance(about, dict) else type(about).__name__
            raise KnowledgeError(f"{path}: schema is {_shown(got)}, expected {SCHEMA!r}")
        if about.get("kind") not in KINDS or about.get("dtype") not in DTYPES:
            raise KnowledgeError(f"{path}: kind or dtype is unknown")
        return about

    @staticmethod
    def _check(folder: Path, name: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            raise KnowledgeError(
                f"{folder}: stored {name} is {_shown(found)}, wanted {_shown(wanted)}"
            )

    def _row_dtype(self) -> "np.dtype[Any]":
        value = np.dtype(self.about["dtype"]).newbyteorder("<")
        k = self.about["top_k"]
        if k is None:
            return np.dtype([("values", value, (self.width,))])
        return np.dtype([("values", value, (k,)), ("places", "<i4", (k,)), ("tail", "<f4")])

    def _open_files(self) -> tuple[BinaryIO, BinaryIO]:
        files = []
        for name in ("values.bin", "index.bin"):
            path = self.folder / name
            path.touch()
            files.append(path.open("r+b"))
        try:
            import fcntl  # not on Windows, where two writers are not noticed

            fcntl.flock(files[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError as error:
            for file in files:
                file.close()
            raise KnowledgeError(f"{self.folder}: another process is writing to it") from error
        return files[0], files[1]

    def _whole_batches(self) -> tuple[list[index.Batch], int]:
        values, log = self.folder / "values.bin", self.folder / "index.bin"
        rows = values.stat().st_size // self._row.itemsize if values.exists() else 0
        return index.unpack(log.read_bytes() if log.exists() else b"", rows_available=rows)

    # -- what is there ------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Number of classes (or features) in a row."""
        classes = self.about["classes"]
        return classes if isinstance(classes, int) else len(classes)

    def __len__(self) -> int:
        """Rows of all views together."""
        return self._num_rows

    @property
    def views(self) -> tuple[int, ...]:
        """View ids that have rows."""
        return self._lookup.views

    def count(self, view_id: int) -> int:
        """Samples that are stored for one view."""
        return self._lookup.count(view_id)

    def missing(self, keys: Sequence[str], view_id: int) -> list[str]:
        """Those of ``keys`` that have no row yet, in their order; what is left after a crash."""
        rows = self._lookup.rows(index.key_bytes(keys), view_id)
        return [keys[i] for i in np.flatnonzero(rows < 0).tolist()]

    # -- reading ------------------------------------------------------------------------------

    def _rows(self, keys: Sequence[str], view_id: int) -> Array:
        rows = self._lookup.rows(index.key_bytes(keys), view_id)
        absent = np.flatnonzero(rows < 0)
        if len(absent):
            raise KnowledgeError(
                f"{self.folder}: {len(absent)} of {len(keys)} samples have no stored outputs for "
                f"view {view_id}, the first is {keys[int(absent[0])]}"
            )
        if len(rows) == 0:
            return np.empty(0, dtype=self._row)
        if self._values is None or len(self._values) < len(self):
            path = self.folder / "values.bin"
            self._values = np.memmap(path, dtype=self._row, mode="r", shape=(len(self),))
        return np.asarray(self._values[rows])

    def get(self, keys: Sequence[str], view_id: int) -> NDArray[np.float32]:
        """Outputs of a batch, float32, shape ``(N, C)``, in the order of ``keys``.

        With ``top_k`` the classes that were not kept share what was left, equally.

        Raises:
            KnowledgeError: samples without a row; their number and the first key are named.
        """
        rows = self._rows(keys, view_id)
        if self.about["top_k"] is None:
            return np.asarray(rows["values"], dtype=np.float32)
        return topk.expand(
            rows["values"],
            rows["places"],
            rows["tail"],
            classes=self.width,
            kind=self.about["kind"],
        )

    def get_top(self, keys: Sequence[str], view_id: int) -> tuple[Array, Array, Array]:
        """Kept values ``(N, k)`` float32, their classes ``(N, k)``, and the rest ``(N,)``.

        See :func:`shared_core.knowledge.topk.compress`.

        Raises:
            KnowledgeError: the store was made without ``top_k``, or samples are missing.
        """
        if self.about["top_k"] is None:
            raise KnowledgeError(f"{self.folder}: was made without top_k, use get")
        rows = self._rows(keys, view_id)
        return rows["values"].astype(np.float32), rows["places"], rows["tail"]

    def verify(self) -> int:
        """Read every row and compare it with its checksum; the number of rows.

        Raises:
            KnowledgeError: rows that are not what was written.
        """
        with (self.folder / "values.bin").open("rb") as file:
            for batch in self._batches:
                data = file.read(len(batch.records) * self._row.itemsize)
                if zlib.crc32(data) != batch.rows_crc:
                    last = batch.first_row + len(batch.records) - 1
                    raise KnowledgeError(
                        f"{self.folder}: rows {batch.first_row} to {last} are damaged"
                    )
        return len(self)

    # -- writing ------------------------------------------------------------------------------

    def put(self, keys: Sequence[str], view_id: int, values: Array) -> int:
        """Store a batch: all of it or, after a crash, nothing of it.

        A sample that has a row for this view keeps it: the same teacher on the same view gives the
        same outputs, so a run that was stopped can start over. Copies of one image share a key.

        Args:
            keys: content keys, ``N`` times 32 hex digits.
            view_id: which of the views, for example the epoch of a replayed augmentation.
            values: float, shape ``(N, C)``.

        Returns:
            The number of new rows.

        Raises:
            KnowledgeError: opened for reading, wrong shape, or values that are not finite in the
                store's dtype (float16 ends at 65,504).
        """
        if self._files is None:
            raise KnowledgeError(f"{self.folder}: was opened for reading, use create to write")
        values = np.asarray(values)
        if values.shape != (len(keys), self.width):
            raise KnowledgeError(
                f"values have shape {values.shape}, expected {(len(keys), self.width)}"
            )
        packed = index.key_bytes(keys)
        new = np.flatnonzero(self._lookup.rows(packed, view_id) < 0)
        _, first = np.unique(packed[new], return_index=True)
        new = new[np.sort(first)]
        if len(new) == 0:
            return 0
        data = self._pack(values[new], [keys[i] for i in new.tolist()]).tobytes()
        records = np.zeros(len(new), dtype=index.RECORD)
        records["key"], records["view"] = packed[new], view_id
        batch = index.Batch(len(self), zlib.crc32(data), records)
        log = index.pack(records, first_row=batch.first_row, rows_crc=batch.rows_crc)
        rows_file, index_file = self._files
        ends = rows_file.tell(), index_file.tell()
        try:
            for file, content in ((rows_file, data), (index_file, log)):  # rows first: see index
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._abandon(ends)
            told = OSError(f"cannot write {self.folder}: {error.strerror or error}")
            told.errno = error.errno
            raise told from error
        self._batches.append(batch)
        self._lookup.add(batch)
        self._num_rows += len(new)
        return len(new)

    def _abandon(self, ends: tuple[int, int]) -> None:
        """Close the files after a failed write (a full disk); what is whole stays readable."""
        files, self._files = self._files, None
        names = ("values.bin", "index.bin")
        for file, name, end in zip(files or (), names, ends, strict=True):
            try:
                file.close()  # may fail once more: it tries to write what is still buffered
            except OSError:
                pass
            os.truncate(self.folder / name, end)

    def _pack(self, values: Array, keys: Sequence[str]) -> Array:
        rows = np.zeros(len(values), dtype=self._row)
        with np.errstate(over="ignore"):  # an overflow is reported below, with its key
            if self.about["top_k"] is None:
                rows["values"] = values
            else:
                parts = topk.compress(values, self.about["top_k"], kind=self.about["kind"])
                rows["values"], rows["places"], rows["tail"] = parts
        finite = np.isfinite(rows["values"]).all(axis=1)
        if not finite.all():
            bad = keys[int(np.flatnonzero(~finite)[0])]
            raise KnowledgeError(
                f"outputs of sample {bad} are not finite in {self.about['dtype']}; "
                "expected finite numbers, or dtype float32"
            )
        return rows

    def close(self) -> None:
        """End writing; the store stays readable."""
        if self._files is not None:
            for file in self._files:
                file.close()
            self._files = None

    def __enter__(self) -> "KnowledgeStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

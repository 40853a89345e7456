"""Features of many images: streamed to a .npy file that can be gone on with, names beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_core.checkpoints import atomic_write
from shared_core.datasets import BatchLoader, ImageSet
from shared_core.datasets.finding.scan import list_images
from shared_core.deploy.facts import INT8
from shared_core.deploy.predictor import Predictor
from shared_core.runs import progress
from shared_core.runs.json_files import write_json

FEATURE_FILE = "opensetFeat.npy"
SAVE_EVERY = 16  # batches between two notes of how far it is


@dataclass(frozen=True)
class Extracted:
    """What :func:`extract_features` wrote."""

    path: Path
    kept: NDArray[np.int64]  # index in the image set of each row
    bad: tuple[tuple[int, str], ...]  # images left out, each with the reason


def weights_of(embedder: Predictor) -> str:
    """What tells a network's features from those of another: the sha256 of its weights.

    int8 rounds, so its features are others; they may be compared with those of the same weights.
    """
    known = embedder.facts.provenance.get("checkpoint_sha256") or embedder.name
    return f"{known}-int8" if embedder.runtime == INT8 else str(known)


def width_of(embedder: Predictor) -> int:
    """Numbers in a feature; a model folder that does not tell is asked for one."""
    if "feature_dim" in embedder.facts.more:
        return int(embedder.facts.more["feature_dim"])
    grey = np.full((1, *embedder.view.size, 3), 128, np.uint8)
    return int(embedder.probabilities(grey).shape[1])


def unit_rows(features: NDArray[Any]) -> NDArray[np.float64]:
    """Rows of length 1, float64 ``(N, D)``; a row of zeros stays zero.

    Raises:
        ValueError: a number that is not finite.
    """
    rows = np.asarray(features, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("the network gave features that are not finite")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths == 0, 1, lengths)


def extract_features(
    embedder: Predictor,
    images: ImageSet,
    path: str | Path,
    *,
    batch_size: int = 64,
    threads: int = 2,
    dtype: str = "float32",
    on_error: str = "raise",
) -> Extracted:
    """Write the unit-length features of all images, in their order.

    Rows go to ``PATH.part`` as they come; ``PATH.progress.json`` says how many there are and of
    what. A second call with the same arguments goes on after them and gives the same bits; with
    other ones it starts anew. At the end the part takes the place of ``path``.

    Args:
        embedder: makes features ``(N, D)`` of its view of the images.
        path: the file; float ``(N, D)``, which ``numpy.load(path, mmap_mode="r")`` maps.
        dtype: float16, float32 or float64 (the original's).
        on_error: ``raise``, or ``skip``: images that cannot be read get no row.

    Raises:
        ValueError: features that are not finite, no images, or an unknown ``dtype``.
        DecodeError, FileNotFoundError: an image that cannot be read.
    """
    if dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"dtype is {dtype!r}, expected float16, float32 or float64")
    if not len(images):
        raise ValueError("got no images, expected at least one")
    path = Path(os.path.realpath(path))
    facts, width = embedder.facts, width_of(embedder)
    source = {
        "weights": weights_of(embedder),
        "images": _digest(images),
        "view": {**facts.view, "bgr": facts.bgr, "mean": list(facts.mean), "std": list(facts.std)},
        "batch_size": batch_size,
        "shape": [len(images), width],
        "dtype": dtype,
        "on_error": on_error,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(path, source, dtype)
    if part.done < len(images):
        _write_rows(part, embedder, images, batch_size, threads, on_error)
    return part.finish()


def _write_rows(
    part: _Part,
    embedder: Predictor,
    images: ImageSet,
    batch_size: int,
    threads: int,
    on_error: str,
) -> None:
    """The rows that are not there yet."""
    first = part.done
    loader = BatchLoader(
        images.subset(range(first, len(images))),
        view=embedder.view,
        batch_size=batch_size,
        threads=threads,
        on_error=on_error,
    )
    known = list(part.bad)

    def bad() -> list[tuple[int, str]]:
        return known + [(one.index + first, one.reason) for one in loader.skipped]

    total = -(-len(images) // batch_size)
    steps = progress(loader, total=total, done=first // batch_size, label="features")
    for step, batch in enumerate(steps, start=1):
        part.rows[batch.indices + first] = unit_rows(embedder.probabilities(batch.images))
        if step % SAVE_EVERY == 0:
            part.note(first + loader.order.position, bad())  # a resumed loader starts here
    part.bad = bad()


class _Part:
    """Rows on their way, and the note that says how many are safe and of what."""

    def __init__(self, path: Path, source: Mapping[str, Any], dtype: str) -> None:
        self.path, self.source = path, source
        self._file = path.with_name(path.name + ".part")
        self._note = path.with_name(path.name + ".progress.json")
        self.done, self.bad = self._found()
        shape = tuple(source["shape"])
        mode = {"mode": "r+"} if self.done else {"mode": "w+", "dtype": dtype, "shape": shape}
        self.rows: NDArray[Any] = np.lib.format.open_memmap(self._file, **mode)

    def _found(self) -> tuple[int, list[tuple[int, str]]]:
        """How many rows of the same work are there, and which images were left out."""
        if self._note.is_file() and self._file.is_file():
            with suppress(ValueError, KeyError, TypeError):
                content = json.loads(self._note.read_text(encoding="utf-8"))
                if content["source"] == self.source:
                    return int(content["rows"]), [(int(i), str(r)) for i, r in content["bad"]]
        return 0, []

    def note(self, done: int, bad: Sequence[tuple[int, str]]) -> None:
        """So many rows are safe."""
        self.rows.flush()
        write_json(self._note, {"source": self.source, "rows": done, "bad": list(bad)})

    def finish(self) -> Extracted:
        """Take the path's place, without rows of images that were left out."""
        count = self.source["shape"][0]
        if len(self.bad) == count:
            self._file.unlink()
            raise ValueError(f"none of {count} images can be read; the first: {self.bad[0][1]}")
        kept = np.setdiff1d(np.arange(count), [index for index, _ in self.bad])
        if self.bad:
            self._compact(kept)
        else:
            self.rows.flush()
        os.replace(self._file, self.path)
        self._note.unlink(missing_ok=True)
        return Extracted(self.path, kept, tuple(self.bad))

    def _compact(self, kept: NDArray[np.int64]) -> None:
        """Write the part again without the rows of unreadable images."""
        scratch = self._file.with_name(self._file.name + ".kept")
        shape = (len(kept), self.rows.shape[1])
        target = np.lib.format.open_memmap(scratch, mode="w+", dtype=self.rows.dtype, shape=shape)
        for start in range(0, len(kept), 4096):
            target[start : start + 4096] = self.rows[kept[start : start + 4096]]
        target.flush()
        os.replace(scratch, self._file)


def _digest(images: ImageSet) -> str:
    """Names and keys of the images, in order; for files also size and time of change."""
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(f"{images.name(index)}|{images.keys[index]}".encode("utf-8", "replace"))
        if images.paths is not None and images.array is None:
            try:
                stat = os.stat(images.paths[index])
                digest.update(f"|{stat.st_size}|{stat.st_mtime_ns}".encode())
            except OSError:
                digest.update(b"|missing")
        digest.update(b"\n")
    return digest.hexdigest()


def load_features(path: str | Path) -> NDArray[Any]:
    """Map a feature file, float ``(N, D)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no .npy file, or not features.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, expected features (.npy)")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise ValueError(f"{path} is no .npy file of numbers, expected features (N, D)") from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f":
        about = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {about}, expected features: float (N, D)")
    return rows


def embed_files(
    embedder: Predictor, files: Sequence[Path], *, batch: int, threads: int
) -> tuple[NDArray[np.float64], list[Path], list[tuple[Path, str]]]:
    """Unit rows ``(N, D)`` of the readable files, these files, and the others with the reason."""
    images = ImageSet(list(files), [0] * len(files))
    loader = BatchLoader(
        images, view=embedder.view, batch_size=batch, threads=threads, on_error="skip"
    )
    parts, kept = [], []
    for one in loader:
        parts.append(unit_rows(embedder.probabilities(one.images)))
        kept += [files[index] for index in one.indices.tolist()]
    bad = [(Path(skipped.name), skipped.reason) for skipped in loader.skipped]
    return np.concatenate(parts) if parts else np.zeros((0, 0)), kept, bad


def embed_folder(
    embedder: Predictor,
    folder: Path,
    output: Path,
    *,
    batch: int = 32,
    threads: int = 2,
    dtype: str = "float32",
) -> tuple[int, list[tuple[Path, str]]]:
    """Write features, paths and facts of a folder's images.

    Returns:
        Numbers in a feature, and what could not be read with the reason.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, expected one of images")
    found = list_images(folder)
    names = {path: path.relative_to(folder).as_posix() for path in found.files}
    broken = {path for path, name in names.items() if "\n" in name or "\r" in name}
    bad = found.bad + [(path, "a line break in its name") for path in broken]
    files = [path for path in found.files if path not in broken]
    if not files:
        raise FileNotFoundError(f"{folder} holds no image")
    images = ImageSet(files, [0] * len(files))
    done = extract_features(
        embedder, images, output, batch_size=batch, threads=threads, dtype=dtype, on_error="skip"
    )
    width = load_features(done.path).shape[1]
    facts = {
        "root": str(folder.resolve()),
        "weights": weights_of(embedder),
        "architecture": embedder.facts.architecture,
        "images": len(done.kept),
        "feature_dim": width,
        "unit_length": True,
        "unreadable": {names[files[index]]: reason for index, reason in done.bad},
    }
    write_names(output, [names[files[i]] for i in done.kept], facts)
    return width, bad + [(files[index], reason) for index, reason in done.bad]


# -- names beside the features --------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureStore:
    """Features and what they are of."""

    features: NDArray[Any]  # (N, D), mapped
    paths: tuple[str, ...]  # relative to ``root``, with /; or row numbers where nothing is known
    facts: Mapping[str, Any]  # root, weights, architecture ...; empty where nothing is known

    @property
    def root(self) -> Path | None:
        """The folder that the paths start from."""
        return Path(self.facts["root"]) if "root" in self.facts else None

    def image(self, row: int) -> Path | None:
        """The image of a row, if it is known and there."""
        if self.root is None:
            return None
        path = self.root / self.paths[row]
        return path if path.is_file() else None


def beside(path: Path, suffix: str) -> Path:
    """``features.npy`` -> ``features.paths.txt``, ``features.json``."""
    return path.with_name(path.name.removesuffix(".npy") + suffix)


def write_names(path: Path, paths: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Write what belongs beside a feature file; names may hold bytes that are no UTF-8."""
    text = "".join(f"{one}\n" for one in paths)
    content = json.dumps(dict(facts), indent=2, ensure_ascii=False) + "\n"
    for target, value in ((beside(path, ".paths.txt"), text), (beside(path, ".json"), content)):
        data = value.encode("utf-8", "surrogateescape")
        atomic_write(target, lambda scratch, data=data: scratch.write_bytes(data))


def open_store(path: str | Path) -> FeatureStore:
    """Features with their names, as ``embed.py`` left them; a lone .npy has row numbers.

    Raises:
        FileNotFoundError, ValueError: no features, or names of another number.
    """
    path = Path(path)
    features = load_features(path)
    names, about = beside(path, ".paths.txt"), beside(path, ".json")
    paths = tuple(str(row) for row in range(len(features)))
    if names.is_file():
        text = names.read_text(encoding="utf-8", errors="surrogateescape")
        paths = tuple(text.split("\n")[:-1] if text.endswith("\n") else text.split("\n"))
        if len(paths) != len(features):
            raise ValueError(f"{names}: {len(paths)} lines for {len(features)} features")
    facts: dict[str, Any] = {}
    if about.is_file():
        try:
            facts = json.loads(about.read_text(encoding="utf-8", errors="surrogateescape"))
            if not isinstance(facts, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise ValueError(f"{about} cannot be read: {error}") from None
    return FeatureStore(features, paths, facts)

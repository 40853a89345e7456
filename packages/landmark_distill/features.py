"""Features of an image set, streamed into one .npy file; stopped at any moment, it goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from landmark_distill.data_loader import ViewLoader
from shared_core.checkpoints import atomic_write
from shared_core.datasets import BatchLoader, EvalView, ImageSet
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD, Normalizer
from shared_core.runs import progress

FEATURE_FILE = "opensetFeat.npy"
SAVE_EVERY = 16  # batches between two notes of how far it is

Embed = Callable[[Tensor], "Tensor | NDArray[Any]"]


@dataclass(frozen=True)
class Sight:
    """How a network sees an image: the whole of it, squeezed to ``size``, then normalised."""

    size: int  # pixels, both sides
    bgr: bool = False
    resize: str = "linear"
    mean: tuple[float, ...] = IMAGENET_MEAN  # RGB, whatever ``bgr`` is
    std: tuple[float, ...] = IMAGENET_STD

    def loader(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        threads: int,
        device: torch.device | str = "cpu",
        on_error: str = "raise",
    ) -> ViewLoader:
        """Every image once, in order."""
        view = EvalView(self.size, resize_ratio=None, method=self.resize)
        batches = BatchLoader(
            images, view=view, batch_size=batch_size, threads=threads, on_error=on_error
        )
        normalizer = Normalizer(tuple(self.mean), tuple(self.std), device=device)
        return ViewLoader(batches, normalizer, bgr=self.bgr)


@dataclass(frozen=True)
class Extracted:
    """What :func:`extract_features` wrote."""

    path: Path
    kept: NDArray[np.int64]  # index in the image set of each row
    bad: tuple[tuple[int, str], ...]  # images left out, each with the reason


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
    embed: Embed,
    images: ImageSet,
    path: str | Path,
    *,
    sight: Sight,
    width: int,
    weights: str,
    batch_size: int = 64,
    threads: int = 2,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    on_error: str = "raise",
) -> Extracted:
    """Write the unit-length features of all images, in their order.

    Rows go to ``PATH.part`` as they come; ``PATH.progress.json`` says how many there are and of
    what. A second call with the same arguments goes on after them and gives the same bits; with
    other ones it starts anew. At the end the part takes the place of ``path``.

    Args:
        embed: normalised images ``(N, 3, H, W)`` on ``device`` to features ``(N, width)``; in eval
            mode and without gradients, that is the caller's part.
        path: the file; float ``(N, width)``, which ``numpy.load(path, mmap_mode="r")`` maps.
        width: of the features.
        weights: what tells the network's weights from others, such as their sha256.
        dtype: float16, float32 or float64 (the original's).
        on_error: ``raise``, or ``skip``: images that cannot be read get no row.

    Raises:
        ValueError: features of another width or not finite, or an unknown ``dtype``.
        DecodeError, FileNotFoundError: an image that cannot be read.
    """
    if dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"dtype is {dtype!r}, expected float16, float32 or float64")
    if not len(images):
        raise ValueError("got no images, expected at least one")
    path = Path(os.path.realpath(path))
    part, note = (path.with_name(path.name + end) for end in (".part", ".progress.json"))
    source = {
        "weights": weights,
        "images": _digest(images),
        "sight": [sight.size, sight.bgr, sight.resize, list(sight.mean), list(sight.std)],
        "batch_size": batch_size,
        "shape": [len(images), width],
        "dtype": dtype,
        "on_error": on_error,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    done, bad = _progress(note, part, source)
    if done:
        rows = np.lib.format.open_memmap(part, mode="r+")
    else:
        rows = np.lib.format.open_memmap(
            part, mode="w+", dtype=np.dtype(dtype), shape=(len(images), width)
        )
    if done < len(images):
        loader = sight.loader(
            images.subset(range(done, len(images))),
            batch_size=batch_size,
            threads=threads,
            device=device,
            on_error=on_error,
        )
        first = done
        steps = progress(
            loader, total=-(-len(images) // batch_size), done=done // batch_size, label="features"
        )
        for step, batch in enumerate(steps, start=1):
            found = embed(batch.images)
            values = found.float().cpu().numpy() if isinstance(found, Tensor) else found
            if values.shape != (len(batch.indices), width):
                raise ValueError(
                    f"features have shape {values.shape}, expected ({len(batch.indices)}, {width})"
                )
            rows[batch.indices.numpy() + first] = unit_rows(values)
            if step % SAVE_EVERY == 0:
                done = first + loader.loader.order.position  # a resumed loader starts here
                rows.flush()
                _write_note(note, source, done, bad + _skipped(loader, first))
        bad += _skipped(loader, first)
    if len(bad) == len(images):
        part.unlink()
        raise ValueError(f"none of {len(images)} images can be read; the first: {bad[0][1]}")
    kept = np.setdiff1d(np.arange(len(images)), [index for index, _ in bad])
    if bad:
        _compact(part, rows, kept)
    else:
        rows.flush()
    del rows
    os.replace(part, path)
    note.unlink(missing_ok=True)
    return Extracted(path, kept, tuple((int(index), str(reason)) for index, reason in bad))


def _skipped(loader: ViewLoader, first: int) -> list[tuple[int, str]]:
    return [(one.index + first, one.reason) for one in loader.loader.skipped]


def _write_note(
    note: Path, source: Mapping[str, Any], done: int, bad: list[tuple[int, str]]
) -> None:
    text = json.dumps({"source": source, "rows": done, "bad": bad})
    atomic_write(note, lambda scratch: scratch.write_text(text, encoding="utf-8"))


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


def _progress(
    note: Path, part: Path, source: Mapping[str, Any]
) -> tuple[int, list[tuple[int, str]]]:
    """How many rows of the same work are there, and which images were left out."""
    if not (note.is_file() and part.is_file()):
        return 0, []
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        if content["source"] == source:
            return int(content["rows"]), [(int(i), str(r)) for i, r in content["bad"]]
    except (ValueError, KeyError, TypeError):
        pass
    return 0, []


def _compact(part: Path, rows: NDArray[Any], kept: NDArray[np.int64]) -> None:
    """Write the part again without the rows of unreadable images."""
    scratch = part.with_name(part.name + ".kept")
    shape = (len(kept), rows.shape[1])
    target = np.lib.format.open_memmap(scratch, mode="w+", dtype=rows.dtype, shape=shape)
    for start in range(0, len(kept), 4096):
        target[start : start + 4096] = rows[kept[start : start + 4096]]
    target.flush()
    del target
    os.replace(scratch, part)


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

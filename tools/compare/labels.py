"""Features of a trained network, once for all, and the labels that their neighbours doubt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared_core.datasets import BatchLoader, EvalView, ImageSet
from shared_core.runs.json_files import read_object, write_json
from shared_core.runs.progress import progress

NETWORK = "lite0"
SIZES = (224, 160, 128, 96)  # pixels
ENLARGED = 1.75  # at most: more shows nothing new
AT_MOST = {224: 6_000, 160: 15_000, 128: 40_000}  # images at a size; more are looked at smaller
BATCH, CHUNK = 64, 32  # images a batch, batches between two notes of what is done
NEIGHBOURS = 10
DOUBT = 0.6  # of all votes: those for another class less those for the given one
PROJECT_ABOVE, PROJECTED = 20_000, 256  # images, numbers each: then neighbours are sought in few
Features = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # (N, H, W, 3) to (N, D)


@dataclass(frozen=True)
class StoredFeatures:
    """Features ``(N, D)`` of different images, kept on disk as float16.

    Attributes:
        file: an ``.npy`` file; ``facts`` beside it (``.json``) names what they are of.
        network, input_size: whose features, of views of which side in pixels.
        keys: content key of each row.
    """

    file: Path
    network: str
    input_size: int
    keys: tuple[str, ...]

    def rows(self) -> NDArray[np.float16]:
        """All of them, mapped into memory."""
        return np.asarray(np.load(self.file, mmap_mode="r"))


def feature_size(images: int, short_side: int) -> int:
    """The side in pixels that this many images of this size are looked at."""
    fits = [size for size in SIZES if images <= AT_MOST.get(size, images)]
    useful = [size for size in fits if size <= max(SIZES[-1], ENLARGED * short_side)]
    return useful[0] if useful else SIZES[-1]


def trained_features(*, threads: int) -> Features:
    """lite0's features before its head, in bf16 where the processor computes it.

    Raises:
        UsageError: its weights are not installed; the line says how to get them.
    """
    import torch

    from shared_core.for_torch.features import feature_function
    from shared_core.for_torch.precision import Precision, computes_bf16
    from shared_core.for_torch.pretrained import start_network

    torch.set_num_threads(max(1, threads))
    network = start_network(NETWORK, init="trained", num_classes=1000)
    run = feature_function(network, num_classes=1000)
    device = torch.device("cpu")
    precision = Precision(device, "bf16" if computes_bf16(device) else "fp32")

    def features(views: NDArray[np.uint8]) -> NDArray[np.float32]:
        with precision.autocast():
            return run(views)

    return features


def store_features(
    features: Features,
    images: ImageSet,
    file: Path,
    *,
    input_size: int,
    network: str = NETWORK,
    threads: int = 1,
) -> StoredFeatures:
    """Compute the features of every image once; what an earlier, stopped call did is kept.

    Args:
        features: of views, as :func:`trained_features` gives them.
        images: different images (a key each).
        file: of the array; facts are kept beside it.
    """
    keys = [str(key) for key in images.keys]
    digest = hashlib.sha256("\n".join([network, str(input_size), *keys]).encode()).hexdigest()
    note = file.with_suffix(".json")
    done = _done(note, file, digest)
    stored = StoredFeatures(file, network, input_size, tuple(keys))
    if done == len(keys):
        return stored
    rest = images.subset(range(done, len(keys)))
    view = EvalView(input_size, resize_ratio=1.0, method="area")
    loader = BatchLoader(rest, view=view, batch_size=BATCH, threads=threads)
    before = -(-done // BATCH)
    batches: Iterable = progress(
        loader, total=before + len(loader), done=before, label="features, batches"
    )
    rows: np.memmap | None = None
    for number, batch in enumerate(batches, start=1):
        found = features(batch.images)
        if rows is None:
            shape = (len(keys), found.shape[1])
            mode = "r+" if done else "w+"
            rows = np.lib.format.open_memmap(file, mode=mode, dtype=np.float16, shape=shape)
        rows[done : done + len(found)] = found
        done += len(found)
        if number % CHUNK == 0 or done == len(keys):
            rows.flush()
            facts = {"network": network, "input_size": input_size, "keys": keys}
            write_json(note, {"digest": digest, "done": done, **facts})
    return stored


def read_features(file: Path) -> StoredFeatures:
    """What :func:`store_features` finished.

    Raises:
        FileNotFoundError, ValueError: there are none, or only a part.
    """
    facts = read_object(file.with_suffix(".json"))
    keys = tuple(facts["keys"])
    if facts["done"] != len(keys):
        raise ValueError(f"{file} holds {facts['done']} of {len(keys)} features: check again")
    return StoredFeatures(file, facts["network"], facts["input_size"], keys)


def _done(note: Path, file: Path, digest: str) -> int:
    """How many rows of ``file`` an earlier call finished: 0 unless it was of the same images."""
    try:
        facts = read_object(note)
        return int(facts["done"]) if facts["digest"] == digest and file.is_file() else 0
    except (OSError, ValueError, KeyError):
        return 0


@dataclass(frozen=True)
class Suspicion:
    """An image whose neighbours bear another label.

    Attributes:
        row: of the features.
        label, likely: number of the class given, and of the one that most neighbours have.
        doubt: share of the votes for ``likely`` less that for ``label``, in [-1, 1].
    """

    row: int
    label: int
    likely: int
    doubt: float


@dataclass(frozen=True)
class LabelCheck:
    """What the neighbours say: ``suspicious`` worst first; ``agree`` the share whose most frequent
    neighbours' label is the given one, in [0, 1]; ``neighbours`` how many were asked."""

    suspicious: tuple[Suspicion, ...]
    agree: float
    neighbours: int


def check_labels(
    rows: NDArray[np.floating],
    labels: Sequence[int] | NDArray[np.int64],
    *,
    num_classes: int,
    groups: Sequence[int] | NDArray[np.int64] | None = None,
    neighbours: int = NEIGHBOURS,
    doubt: float = DOUBT,
) -> LabelCheck:
    """Compare each label with those of the nearest images (cosine of the features).

    A neighbour's vote weighs its closeness. Near copies of an image have no vote on it: they
    would repeat its own label.

    Args:
        rows: features ``(N, D)``.
        labels: ``(N,)``.
        groups: ``(N,)``; images of one number are copies of one another. All differ by default.
        neighbours: asked for each image; fewer where classes are small.
        doubt: least share of the votes by which another class must lead.

    Raises:
        ValueError: fewer than 3 images, or lengths that differ.
    """
    given = np.asarray(labels, dtype=np.int64)
    total = len(given)
    if total < 3 or len(rows) != total:
        raise ValueError(f"{len(rows)} features for {total} labels, expected as many, 3 at least")
    apart = np.arange(total) if groups is None else np.asarray(groups, dtype=np.int64)
    sizes = np.bincount(given, minlength=num_classes)
    asked = int(min(neighbours, max(3, np.median(sizes[sizes > 0]) - 1), total - 1))
    unit = unit_rows(rows)
    likely, leads = np.empty(total, np.int64), np.empty(total)
    block = max(16, 2**24 // total)  # 64 MB of cosines
    for start in range(0, total, block):
        stop = min(total, start + block)
        cosine = unit[start:stop] @ unit.T
        cosine[apart[start:stop, None] == apart[None, :]] = -2.0
        nearest = np.argpartition(-cosine, asked - 1, axis=1)[:, :asked]
        close = np.take_along_axis(cosine, nearest, axis=1)
        weight = np.where(close > -1.5, np.maximum(close, 1e-3), 0.0)
        votes = np.zeros((stop - start, num_classes))
        np.add.at(votes, (np.arange(stop - start)[:, None], given[nearest]), weight)
        votes /= np.maximum(votes.sum(axis=1, keepdims=True), 1e-9)
        own = votes[np.arange(stop - start), given[start:stop]]
        likely[start:stop] = votes.argmax(axis=1)
        leads[start:stop] = votes.max(axis=1) - own
    doubted = np.flatnonzero((likely != given) & (leads >= doubt))
    order = doubted[np.argsort(-leads[doubted], kind="stable")]
    found = tuple(
        Suspicion(int(i), int(given[i]), int(likely[i]), round(float(leads[i]), 4)) for i in order
    )
    return LabelCheck(found, float((leads <= 0).mean()), asked)


def unit_rows(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Features of length 1, without their mean; many are projected (at random, always alike).

    Source: Johnson and Lindenstrauss 1984: angles survive a random projection.
    """
    mean = np.mean(rows, axis=0, dtype=np.float64).astype(np.float32)
    matrix = None
    if len(rows) > PROJECT_ABOVE and rows.shape[1] > PROJECTED:
        rng = np.random.default_rng(0)
        matrix = rng.standard_normal((rows.shape[1], PROJECTED)).astype(np.float32)
    parts = []
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096].astype(np.float32) - mean
        parts.append(part if matrix is None else part @ matrix)
    unit = np.concatenate(parts)
    return np.asarray(unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-9))

"""What identifies a picture: its bytes (exact copies) and its coarse structure (near copies)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

KEY_LENGTH = 32  # hexadecimal digits: 128 bits
NO_STRUCTURE = 0  # the hash of a picture too flat to be recognised by its structure
_SIDE = 8  # the hash holds the signs of _SIDE x _SIDE cosine coefficients, the mean left out
_BITS = 64


def key_of_bytes(data: bytes) -> str:
    """Content key of a file's bytes: the first 32 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:KEY_LENGTH]


def content_key(path: str | Path) -> str:
    """Content key of a file: two files have the same key when their bytes are the same."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:KEY_LENGTH]


def content_keys(paths: Iterable[str | Path], *, threads: int = 4) -> list[str]:
    """Content keys of many files, in their order."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(content_key, paths))


def thumbnail(image: NDArray[np.uint8], side: int = 32) -> NDArray[np.float32]:
    """Grey thumbnail ``(side, side)`` of an RGB image ``(H, W, 3)``, values in [0, 255].

    Area averaging whatever the size and aspect, so that a rescaled copy has the same thumbnail.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    method = cv2.INTER_AREA if min(grey.shape) >= side else cv2.INTER_LINEAR
    small = cv2.resize(grey, (side, side), interpolation=method)
    return np.asarray(small, dtype=np.float32)


def perceptual_hash(image: NDArray[np.uint8]) -> int:
    """64-bit hash of a picture's coarse structure.

    The signs of the 63 lowest cosine coefficients of the 32 x 32 grey thumbnail. Re-encoding,
    rescaling and changes of brightness or contrast move a few bits; a mirror or a turn by 90
    degrees only changes signs or transposes, so that ``symmetric_hashes`` needs no picture.

    Args:
        image: RGB uint8 ``(H, W, 3)``.

    Returns:
        An int in ``[1, 2**64)``, or ``NO_STRUCTURE`` = 0 for a picture that is nearly flat.

    Source: the sign form of the DCT hash of Zauner 2010, "Implementation and benchmarking of
    perceptual image hash functions", section 3.2 (there: compared with the median).
    """
    small = thumbnail(image)
    if float(small.std()) < 2.0:  # grey levels: what is left is noise, its signs mean nothing
        return NO_STRUCTURE
    low = cv2.dct(small)[:_SIDE, :_SIDE]
    bits = (low > 0).reshape(-1)
    bits[0] = True  # the place of the mean; always set, so that no hash is NO_STRUCTURE
    return int(sum(1 << i for i in range(_BITS) if bits[i]))


def hamming(first: Hashes, second: Hashes) -> NDArray[np.int64]:
    """Number of bits in which hashes differ, elementwise with broadcasting."""
    return _popcount(np.bitwise_xor(first, second))


def _popcount(words: Hashes) -> NDArray[np.int64]:
    # SWAR bit count: numpy < 2 has no bitwise_count.
    m1, m2, m4, h01 = (
        np.uint64(c)
        for c in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101)
    )
    one, two, four, top = (np.uint64(c) for c in (1, 2, 4, 56))
    x = words - ((words >> one) & m1)
    x = (x & m2) + ((x >> two) & m2)
    x = (x + (x >> four)) & m4
    return np.asarray((x * h01) >> top, dtype=np.int64)


def symmetric_hashes(hashes: Hashes) -> Hashes:
    """Hashes ``(8, n)`` of the same pictures mirrored and turned (row 0: as they are).

    A mirror changes the sign of the odd coefficients of its axis; a transposition swaps the axes.
    Coefficients that are exactly zero, and flat pictures, are left as they are.
    """
    index = np.arange(_BITS)
    rows, columns = index // _SIDE, index % _SIDE
    bits = (hashes[:, None] >> index.astype(np.uint64)) & np.uint64(1)  # (n, 64)
    variants = []
    for transpose in (False, True):
        order = (columns * _SIDE + rows) if transpose else index
        base = bits[:, order]
        for flip_rows in (0, 1):
            for flip_columns in (0, 1):
                odd = (flip_rows * rows + flip_columns * columns) % 2
                flipped = base ^ odd.astype(np.uint64)
                words = (flipped << index.astype(np.uint64)).sum(axis=1, dtype=np.uint64)
                variants.append(np.where(hashes == NO_STRUCTURE, hashes, words))
    return np.stack(variants)


def near_pairs(
    hashes: Sequence[int] | Hashes, max_distance: int, *, symmetries: bool = False
) -> NDArray[np.int64]:
    """Pairs of hashes at most ``max_distance`` bits apart, as an array ``(pairs, 2)``, i < j.

    All such pairs between different hashes; of equal hashes only the first stands for all, and
    the others are paired with it. So the pairs connect whatever is near, without n * n of them.

    Found without comparing all with all: cut into bands of bits, two hashes that near agree in at
    least one band up to a bit (pigeonhole), so only those that do are compared. Pictures without
    structure are in no pair.

    Args:
        hashes: ``(n,)`` ints below 2**64.
        max_distance: bits, in [0, 16].
        symmetries: also pair a picture with mirrored and turned copies of another.

    Raises:
        ValueError: ``max_distance`` out of range.
    """
    if not 0 <= max_distance <= 16:
        raise ValueError(f"max_distance is {max_distance}, expected 0 to 16 bits")
    words = np.asarray(hashes, dtype=np.uint64)
    unique, first, inverse = np.unique(words, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    # Equal hashes hang on their first one; only different hashes need a search.
    same = np.stack([first[inverse], np.arange(len(words))], axis=1)
    same = same[(same[:, 0] != same[:, 1]) & (words[same[:, 1]] != NO_STRUCTURE)]
    pairs = [same.astype(np.int64)]
    variants = symmetric_hashes(unique) if symmetries else unique[None]
    # With m bands and at most d differing bits, one band has at most d // m of them.
    slack = 1 if max_distance >= 4 else 0
    number_of_bands = max_distance // (slack + 1) + 1
    for number, variant in enumerate(variants):
        for band in range(number_of_bands):
            bits = [1 << bit for bit in range(band, _BITS, number_of_bands)]
            for flip in [0, *bits] if slack else [0]:
                left, right = _band_pairs(
                    unique, variant, np.uint64(sum(bits)), np.uint64(flip), max_distance
                )
                keep = (left < right) if number == 0 else (left != right)
                found = np.sort(np.stack([first[left[keep]], first[right[keep]]], axis=1), axis=1)
                pairs.append(found.astype(np.int64))
    return np.unique(np.concatenate(pairs), axis=0)


def _band_pairs(
    base: Hashes, variant: Hashes, mask: np.uint64, flip: np.uint64, max_distance: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (i, j) of near base[i], variant[j] that are equal under ``mask`` but for ``flip``."""
    order = np.argsort(base & mask, kind="stable")
    values = (base & mask)[order]
    wanted = (variant & mask) ^ flip
    start = np.searchsorted(values, wanted, side="left")
    count = np.searchsorted(values, wanted, side="right") - start
    total = np.cumsum(count)
    lefts: list[NDArray[np.int64]] = []
    rights: list[NDArray[np.int64]] = []
    block = 1 << 22  # candidate pairs at a time: some 100 MB at most
    low = 0
    while low < len(variant):
        before = int(total[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(total, before + block, side="right")))
        n = count[low:high]
        j = np.repeat(np.arange(low, high), n)
        offset = np.arange(len(j)) - np.repeat(np.cumsum(n) - n, n)
        i = order[np.repeat(start[low:high], n) + offset]
        near = hamming(base[i], variant[j]) <= max_distance
        near &= (base[i] != NO_STRUCTURE) & (variant[j] != NO_STRUCTURE)
        lefts.append(i[near].astype(np.int64))
        rights.append(j[near].astype(np.int64))
        low = high
    if not lefts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(lefts), np.concatenate(rights)


def confirm_pairs(
    pairs: NDArray[np.int64], thumbs: NDArray[np.float32], *, min_correlation: float
) -> NDArray[np.int64]:
    """Those of ``pairs`` whose thumbnails correlate, in one of the 8 mirrors and turns.

    The hash finds candidates, and also pairs pictures that share a layout only (a bright disc on
    dark ground); the thumbnails tell them apart.

    Args:
        pairs: ``(p, 2)`` indices.
        thumbs: ``(n, s, s)`` grey thumbnails.
        min_correlation: Pearson's, in [-1, 1].
    """
    flat = thumbs - thumbs.mean(axis=(1, 2), keepdims=True)
    norm = np.sqrt((flat * flat).sum(axis=(1, 2), keepdims=True))
    unit = flat / np.maximum(norm, 1e-6)
    kept = [np.empty((0, 2), np.int64)]
    for start in range(0, len(pairs), 8192):
        block = pairs[start : start + 8192]
        left, right = unit[block[:, 0]], unit[block[:, 1]]
        best = np.full(len(block), -1.0)
        for turns in range(4):
            for mirrored in (right, right[:, :, ::-1]):
                turned = np.rot90(mirrored, turns, axes=(1, 2))
                best = np.maximum(best, (left * turned).sum(axis=(1, 2)))
        kept.append(block[best >= min_correlation])
    return np.concatenate(kept)


def join(pairs: Iterable[tuple[int, int]] | NDArray[np.int64], count: int) -> list[list[int]]:
    """Groups of two and more of ``count`` items that chains of pairs connect, sorted."""
    parent = list(range(count))

    def top(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for a, b in pairs:
        root_a, root_b = top(int(a)), top(int(b))
        parent[max(root_a, root_b)] = min(root_a, root_b)
    groups: dict[int, list[int]] = {}
    for item in range(count):
        groups.setdefault(top(item), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def near_duplicates(
    hashes: Sequence[int] | Hashes, max_distance: int = 4, *, symmetries: bool = False
) -> list[list[int]]:
    """Groups (lists of indices, two or more) of pictures whose hashes are near; see near_pairs."""
    return join(near_pairs(hashes, max_distance, symmetries=symmetries), len(hashes))

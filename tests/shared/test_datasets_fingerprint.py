"""Content keys and near copies: hashlib, brute force over all pairs, real changes of pictures."""

import hashlib

import cv2
import numpy as np
import pytest

from shared_core.datasets.builtin.sources import render_scene, scene_class_names
from shared_core.datasets.finding import fingerprint as fp


def pictures(count, size=96):
    names = scene_class_names()
    return [
        render_scene(names[i % len(names)], i, size=size, seed=7, difficulty=0.3)[0]
        for i in range(count)
    ]


def brute_force_pairs(hashes, distance, variants=1):
    """All pairs by Python's own integers, for different hashes only."""
    table = fp.symmetric_hashes(np.array(hashes, dtype=np.uint64))[:variants].tolist()
    return {
        (min(i, j), max(i, j))
        for i, a in enumerate(hashes)
        for row in table
        for j, b in enumerate(row)
        if i != j and a and b and (a ^ b).bit_count() <= distance
    }


def test_content_key_is_sha256_of_the_bytes(tmp_path):
    data = bytes(range(256)) * 9000  # more than one block of reading
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()[:32]
    assert fp.content_key(path) == expected == fp.key_of_bytes(data)
    assert fp.content_keys([path, path]) == [expected, expected]


def test_hamming_equals_bit_count():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**64, (2, 500), dtype=np.uint64)
    expected = [(int(x) ^ int(y)).bit_count() for x, y in zip(a, b, strict=True)]
    assert fp.hamming(a, b).tolist() == expected
    assert fp.hamming(np.uint64([0]), np.uint64([2**64 - 1])).tolist() == [64]


def test_symmetric_hashes_are_the_hashes_of_mirrored_and_turned_pictures():
    for image in pictures(6):
        variants = set(fp.symmetric_hashes(np.array([fp.perceptual_hash(image)], np.uint64))[:, 0])
        for turns in range(4):
            for mirror in (False, True):
                other = np.rot90(image[:, ::-1] if mirror else image, turns)
                found = fp.perceptual_hash(np.ascontiguousarray(other))
                nearest = min((int(v) ^ found).bit_count() for v in variants)
                assert nearest <= 1  # a coefficient at zero may fall to either side


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 6, 8, 10])
@pytest.mark.parametrize("symmetries", [False, True])
def test_near_pairs_equal_brute_force(distance, symmetries):
    rng = np.random.default_rng(distance)
    base = rng.integers(1, 2**63, 60, dtype=np.uint64)
    hashes = {int(h) | 1 for h in base}
    for h in list(hashes):  # relatives at every distance around the limit
        for _ in range(2):
            flips = rng.choice(np.arange(1, 64), rng.integers(1, 13), replace=False)
            hashes.add(h ^ sum(1 << int(f) for f in flips))
    hashes = sorted(hashes)
    expected = brute_force_pairs(hashes, distance, 8 if symmetries else 1)
    found = fp.near_pairs(hashes, distance, symmetries=symmetries)
    assert {tuple(pair) for pair in found.tolist()} == expected
    if distance >= 3:
        assert len(expected) > 5


def test_equal_hashes_are_connected_and_flat_pictures_are_not():
    groups = fp.near_duplicates([5, 0, 9, 5, 0, 5], 0)
    assert groups == [[0, 3, 5]]
    assert fp.near_duplicates([], 4) == []
    flat = np.full((40, 40, 3), 100, np.uint8)
    assert fp.perceptual_hash(flat) == fp.NO_STRUCTURE
    with pytest.raises(ValueError, match="max_distance is 17"):
        fp.near_pairs([1, 2], 17)


def test_real_changes_stay_near_and_other_pictures_do_not():
    images = pictures(45)
    hashes = np.array([fp.perceptual_hash(image) for image in images], np.uint64)

    def distance(changed):
        new = np.array([fp.perceptual_hash(c) for c in changed], np.uint64)
        return fp.hamming(hashes, new)

    def jpeg(image):
        return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], 1)

    assert np.median(distance([jpeg(i) for i in images])) <= 3
    assert np.median(distance([cv2.resize(i, (48, 48), interpolation=3) for i in images])) <= 3
    assert np.median(distance([cv2.convertScaleAbs(i, alpha=0.7, beta=9) for i in images])) <= 3
    assert np.median(fp.hamming(hashes[1:], hashes[:-1])) > 20


def test_confirm_pairs_equals_corrcoef_over_the_eight_symmetries():
    rng = np.random.default_rng(3)
    thumbs = rng.random((6, 16, 16)).astype(np.float32) * 255
    thumbs[1] = np.rot90(thumbs[0]) * 0.5 + 20
    thumbs[3] = thumbs[2][:, ::-1].T + rng.normal(0, 25, (16, 16))
    pairs = np.array([(i, j) for i in range(6) for j in range(i + 1, 6)])

    def best(a, b):
        turned = [np.rot90(m, k) for m in (b, b[:, ::-1]) for k in range(4)]
        return max(np.corrcoef(a.ravel(), t.ravel())[0, 1] for t in turned)

    expected = [p for p in pairs.tolist() if best(thumbs[p[0]], thumbs[p[1]]) >= 0.9]
    assert fp.confirm_pairs(pairs, thumbs, min_correlation=0.9).tolist() == expected
    assert expected == [[0, 1], [2, 3]]


def test_join_follows_chains():
    assert fp.join([(4, 2), (2, 0), (5, 1)], 7) == [[0, 2, 4], [1, 5]]


@pytest.mark.slow
def test_near_pairs_scale_to_sixty_thousand():
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**64, 60_000, dtype=np.uint64) | np.uint64(1)
    hashes[1] = hashes[0] ^ np.uint64(0b11111111 << 20)
    # Comparing all with all would be 3.6e9 comparisons here; bands leave some 3e7.
    assert fp.near_pairs(hashes, 8).tolist() == [[0, 1]]

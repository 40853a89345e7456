"""The decoded cache: equal to decoding, refused when stale, whole or not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from shared_core.datasets.errors import DatasetError, DecodeError
from shared_core.datasets.reading import cache as cache_module
from shared_core.datasets.reading.cache import DecodedCache
from shared_core.datasets.reading.decode import decode
from shared_core.datasets.reading.image_set import ImageSet
from shared_core.datasets.reading.loader import BatchLoader
from shared_core.datasets.views.augment import TrainView
from shared_core.datasets.views.geometry import resize, short_side_size

SHARED = Path(__file__).resolve().parents[2] / "shared"


def make_set(folder, number=9, *, content_keys=True):
    folder.mkdir(exist_ok=True)
    paths = []
    for n in range(number):
        rng = np.random.default_rng(n)
        image = rng.integers(0, 256, (20 + 7 * n, 50 - 3 * n, 3), dtype=np.uint8)
        path = folder / f"{n}.{'png' if n % 2 else 'jpg'}"
        cv2.imwrite(str(path), image)
        paths.append(path)
    keys = [f"key{n}" for n in range(number)] if content_keys else None
    return ImageSet(paths, np.arange(number), keys)


@pytest.fixture
def images(tmp_path):
    return make_set(tmp_path / "images")


@pytest.mark.parametrize("threads", [1, 3])
def test_cache_equals_decoding(images, tmp_path, threads):
    told = []
    cache = DecodedCache.build(
        images, tmp_path / "cache", threads=threads, progress=lambda *p: told.append(p)
    )
    assert len(cache) == 9 and told == [(n, 9) for n in range(1, 10)]
    total = 0
    for n in (4, 0, 8, 1, 2, 3, 5, 6, 7):
        image = cache.image(cache.row(f"key{n}"))
        np.testing.assert_array_equal(image, decode(images.name(n)))
        assert not image.flags.writeable
        total += image.size
    assert cache.nbytes == total
    assert sorted(os.listdir(tmp_path)) == ["cache", "images"]


def test_short_side_and_size(images, tmp_path):
    cache = DecodedCache.build(images, tmp_path / "short", short_side=30)
    for n in range(9):
        image, whole = cache.image(cache.row(f"key{n}")), decode(images.name(n))
        if min(whole.shape[:2]) <= 30:
            np.testing.assert_array_equal(image, whole)  # never enlarged
        else:
            want = resize(whole, short_side_size(whole.shape[:2], 30), method="area")
            np.testing.assert_array_equal(image, want)
    fixed = DecodedCache.build(images, tmp_path / "fixed", size=(16, 12))
    assert {fixed.image(n).shape for n in range(9)} == {(16, 12, 3)}
    with pytest.raises(ValueError, match="both"):
        DecodedCache.build(images, tmp_path / "both", size=(4, 4), short_side=4)
    with pytest.raises(ValueError, match="short side 0"):
        DecodedCache.build(images, tmp_path / "none", short_side=0)


def test_loader_gives_the_same_views_from_cache_and_files(images, tmp_path):
    view = TrainView(12, seed=1, dct_scaled=False)
    cache = DecodedCache.build(images, tmp_path / "cache")
    cached = images.with_source(cache).subset([7, 2, 3, 5])
    from_cache = next(iter(BatchLoader(cached, view=view, batch_size=4)))
    from_files = next(iter(BatchLoader(images.subset([7, 2, 3, 5]), view=view, batch_size=4)))
    np.testing.assert_array_equal(from_cache.images, from_files.images)
    np.testing.assert_array_equal(cached.image(0), decode(images.name(7)))


def test_images_of_one_key_are_stored_once(images, tmp_path):
    doubled = ImageSet(images.paths * 2, np.zeros(18), images.keys * 2)
    assert len(DecodedCache.build(doubled, tmp_path / "cache")) == 9


def test_stale_is_an_error_or_a_rebuild(images, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match="no decoded cache"):
        DecodedCache.open(folder, images)
    DecodedCache.build(images, folder)
    assert len(DecodedCache.open(folder, images)) == 9
    assert len(DecodedCache.open(folder, images.subset([3, 1]))) == 9  # a part of it will do
    with pytest.raises(DatasetError, match="short_side"):
        DecodedCache.open(folder, images, short_side=20)
    other = ImageSet(images.paths, images.labels, ["new", *images.keys[1:]])
    with pytest.raises(DatasetError, match="stale: no image of key 'new'"):
        DecodedCache.open(folder, other)
    rebuilt = DecodedCache.open_or_build(other, folder)
    assert rebuilt.row("new") == 0
    with pytest.raises(DatasetError, match="key0"):
        rebuilt.row("key0")
    before = (folder / "pixels.bin").stat().st_ino
    DecodedCache.open_or_build(other, folder)
    assert (folder / "pixels.bin").stat().st_ino == before  # opened, not built again


def test_number_keys_notice_a_changed_file(tmp_path):
    images = make_set(tmp_path / "images", content_keys=False)
    DecodedCache.build(images, tmp_path / "cache")
    DecodedCache.open(tmp_path / "cache", images)
    os.utime(images.paths[4], ns=(1, 1))
    with pytest.raises(DatasetError, match=r"4\.jpg was changed"):
        DecodedCache.open(tmp_path / "cache", images)


@pytest.mark.parametrize("damage", ["short", "no pixels", "no json", "keys", "schema"])
def test_damage_is_noticed(images, tmp_path, damage):
    folder = tmp_path / "cache"
    DecodedCache.build(images, folder)
    pixels, index = folder / "pixels.bin", folder / "index.json"
    if damage == "short":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif damage == "no pixels":
        pixels.unlink()
    elif damage == "no json":
        index.write_text(index.read_text()[:100])
    elif damage == "keys":
        index.write_text(index.read_text().replace("key3", "key9"))
    else:
        index.write_text(index.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(DatasetError, match="decoded cache") as error:
        DecodedCache.open(folder, images)
    assert "\n" not in str(error.value)
    assert len(DecodedCache.open_or_build(images, folder)) == 9


def test_a_bad_file_leaves_nothing_and_the_old_cache(images, tmp_path):
    folder = tmp_path / "cache"
    DecodedCache.build(images, folder)
    Path(images.paths[5]).write_bytes(b"")
    with pytest.raises(DecodeError, match=r"5\.png"):
        DecodedCache.build(images, folder, short_side=8)
    assert sorted(os.listdir(tmp_path)) == ["cache", "images"]
    assert len(DecodedCache.open(folder, images)) == 9


def test_only_caches_are_replaced(images, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    with pytest.raises(DatasetError, match="not a decoded cache"):
        DecodedCache.build(images, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(DatasetError, match="without paths"):
        array = ImageSet(None, [0], source=np.zeros((1, 4, 4, 3), np.uint8))
        DecodedCache.build(array, tmp_path / "array")


def test_a_killed_build_leaves_nothing_to_open_and_starts_again(images, tmp_path):
    code = f"""
import sys, os, signal
sys.path.insert(0, {str(SHARED)!r})
from shared_core.datasets.reading import cache as cache_module
from shared_core.datasets.reading.cache import DecodedCache
from shared_core.datasets.reading.image_set import ImageSet
images = ImageSet({images.paths!r}, range(9), {images.keys!r})
def killed(done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
DecodedCache.build(images, {str(tmp_path / "cache")!r}, progress=killed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [name for name in os.listdir(tmp_path) if name.startswith(".cache.part-")]
    assert len(left) == 1
    with pytest.raises(FileNotFoundError):
        DecodedCache.open(tmp_path / "cache", images)
    assert len(DecodedCache.open_or_build(images, tmp_path / "cache")) == 9
    assert sorted(os.listdir(tmp_path)) == ["cache", "images"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_decoded(images, tmp_path, monkeypatch):
    need = sum(decode(path).size for path in images.paths)
    told = []
    free = SimpleNamespace(free=need - 1)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(cache_module, "_decoded", lambda *a: told.append(1))
    with pytest.raises(DatasetError, match="needs about .* GB are free"):
        DecodedCache.build(images, tmp_path / "deep" / "cache")
    assert not told and not (tmp_path / "deep").exists()
    monkeypatch.undo()
    free.free = need
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: free)
    assert len(DecodedCache.build(images, tmp_path / "deep" / "cache")) == 9

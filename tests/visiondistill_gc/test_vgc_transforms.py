"""Views: the README's augmentations, each against a plain way to say it, replayed exactly."""

from __future__ import annotations

import numpy as np
import pytest

from shared_core.datasets import BatchLoader, ImageSet, view_rng
from visiondistill_gc.utils.transforms import GarbageView, eval_view, rotated, shift

NONE = {"hflip": 0, "vflip": 0, "rotation": 0, "padding": 0, "jitter": (0,) * 4, "erasing": 0}


def picture(size=24, seed=0):
    return np.random.default_rng(seed).integers(1, 256, (size, size, 3)).astype(np.uint8)


def seen(view, image, number=0):
    return view(image, view_rng(view.seed, "key", number))


def test_nothing_switched_on_is_the_evaluation_view():
    image = picture(30)
    assert np.array_equal(seen(GarbageView(24, **NONE), image), eval_view(24)(image))


@pytest.mark.parametrize(
    ("name", "turned"),
    [("hflip", lambda i: i[:, ::-1]), ("vflip", lambda i: i[::-1])],
)
def test_flips(name, turned):
    image = picture()
    assert np.array_equal(seen(GarbageView(24, **{**NONE, name: 1.0}), image), turned(image))


@pytest.mark.parametrize(("name", "share"), [("hflip", 0.5), ("vflip", 0.3)])
def test_how_often_it_is_mirrored(name, share):
    image, view = picture(8), GarbageView(8, **{**NONE, name: share})
    turned = [not np.array_equal(seen(view, image, n), image) for n in range(1000)]
    assert np.mean(turned) == pytest.approx(share, abs=0.05)


def test_quarter_turn():
    image = picture()
    assert np.array_equal(rotated(image, 90.0), np.rot90(image))
    assert np.array_equal(rotated(image, 0.0), image)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (3, -2), (-8, 8), (30, 0)])
def test_shift_is_pad_and_crop(down, right):
    image = picture()
    padded = np.zeros((24 + 80, 24 + 80, 3), np.uint8)
    padded[40:64, 40:64] = image
    expected = padded[40 + down : 64 + down, 40 + right : 64 + right]
    shift(image, down, right)
    assert np.array_equal(image, expected)


def test_crop_padding_reaches_both_ends():
    image, view = picture(), GarbageView(24, **{**NONE, "padding": 2})
    found = {tuple(seen(view, image, n)[12, 12]) for n in range(400)}
    near = {tuple(image[12 + d, 12 + r]) for d in range(-2, 3) for r in range(-2, 3)}
    assert found == near


def test_erasing_is_black_and_as_often_as_asked():
    image, view = picture(), GarbageView(24, **{**NONE, "erasing": 0.2})
    shares = []
    for n in range(600):
        out = seen(view, image, n)
        changed = (out != image).any(axis=2)
        assert not out[changed].any()
        shares.append(changed.mean())
    hit = np.array(shares) > 0
    assert hit.mean() == pytest.approx(0.2, abs=0.05)
    assert np.array(shares)[hit].max() < 0.4


def test_views_replay_in_any_thread_and_order():
    images = np.stack([picture(16, seed) for seed in range(12)])
    keys = [f"k{n}" for n in range(12)]
    view = GarbageView(16, seed=5)
    batches = {}
    for threads, order in ((0, range(12)), (3, range(12)), (2, range(11, -1, -1))):
        chosen = list(order)
        image_set = ImageSet(None, [0] * 12, keys, source=images).subset(chosen)
        loader = BatchLoader(image_set, view=view, batch_size=5, threads=threads)
        loader.order.set_epoch(3)
        rows = np.concatenate([batch.images.copy() for batch in loader])
        batches[threads] = rows[np.argsort(chosen)]
    assert np.array_equal(batches[0], batches[3]) and np.array_equal(batches[0], batches[2])
    again = np.stack([view(i, view_rng(5, k, 3)) for i, k in zip(images, keys, strict=True)])
    assert np.array_equal(again, batches[0])


def test_seed_and_view_change_it():
    image = picture()
    found = [seen(GarbageView(24, seed=s), image, n) for s in (0, 1) for n in (0, 1)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert GarbageView(24, seed=1).settings() != GarbageView(24, seed=0).settings()


@pytest.mark.parametrize(
    "words",
    [
        {"hflip": 1.5},
        {"rotation": 200},
        {"padding": -1},
        {"jitter": (0.1, 0.1, 0.1, 0.6)},
        {"jitter": (0.1,)},
        {"crop_scale": (0.9, 0.2)},
    ],
)
def test_bad_view(words):
    with pytest.raises(ValueError, match="expected"):
        GarbageView(16, **words)

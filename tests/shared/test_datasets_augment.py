"""Views: replayable randomness, torchvision's crop rules, operations against Pillow, erasing."""

import json
import math
import tracemalloc

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from shared_core.datasets.views import augment as a
from shared_core.datasets.views import randaugment as ra
from shared_core.datasets.views.augment import EvalView
from shared_core.datasets.views.geometry import resize


def noise(height=40, width=52, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height=64, width=80):
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 60 * np.sin(x / 11 + c) + 50 * np.cos(y / (9 + c)) for c in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


def test_view_rng_is_philox_keyed_by_a_hash():
    """Pinned numbers: a stored view must mean the same picture in every version."""
    first = a.view_rng(7, "ab", 3).random(4)
    np.testing.assert_array_equal(first, a.view_rng(7, "ab", 3).random(4))
    import hashlib

    digest = hashlib.blake2b(b"7|3|ab", digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8")
    bits = np.random.Generator(np.random.Philox(key=key.astype(np.uint64)))
    np.testing.assert_array_equal(first, bits.random(4))
    others = [a.view_rng(*v).random() for v in ((8, "ab", 3), (7, "ac", 3), (7, "ab", 4))]
    assert len({first[0], *others}) == 4
    assert a.view_rng(1, 5, 0).random() == a.view_rng(1, np.int64(5), 0).random()


def test_the_moving_generator_gives_the_same_numbers():
    moving = a.ViewRandom()
    for key in (0, "x", 12345, 0):
        left_over = moving.at(1, key, 2)
        left_over.integers(0, 5, dtype=np.uint32)  # leaves half a word behind
        left_over.random(3)
        got, want = moving.at(9, key, 1), a.view_rng(9, key, 1)
        np.testing.assert_array_equal(got.random(7), want.random(7))
        np.testing.assert_array_equal(got.standard_normal(5), want.standard_normal(5))
        assert got.integers(0, 99, dtype=np.uint32) == want.integers(0, 99, dtype=np.uint32)


def test_draws_are_uniform_over_keys_and_views():
    draws = np.array([a.view_rng(0, k, v).random() for k in range(60) for v in range(30)])
    assert abs(draws.mean() - 0.5) < 0.02 and abs(draws.var() - 1 / 12) < 0.006
    by_key = draws.reshape(60, 30)
    assert abs(np.corrcoef(by_key[:-1].ravel(), by_key[1:].ravel())[0, 1]) < 0.08


class Script:
    """A generator whose uniform numbers are given."""

    def __init__(self, numbers):
        self.numbers = numbers

    def random(self, count):
        return np.resize(np.array(self.numbers), count)


def test_crop_box_by_hand():
    # area 0.5 * 100 * 200 = 10000, aspect exp(0) = 1: 100 x 100 at (0, 0.25 * 101)
    box = a.random_resized_crop_box(
        Script([0.5, 0.5, 0.9, 0.25]), 100, 200, scale=(0, 1), ratio=(0.5, 2)
    )
    assert box == (0, 25, 100, 100)
    # the first try (the whole area, square) does not fit into 100 x 200; the second does
    numbers = [1.0, 0.5, 0, 0, 0.125, 0.5, 0.999, 0.999] + [1.0, 0.5, 0, 0] * 8
    box = a.random_resized_crop_box(Script(numbers), 100, 200, scale=(0, 1), ratio=(0.5, 2))
    assert box == (50, 150, 50, 50)


@pytest.mark.parametrize(
    ("size", "want"),
    [((10, 400), (0, 193, 10, 13)), ((400, 10), (193, 0, 13, 10)), ((30, 35), (0, 0, 30, 35))],
)
def test_crop_box_falls_back_to_the_centre(size, want):
    """Ten tries that ask for the whole area at an aspect that does not fit; torchvision's rule."""
    edge = 0.0 if size[1] > size[0] else 1.0
    box = a.random_resized_crop_box(Script([1.0, edge, 0, 0]), *size)
    assert box == want


def test_crop_boxes_have_torchvisions_distribution():
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    rng, number = np.random.default_rng(0), 600
    image = torch.zeros(3, 60, 90)
    torch.manual_seed(0)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            for _ in range(number)
        ]
    )
    ours = np.array([a.random_resized_crop_box(rng, 60, 90) for _ in range(number)])
    assert (ours[:, 0] + ours[:, 2]).max() <= 60 and (ours[:, 1] + ours[:, 3]).max() <= 90
    assert ours.min(axis=0).tolist() >= [0, 0, 1, 1]
    spread = ours.std(axis=0) / math.sqrt(number)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * spread).all()
    assert (np.abs(ours.std(axis=0) / theirs.std(axis=0) - 1) < 0.1).all()


def test_what_follows_the_crop_does_not_depend_on_the_size():
    after = []
    for size in ((60, 90), (10, 400), (1, 1)):
        rng = a.view_rng(0, 1, 2)
        a.random_resized_crop_box(rng, *size)
        after.append(rng.random())
    assert len(set(after)) == 1


PILLOW = {
    "autocontrast": (lambda i: ra.autocontrast(i), lambda p: ImageOps.autocontrast(p)),
    "equalize": (lambda i: ra.equalize(i), lambda p: ImageOps.equalize(p)),
    "invert": (lambda i: ra.invert(i), lambda p: ImageOps.invert(p)),
    "posterize": (lambda i: ra.posterize(i, 3), lambda p: ImageOps.posterize(p, 3)),
    "solarize": (lambda i: ra.solarize(i, 77), lambda p: ImageOps.solarize(p, 77)),
}
for _factor in (0.1, 0.6, 1.0, 1.7):
    for _name, _ours, _theirs in (
        ("color", ra.adjust_color, ImageEnhance.Color),
        ("contrast", ra.adjust_contrast, ImageEnhance.Contrast),
        ("brightness", ra.adjust_brightness, ImageEnhance.Brightness),
        ("sharpness", ra.adjust_sharpness, ImageEnhance.Sharpness),
    ):
        PILLOW[f"{_name} {_factor}"] = (
            lambda i, o=_ours, f=_factor: o(i, f),
            lambda p, t=_theirs, f=_factor: t(p).enhance(f),
        )


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize(
    "image", [noise(), smooth(), smooth() // 3 + 40], ids=["noise", "smooth", "dim"]
)
def test_operations_equal_pillow(name, image):
    ours, theirs = PILLOW[name]
    before = image.copy()
    got, want = ours(image), np.asarray(theirs(Image.fromarray(image))).astype(int)
    np.testing.assert_array_equal(image, before)
    exact = name in ("equalize", "invert", "posterize", "solarize")
    limit = 0 if exact else 2  # Pillow truncates where we round, and rounds its grey differently
    assert got.dtype == np.uint8 and np.abs(got - want).max() <= limit


def test_solarize_add_and_flat_images():
    image = noise()
    want = np.where(image < 128, np.minimum(image.astype(int) + 60, 255), image)
    np.testing.assert_array_equal(ra.solarize_add(image, 60), want)
    flat = np.full((5, 6, 3), 90, dtype=np.uint8)
    for function in (ra.autocontrast, ra.equalize):
        np.testing.assert_array_equal(function(flat), flat)


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Rotate"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_warps_equal_pillow(name, sign):
    image = smooth()
    height, width = image.shape[:2]
    strength = sign * {"S": 0.2, "T": 0.25, "R": 17.0}[name[0]]
    got = ra.RandAugment("rand-m9").apply(image, name, strength)
    picture = Image.fromarray(image)
    if name == "Rotate":
        want = picture.rotate(strength, Image.Resampling.BILINEAR, fillcolor=ra.FILL)
    else:
        matrix = {
            "ShearX": (1, strength, 0, 0, 1, 0),
            "ShearY": (1, 0, 0, strength, 1, 0),
            "TranslateXRel": (1, 0, strength * width, 0, 1, 0),
            "TranslateYRel": (1, 0, 0, 0, 1, strength * height),
        }[name]
        want = picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            matrix,
            Image.Resampling.BILINEAR,
            fillcolor=ra.FILL,
        )
    difference = np.abs(got.astype(int) - np.asarray(want))
    assert np.quantile(difference, 0.93) <= 4  # the picture; its border is blended differently
    assert difference.mean() < 3 < np.abs(got.astype(int) - image).mean()


def test_hue():
    image = smooth()
    np.testing.assert_allclose(ra.adjust_hue(image, 0.0).astype(int), image, atol=4)
    red = np.full((4, 4, 3), (255, 0, 0), dtype=np.uint8)
    np.testing.assert_allclose(ra.adjust_hue(red, 1 / 3)[0, 0], (0, 255, 0), atol=6)
    np.testing.assert_allclose(ra.adjust_hue(red, -1 / 3)[0, 0], (0, 0, 255), atol=6)


def test_policy_ranges_follow_timm():
    levels = pytest.importorskip("timm.data.auto_augment")
    ours = {True: ra.RandAugment("rand-m9-inc1"), False: ra.RandAugment("rand-m9")}
    for increasing, names in (
        (True, levels._RAND_INCREASING_TRANSFORMS),
        (False, levels._RAND_TRANSFORMS),
    ):
        table = ours[increasing]._operations
        ours_names = {
            name + ("Increasing" if increasing and name in levels_with_direction else "")
            for name in table
            for levels_with_direction in [
                {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
            ]
        }
        assert ours_names == set(names)
        for name in names:
            mine = table[name.removesuffix("Increasing")][2]
            rule = levels.LEVEL_TO_ARG[name]
            for level in (0.0, 3.3, 9.0, 10.0):
                theirs = {round(abs(v), 6) for v in _strengths(rule, level, name)}
                got = abs(mine(level / 10))
                assert any(abs(got - v) < 1e-5 for v in theirs), (name, level, got, theirs)


def _strengths(rule, level, name):
    if rule is None:
        return [0.0]
    found = [rule(level, {"translate_pct": 0.45})[0] for _ in range(12)]
    plain = name.removesuffix("Increasing")
    return (
        [f - 1.0 for f in found]
        if plain in ("Color", "Contrast", "Brightness", "Sharpness")
        else found
    )


def test_randaugment_draws():
    policy = ra.RandAugment("rand-m9-mstd0.5-inc1")
    assert (policy.layers, policy.magnitude, policy.magnitude_std) == (2, 9, 0.5)
    rng, names, applied, angles = np.random.default_rng(0), {}, 0, []
    for _ in range(4000):
        for name, strength in policy.draw(rng):
            names[name] = names.get(name, 0) + 1
            applied += 1
            if name == "Rotate":
                angles.append(strength)
    assert len(names) == 15 and max(names.values()) < 1.5 * min(names.values())
    assert abs(applied / 8000 - 0.5) < 0.03
    angles = np.array(angles)
    assert abs((angles > 0).mean() - 0.5) < 0.12
    assert abs(np.abs(angles).mean() - 27) < 0.5 and np.abs(angles).max() <= 30
    assert 0.8 < np.abs(angles).std() < 1.6  # half a magnitude is 1.5 degrees, cut off at 30


def test_randaugment_replays_and_leaves_its_argument():
    policy, image = ra.RandAugment("rand-m9-n3-mstd0.5-inc1-p1.0"), smooth()
    before = image.copy()
    views = [policy(image, a.view_rng(0, 1, v)) for v in (0, 1, 0)]
    np.testing.assert_array_equal(views[0], views[2])
    assert not np.array_equal(views[0], views[1])
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(ra.RandAugment("rand-m9-n0")(image, a.view_rng(0, 1, 0)), image)
    for name in policy._names:
        out = policy.apply(image, name, 1.0)
        assert out.shape == image.shape and out.dtype == np.uint8


def test_uniform_magnitudes():
    policy = ra.RandAugment("rand-m8-n1-mstdinf-p1.0")
    rng = np.random.default_rng(1)
    drawn = (item for _ in range(4000) for item in policy.draw(rng))
    angles = [abs(strength) for name, strength in drawn if name == "Rotate"]
    assert min(angles) < 3 and max(angles) <= 24.0 and abs(np.mean(angles) - 12) < 1.5


@pytest.mark.parametrize(
    "policy",
    ["augmix-m5", "rand-x3", "rand-m", "rand-m11", "rand-m9-mmax5", "rand-p2", "rand-n1.5"],
)
def test_bad_policies(policy):
    with pytest.raises(ValueError, match="rand|augmix"):
        ra.RandAugment(policy)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing(mode):
    fractions, touched = [], 0
    for n in range(200):
        image = np.full((50, 60, 3), 7, dtype=np.uint8)
        got = a.random_erasing(image, a.view_rng(0, n, 0), probability=0.6, mode=mode)
        assert got is image
        changed = (image != 7).any(-1)
        if not changed.any():
            continue
        touched += 1
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        block = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        fractions.append(block[..., 0].size / 3000)
        if mode == "const":
            assert (block == np.rint(a_mean())).all()
        if mode == "rand":
            assert (block == block[0, 0]).all()
        if mode == "pixel" and block.size > 600:
            assert np.abs(block.mean((0, 1)) - a_mean()).max() < 25
            assert np.abs(block.std((0, 1)) - 58).max() < 15
    assert abs(touched / 200 - 0.6) < 0.12
    assert 0.01 < min(fractions) and max(fractions) < 0.36 and abs(np.mean(fractions) - 0.16) < 0.04


def a_mean():
    return np.array([0.485, 0.456, 0.406]) * 255


def test_several_erasures_share_the_area():
    erased = []
    for n in range(100):
        image = np.full((64, 64, 3), 7, dtype=np.uint8)
        a.random_erasing(image, a.view_rng(1, n, 0), probability=1.0, mode="const", count=4)
        erased.append((image != 7).any(-1).mean())
    assert 0.08 < np.mean(erased) < 0.2
    with pytest.raises(ValueError, match="'white'"):
        a.random_erasing(noise(), a.view_rng(0, 0, 0), probability=1.0, mode="white")


def test_color_jitter_stays_within_its_factors():
    flat = np.full((4, 4, 3), 100, dtype=np.uint8)
    levels = {
        int(a.color_jitter(flat, a.view_rng(0, n, 0), brightness=0.4)[0, 0, 0]) for n in range(300)
    }
    assert min(levels) in range(60, 64) and max(levels) in range(137, 141) and len(levels) > 60
    image = smooth()
    np.testing.assert_array_equal(a.color_jitter(image, a.view_rng(0, 1, 0)), image)
    jittered = a.color_jitter(
        image, a.view_rng(0, 1, 0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
    )
    assert jittered.shape == image.shape and not np.array_equal(jittered, image)


def test_train_view_is_crop_resize_flip():
    image, view = noise(60, 70), a.TrainView(24, vflip=0.5)
    kinds = set()
    for n in range(40):
        got = view(image, a.view_rng(0, n, 0))
        rng = a.view_rng(0, n, 0)
        top, left, height, width = a.random_resized_crop_box(rng, 60, 70)
        across, down = rng.random(2) < 0.5
        want = resize(image[top : top + height, left : left + width], (24, 24))
        want = want[:, ::-1] if across else want
        want = want[::-1] if down else want
        np.testing.assert_array_equal(got, want)
        kinds.add((bool(across), bool(down)))
    assert len(kinds) == 4
    np.testing.assert_array_equal(a.hflip(image), image[:, ::-1])


def test_train_view_with_everything():
    view = a.TrainView(
        (20, 30),
        randaugment="rand-m9-mstd0.5-inc1",
        erasing=0.5,
        erasing_count=2,
        color_jitter=0.4,
        scale=(0.3, 1.0),
    )
    image = smooth()
    before = image.copy()
    out = np.empty((20, 30, 3), dtype=np.uint8)
    for n in range(30):
        assert view(image, a.view_rng(0, n, 1), out) is out
        np.testing.assert_array_equal(out, view(image, a.view_rng(0, n, 1)))
    np.testing.assert_array_equal(image, before)
    assert json.loads(json.dumps(view.settings())) == view.settings()
    assert view.settings() != a.TrainView((20, 30), scale=(0.3, 1.0)).settings()


def test_eval_view_follows_torchvision():
    functional = pytest.importorskip("torchvision.transforms.functional")
    torch = pytest.importorskip("torch")
    image = smooth(90, 131)
    tensor = torch.from_numpy(image).permute(2, 0, 1).float()
    want = functional.resize(tensor, [64], antialias=False)
    want = functional.center_crop(want, [56, 56]).permute(1, 2, 0).numpy()
    assert np.abs(a.EvalView(56)(image) - want).max() <= 1.0
    squeezed = a.EvalView(56, resize_ratio=None)(image)
    np.testing.assert_array_equal(squeezed, resize(image, (56, 56)))
    assert json.loads(json.dumps(a.EvalView(56).settings())) == a.EvalView(56).settings()


@pytest.mark.parametrize("fill", ["zero", "reflect"])
@pytest.mark.parametrize("pad", [0, 3])
def test_small_batch_equals_a_loop(fill, pad):
    images = np.random.default_rng(0).integers(1, 256, (40, 9, 11, 3), dtype=np.uint8)
    keys = [f"k{n}" for n in range(40)]
    got = a.augment_small_batch(images, keys, 5, 3, pad, fill=fill)
    flipped = 0
    for n, key in enumerate(keys):
        y, x, f = a.view_rng(3, key, 5).random(3)
        mode = {"mode": "constant"} if fill == "zero" else {"mode": "reflect"}
        padded = np.pad(images[n], ((pad, pad), (pad, pad), (0, 0)), **mode)
        top, left = int(y * (2 * pad + 1)), int(x * (2 * pad + 1))
        want = padded[top : top + 9, left : left + 11]
        flipped += f < 0.5
        np.testing.assert_array_equal(got[n], want[:, ::-1] if f < 0.5 else want)
    assert 5 < flipped < 35
    # the same image in another batch, at another place
    again = a.augment_small_batch(images[7:9], keys[7:9], 5, 3, pad, fill=fill)
    np.testing.assert_array_equal(again, got[7:9])
    assert a.SmallView(9, pad=pad, fill=fill).settings()["pad"] == pad


@pytest.mark.parametrize(
    "make",
    [
        lambda: a.TrainView(0),
        lambda: a.TrainView(8, hflip=1.5),
        lambda: a.TrainView(8, scale=(0.5, 0.2)),
        lambda: a.TrainView(8, ratio=(0, 1)),
        lambda: a.TrainView(8, erasing_mode="x"),
        lambda: a.TrainView(8, color_jitter=(0.1, 0.2)),
        lambda: a.TrainView(8, method="best"),
        lambda: a.EvalView(8, resize_ratio=0.5),
        lambda: a.EvalView(8, method="best"),
        lambda: a.SmallView(8, fill="white"),
        lambda: a.augment_small_batch(np.zeros((2, 4, 4, 3), np.uint8), [1], 0, 0),
        lambda: a.augment_small_batch(np.zeros((1, 4, 4, 3), np.uint8), [1], 0, 0, fill="x"),
        lambda: a.augment_small_batch(np.zeros((1, 4, 4, 3), np.uint8), [1], 0, 0, fill="reflect"),
    ],
)
def test_refusals(make):
    with pytest.raises(ValueError, match="expected|keys|pad"):
        make()


@pytest.mark.parametrize("size", [(1, 20000), (2, 6000), (6000, 2), (4, 60000)])
def test_a_window_of_a_strip_costs_a_window(size):
    """Resized whole, these would take gigabytes; the rows must be those of the strip's middle."""
    ramp = (np.arange(max(size)) % 251).astype(np.uint8)
    image = np.broadcast_to(ramp[None, :, None] if size[0] < size[1] else ramp[:, None, None],
                            (*size, 3)).copy()  # fmt: skip
    tracemalloc.start()
    got = EvalView(224)(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    middle = ramp[max(size) // 2 - 60 : max(size) // 2 + 60].astype(int)
    along = got[112] if size[0] < size[1] else got[:, 112]
    assert middle.min() <= along.min() and along.max() <= middle.max()
    # 224 pixels show 224 * min / 256 of the strip's, around its middle.
    scale = min(size) / 256
    wanted = np.interp(
        max(size) / 2 + (np.arange(224) - 111.5) * scale - 0.5, np.arange(max(size)), ramp
    )
    jumps = np.abs(np.diff(wanted)) < 1
    assert np.abs(along[:, 0].astype(int) - wanted)[1:][jumps].max() <= 2


@pytest.mark.parametrize("method", ["linear", "area", "cubic", "reduced"])
@pytest.mark.parametrize("size", [(60, 90), (301, 77), (40, 400), (1, 300)])
def test_a_window_cut_first_is_that_of_the_whole(size, method, monkeypatch):
    """The old rule (resize, then cut) on ordinary images; cut first, nearly the same pixels."""
    rng = np.random.default_rng(sum(size))
    image = cv2.GaussianBlur(rng.integers(0, 256, (*size, 3), dtype=np.uint8), (0, 0), 3)
    view = EvalView(112, method=method)
    plan = view.plan(None, *size)
    top, left, height, width = plan.window
    whole = resize(image, plan.size, method=method)[top : top + height, left : left + width]
    np.testing.assert_array_equal(view(image), whole)
    monkeypatch.setattr(a, "LARGEST_RESIZED", 0)
    near = np.abs(view(image).astype(int) - whole)
    assert near.mean() < 1 and near.max() <= 12

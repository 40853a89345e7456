"""Resizing against slow references written from the methods' definitions."""

import numpy as np
import pytest

from shared_core.datasets.views import geometry as g


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def weights(old, new, method):
    """(new, old) matrix of one axis of the named resize, float64."""
    table = np.zeros((new, old))
    for i in range(new):
        if method == "area":
            low, high = i * old / new, (i + 1) * old / new
            for j in range(old):
                table[i, j] = max(0.0, min(high, j + 1) - max(low, j)) / (high - low)
            continue
        at = (i + 0.5) * old / new - 0.5
        base = int(np.floor(at))
        t = at - base
        if method == "linear":
            taps = {base: 1 - t, base + 1: t}
        else:
            a = -0.75
            taps = {}
            for k in range(-1, 3):
                d = abs(t - k)
                if d <= 1:
                    taps[base + k] = (a + 2) * d**3 - (a + 3) * d**2 + 1
                else:
                    taps[base + k] = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        for j, w in taps.items():
            table[i, min(max(j, 0), old - 1)] += w
    return table


def reference(image, size, method):
    rows = weights(image.shape[0], size[0], method)
    columns = weights(image.shape[1], size[1], method)
    return np.einsum("ij,jkc,lk->ilc", rows, image.astype(float), columns)


def fixed_point_linear(image, size):
    """Bilinear in integers: weights in 1/2048, the vertical sum of products of the high parts."""

    def taps(old, new, *, horizontal=True):
        at = np.float32((np.arange(new) + 0.5) * (old / new) - 0.5)
        base = np.floor(at).astype(int)
        part = at - base
        if horizontal:  # at the edges one weight is 0; of the rows the edge row comes twice
            part[base < 0] = 0
            part[base >= old - 1] = 0
        first, second = np.clip(base, 0, old - 1), np.clip(base + 1, 0, old - 1)
        second = np.where(base < 0, 0, second)
        return (
            first,
            second,
            np.rint((1 - part) * 2048).astype(int),
            np.rint(part * 2048).astype(int),
        )

    y0, y1, b0, b1 = taps(image.shape[0], size[0], horizontal=False)
    x0, x1, a0, a1 = taps(image.shape[1], size[1])
    wide = image.astype(int)
    row = wide[:, x0] * a0[None, :, None] + wide[:, x1] * a1[None, :, None]
    top = ((row[y0] >> 4) * b0[:, None, None]) >> 16
    bottom = ((row[y1] >> 4) * b1[:, None, None]) >> 16
    return (top + bottom + 2) >> 2


SIZES = [((37, 53), (64, 64)), ((64, 48), (31, 17)), ((5, 200), (7, 3)), ((1, 9), (4, 4))]


@pytest.mark.parametrize("method", ["linear", "area", "cubic"])
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_resize_is_the_named_one(method, old, new):
    image = noise(*old)
    if method == "area" and (new[0] > old[0] or new[1] > old[1]):
        pytest.skip("the mean over an area is for shrinking")
    want = np.clip(reference(image, new, method), 0, 255)
    got = g.resize(image, new, method=method)
    assert got.shape == (*new, 3)
    assert np.abs(got - want).max() <= 1.0  # never further than the rounding of fixed-point weights
    assert np.abs(got - want).mean() < 0.35  # 0.25 is what rounding alone gives


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((37, 53), (64, 64)),
        ((90, 71), (31, 17)),
        ((200, 181), (224, 224)),
        ((600, 411), (224, 224)),
    ],
)
def test_linear_equals_integer_arithmetic(old, new):
    """OpenCV's fixed-point rule, except for its shortcut at exactly half size."""
    image = noise(*old, seed=3)
    np.testing.assert_array_equal(g.resize(image, new), fixed_point_linear(image, new))


def test_reduced_is_a_block_mean_and_then_linear():
    image = noise(90, 61)
    small = image[:, :60].reshape(30, 3, 30, 2, 3).mean(axis=(1, 3))
    want = reference(np.rint(small), (29, 25), "linear")
    assert np.abs(g.resize(image, (29, 25), method="reduced") - want).max() <= 2.0
    same = g.resize(image, (60, 50), method="linear")
    np.testing.assert_array_equal(g.resize(image, (60, 50), method="reduced"), same)


@pytest.mark.parametrize("method", list(g.METHODS))
def test_same_size_copies_and_constant_stays(method):
    image = noise(9, 7)
    got = g.resize(image, (9, 7), method=method)
    np.testing.assert_array_equal(got, image)
    assert not np.shares_memory(got, image)
    flat = np.full((13, 29, 3), (3, 200, 77), dtype=np.uint8)
    assert (g.resize(flat, (31, 5), method=method) == (3, 200, 77)).all()


def test_out_is_written_in_place_also_when_it_is_a_view():
    image = noise(20, 30)
    for size in ((11, 13), (20, 30)):
        want = g.resize(image, size)
        frame = np.full((40, 50, 3), 9, dtype=np.uint8)
        out = frame[3 : 3 + size[0], 4 : 4 + size[1]]
        assert g.resize(image, size, out=out) is out
        np.testing.assert_array_equal(frame[3 : 3 + size[0], 4 : 4 + size[1]], want)
        assert (frame[:3] == 9).all() and (frame[:, :4] == 9).all()


def test_views_as_source():
    image = noise(40, 50)
    for part in (image[3:20, 5:31], image[::-1, ::2], image.transpose(1, 0, 2)):
        np.testing.assert_array_equal(
            g.resize(part, (8, 9)), g.resize(np.ascontiguousarray(part), (8, 9))
        )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: g.resize(noise(4, 4), (0, 3)), "0 x 3"),
        (lambda: g.resize(noise(4, 4), (3, 3), method="best"), "'best'"),
        (lambda: g.resize(noise(4, 4)[:, :0], (3, 3)), "not empty"),
        (lambda: g.resize(noise(4, 4)[..., 0], (3, 3)), r"\(4, 4\)"),
        (lambda: g.resize(noise(4, 4), (3, 3), out=noise(3, 4)), r"\(3, 4, 3\)"),
        (lambda: g.center_box((4, 4), (5, 1)), "5 x 1"),
        (lambda: g.letterbox(noise(4, 4), (3, 3), out=noise(3, 4)), r"\(3, 4, 3\)"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (7, 7), (600, 401), (33, 32), (2, 3)])
@pytest.mark.parametrize("target", [(224, 224), (97, 64), (1, 1), (5, 8)])
def test_letterbox(size, target):
    image = noise(*size)
    image[image == 114] = 0
    got = g.letterbox(image, target)
    assert got.shape == (*target, 3)
    scale = min(target[0] / size[0], target[1] / size[1])
    height, width = (max(1, int(np.floor(side * scale + 0.5 + 1e-9))) for side in size)
    top, left = (target[0] - height) // 2, (target[1] - width) // 2
    assert g.letterbox_box(size, target) == (top, left, height, width)
    assert height == target[0] or width == target[1]
    inside = got[top : top + height, left : left + width]
    np.testing.assert_array_equal(inside, g.resize(image, (height, width)))
    rest = np.ones(target, dtype=bool)
    rest[top : top + height, left : left + width] = False
    assert (got[rest] == 114).all()


def test_letterbox_fill_and_out():
    out = np.zeros((10, 20, 3), dtype=np.uint8)
    got = g.letterbox(noise(4, 4), (10, 20), (1, 2, 3), out=out)
    assert got is out and (out[:, :5] == (1, 2, 3)).all() and (out[:, 15:] == (1, 2, 3)).all()


def test_short_side_and_centre_follow_torchvision():
    transforms = pytest.importorskip("torchvision.transforms.functional")
    from PIL import Image

    for height, width in ((600, 401), (256, 256), (31, 77), (77, 31), (9, 1000)):
        image = noise(height, width)
        theirs = transforms.resize(Image.fromarray(image), 24)
        size = g.short_side_size((height, width), 24)
        assert size == theirs.size[::-1]
        ours = g.resize(image, size)
        crop = np.asarray(transforms.center_crop(Image.fromarray(ours), [21, 20]))
        top, left, rows, columns = g.center_box(size, (21, 20))
        np.testing.assert_array_equal(ours[top : top + rows, left : left + columns], crop)

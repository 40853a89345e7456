"""MyAugment's operations against NumPy, its groups and probabilities; AutoAugment; the sheet."""

from __future__ import annotations

import colorsys
from collections import Counter

import cv2
import numpy as np
import pytest

from command_tools import run_main
from shared_core.datasets import view_rng
from shared_core.runs import run_command
from torch_cls_zoo.dataloader.enhancement import pixel_ops as ops
from torch_cls_zoo.dataloader.enhancement import preview
from torch_cls_zoo.dataloader.enhancement.my_augment import FILTERS, TOP_GROUPS, MyAugment
from torch_cls_zoo.dataloader.enhancement.policies import POLICIES, AutoAugmentPolicy, make_augment

RNG = np.random.default_rng(0)
IMAGE = cv2.resize(RNG.integers(0, 256, (9, 11, 3), dtype=np.uint8), (44, 36))


@pytest.mark.parametrize("name", [*TOP_GROUPS, *FILTERS])
@pytest.mark.parametrize("shape", [(36, 44), (1, 1), (1, 9), (3, 2)])
def test_every_operation_keeps_shape_type_and_input(name, shape):
    operation = TOP_GROUPS.get(name) or FILTERS[name]
    image = np.ascontiguousarray(IMAGE[: shape[0], : shape[1]])
    before = image.copy()
    for seed in range(12):
        out = operation(image, np.random.default_rng(seed))
        assert out.shape == image.shape and out.dtype == np.uint8
        again = operation(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(image, before)


def test_the_groups_fire_with_the_probabilities_of_the_original():
    plans = [MyAugment().plan(np.random.default_rng(n)) for n in range(6000)]
    for name in TOP_GROUPS:
        share = np.mean([name in plan for plan in plans])
        assert share == pytest.approx(0.5, abs=0.025), name
    filters = [[step for step in plan if step in FILTERS] for plan in plans]
    # 0 to 3 are picked, each kept with 0.8: by the binomial sum.
    from scipy import stats

    counts = Counter(len(found) for found in filters)
    for number in range(4):
        want = np.mean([stats.binom.pmf(number, n, 0.8) for n in range(4)])
        assert counts[number] / 6000 == pytest.approx(want, abs=0.025), number
    each = Counter(step for found in filters for step in found)
    want = 1.5 * 0.8 / 8
    for name in FILTERS:
        assert each[name] / 6000 == pytest.approx(want, abs=0.02), name
    assert all(len(set(plan)) == len(plan) for plan in plans)
    first = Counter(plan[0] for plan in plans if plan)
    assert min(first[name] for name in TOP_GROUPS) > 600  # the order is random


def test_the_draws_come_from_the_view_alone():
    augment = MyAugment()
    views = [augment(IMAGE, view_rng(1, "key", n)) for n in range(20)]
    again = [augment(IMAGE, view_rng(1, "key", n)) for n in range(20)]
    for one, other in zip(views, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert sum(not np.array_equal(view, IMAGE) for view in views) > 12


def test_crop_keeps_the_pixels_inside():
    out = ops.crop_and_scale_back(IMAGE, (0.1, 0.0, 0.1, 0.05))
    inner = IMAGE[3:33, 2:44]  # int(3.6) = 3 rows above and below, int(2.2) = 2 columns left
    np.testing.assert_array_equal(out, cv2.resize(inner, (44, 36)))
    np.testing.assert_array_equal(ops.crop_and_scale_back(IMAGE, (0, 0, 0, 0)), IMAGE)


def test_rotation_turns_about_the_middle():
    square = np.zeros((21, 21, 3), np.uint8)
    square[10, 15] = 255  # right of the middle
    out = ops.rotate(square, 90.0, border=cv2.BORDER_CONSTANT)
    assert out[5, 10, 0] > 250 and out.sum() <= square.sum() + 6  # counter-clockwise: above it
    np.testing.assert_array_equal(ops.rotate(IMAGE, 0.0, border=cv2.BORDER_WRAP), IMAGE)


def test_linear_contrast_is_the_formula():
    factors = np.array([0.6, 1.0, 1.4])
    want = np.clip(np.rint(128 + (IMAGE.astype(np.float64) - 128) * factors), 0, 255)
    got = ops.linear_contrast(IMAGE, factors)
    assert np.abs(got - want).max() <= 1  # halves may round either way in float32
    assert (got != want).mean() < 0.01


def test_sharpening_of_nothing_is_nothing_and_keeps_the_mean():
    np.testing.assert_array_equal(ops.sharpen(IMAGE, alpha=0.0, lightness=1.3), IMAGE)
    flat = np.full((9, 9, 3), 90, np.uint8)
    np.testing.assert_array_equal(ops.sharpen(flat, alpha=0.7, lightness=1.0), flat)
    # Lightness 1.5, all of it: the kernel sums to 1.5.
    assert (ops.sharpen(flat, alpha=1.0, lightness=1.5) == 135).all()
    row = np.zeros((1, 5, 3), np.uint8)
    row[0, 2] = 20
    kernel_middle = 0.5 * 1 + 0.5 * (8 + 1.0)
    assert ops.sharpen(np.repeat(row, 1, 0), alpha=0.5, lightness=1.0)[0, 2, 0] == (
        # the rows above and below are mirrored copies of this one
        round(20 * kernel_middle - 0.5 * 2 * 20)
    )


def test_brightness_saturation_and_hue_against_the_standard_library():
    colours = np.array([[200, 60, 40], [30, 90, 200], [90, 140, 60]], np.uint8)
    for red, green, blue in colours.tolist():
        pixel = np.array([[[red, green, blue]]], np.uint8)
        h, s, v = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)

        def rgb(*hsv: float) -> np.ndarray:
            return np.array(colorsys.hsv_to_rgb(*hsv)) * 255

        bright = ops.brightness(pixel, add=20, factor=0.8)[0, 0]
        np.testing.assert_allclose(bright, rgb(h, s, v * 0.8 + 20 / 255), atol=4)
        dull = ops.saturation(pixel, factor=0.5)[0, 0]
        np.testing.assert_allclose(dull, rgb(h, s * 0.5, v), atol=4)
        grey = ops.saturation(pixel, factor=0.0)[0, 0]
        assert np.ptp(grey) <= 1
        turned = ops.hue(pixel, add=64)[0, 0]  # a quarter of a turn
        np.testing.assert_allclose(turned, rgb((h + 0.25) % 1, s, v), atol=6)
        back = ops.hue(pixel, factor=-1.0)[0, 0]
        np.testing.assert_allclose(back, rgb((-h) % 1, s, v), atol=6)


def test_noise_is_equal_on_the_channels_and_salt_is_white():
    flat = np.full((30, 30, 3), 100, np.uint8)
    noise = np.random.default_rng(0).normal(0, 5, (30, 30)).astype(np.float32)
    noisy = ops.add_noise(flat, noise)
    assert (noisy == noisy[..., :1]).all()
    np.testing.assert_array_equal(noisy[..., 0], np.rint(100 + noise))
    mask = np.zeros((30, 30), np.int8)
    mask[0, 0], mask[1, 1] = 1, -1
    out = ops.salt_and_pepper(flat, mask)
    assert (out[0, 0] == 255).all() and (out[1, 1] == 0).all() and (out[2:] == 100).all()


def test_motion_blur_is_the_mean_along_its_line():
    image = np.zeros((15, 15, 3), np.uint8)
    image[7, 7] = 250
    flat = ops.motion_blur(image, 5, 0.0)
    assert (flat[7, 5:10, 0] == 50).all() and flat[..., 0].sum() == 250
    up = ops.motion_blur(image, 5, 90.0)
    assert (up[5:10, 7, 0] == 50).all()


@pytest.mark.parametrize("policy", POLICIES[1:4])
def test_autoaugment_is_replayable_and_leaves_torch_s_generator_alone(policy):
    import torch

    augment = AutoAugmentPolicy(policy)
    before = torch.get_rng_state()
    views = [augment(IMAGE, view_rng(0, "k", n)) for n in range(30)]
    assert torch.equal(torch.get_rng_state(), before)
    other = AutoAugmentPolicy(policy)
    for n, view in enumerate(views):
        assert view.shape == IMAGE.shape and view.dtype == np.uint8
        np.testing.assert_array_equal(view, other(IMAGE, view_rng(0, "k", n)))
    assert len({view.tobytes() for view in views}) > 15


def test_autoaugment_is_torchvision_s_for_the_same_draws():
    import torch
    from PIL import Image
    from torchvision import transforms

    class Known(transforms.AutoAugment):
        @staticmethod
        def get_params(transform_num):
            return known

    theirs = Known(transforms.AutoAugmentPolicy.IMAGENET, fill=[0, 0, 0])
    for n in range(25):
        rng = view_rng(0, "k", n)
        image = IMAGE[:, ::-1] if rng.random() < 0.5 else IMAGE
        known = (int(rng.integers(25)), torch.tensor(rng.random(2)), rng.integers(2, size=2))
        want = np.asarray(theirs(Image.fromarray(np.ascontiguousarray(image))))
        mine = AutoAugmentPolicy("imagenet")(IMAGE, view_rng(0, "k", n))
        np.testing.assert_array_equal(mine, want)


def test_unknown_policies_are_refused():
    assert make_augment(None) is None and make_augment("my").name == "my"
    with pytest.raises(ValueError, match="expected one of my, imagenet"):
        make_augment("coco")


def test_the_preview_writes_a_sheet(zoo_data, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    words = [str(zoo_data), str(out), "--rows", "3", "--views", "4", "--image_size", "31", "40"]
    assert run_command(preview.main, words) == 0
    sheet = cv2.imread(str(out))
    assert sheet.shape == (22 + 3 * 35, 5 * 44, 3)
    cells = [sheet[22:53, n * 44 : n * 44 + 40] for n in range(5)]
    assert sum(not np.array_equal(cells[0], cell) for cell in cells[1:]) >= 2
    assert run_command(preview.main, [str(tmp_path / "no"), str(out)]) == 1
    assert run_command(preview.main, [str(zoo_data), str(tmp_path / "x.gif")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert run_main(preview.main, [zoo_data, out, "--rows", 0]).code == 2

"""The floor without a network: features by hand, and the two extremes of what it can reach."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from shared_core.metrics.floor import engineered_features, floor_accuracy, plain_features


def write(folder, images):
    folder.mkdir()
    paths = []
    for index, image in enumerate(images):
        path = folder / f"{index}.png"
        path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
        paths.append(path)
    return paths


def test_features_of_a_flat_image():
    image = np.full((40, 56, 3), (255, 0, 51), np.uint8)
    found = plain_features(image)
    assert found.shape == (384,) and found.dtype == np.float32
    np.testing.assert_allclose(found[:192].reshape(64, 3), [[1.0, 0.0, 0.2]] * 64, atol=1e-6)
    histograms = found[192:240].reshape(3, 16)
    assert histograms.argmax(axis=1).tolist() == [15, 0, 3]
    np.testing.assert_allclose(histograms.sum(axis=1), 1)
    assert (found[240:] == 0).all()  # no gradients
    assert engineered_features(image).shape == (728,)


def test_gradient_grid_tells_direction_and_place():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:32, 8:] = 255  # an upright edge in the upper left cells, a flat one across the middle
    image[32:] = 0
    grid = plain_features(image)[240:].reshape(4, 4, 9)
    assert grid[0, 0].argmax() == 0 and grid[0, 0, 0] > 0  # upright edge: gradient along x
    assert grid[1, 2].argmax() == 4  # flat edge: gradient along y, half a turn of nine bins
    assert (grid[3] == 0).all()
    assert float((grid.astype(float) ** 2).sum()) == pytest.approx(1, abs=1e-5)


def test_features_are_finite_and_in_range():
    rng = np.random.default_rng(0)
    for shape in ((16, 16), (17, 31), (64, 64), (3, 200)):
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        found = engineered_features(image)
        assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
        np.testing.assert_array_equal(found[:384], plain_features(image))


def test_colour_tells_everything_and_random_labels_nothing(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 40)
    colours = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (180, 180, 60)])
    noise = rng.integers(-50, 50, (160, 16, 16, 3))
    images = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
    paths = write(tmp_path / "images", images)
    order = rng.permutation(160)
    train, test = order[:80], order[80:]

    def floor(labels):
        return floor_accuracy(
            [paths[i] for i in train], labels[train], [paths[i] for i in test], labels[test]
        )

    assert floor(labels) == {"plain": 1.0, "engineered": 1.0}
    chance = floor(rng.integers(0, 4, 160))
    assert chance.keys() == {"plain", "engineered"}
    for value in chance.values():
        assert 0.08 < value < 0.42  # 0.25, standard deviation 0.048

"""Drawing one procedural scene seen from above: a small grammar of 45 classes.

A class is a theme and a form: five kinds of objects (tanks, houses, ships, planes, courts) in five
arrangements, and roads, water, fields and textures in five forms each. Place, turn, scale, colours
and light are random, and the theme is as often darker as brighter than its ground, so that no
pixel by itself says anything about the class: a linear model on raw pixels learns next to nothing,
while edges and their arrangement, which a small convolutional net finds, tell the classes apart.

Difficulty in [0, 1] lowers the contrast, raises noise, blur, clutter and turn, and adds haze.
"""

from __future__ import annotations

import hashlib
import math

import cv2
import numpy as np
from numpy.typing import NDArray

from shared_core.datasets.builtin.shapes import ONE, SHIFT, Rng, theme_mask

Pixels = NDArray[np.uint8]

OBJECTS = ("tanks", "houses", "ships", "planes", "courts")
ARRANGEMENTS = ("grid", "row", "ring", "scatter", "pair")
FORMS = {
    "roads": ("cross", "tee", "star", "parallel", "ring"),
    "water": ("river", "fork", "lake", "islands", "coast"),
    "fields": ("stripes", "checker", "circles", "terraces", "patches"),
    "texture": ("forest", "dunes", "ridges", "waves", "rubble"),
}
# Curated order: the first classes are the most different ones, so that a small number of
# classes is an easy problem and all 45 are a hard one.
CLASSES = (
    "fields_stripes",
    "tanks_grid",
    "roads_cross",
    "water_river",
    "texture_forest",
    "houses_row",
    "roads_ring",
    "water_lake",
    "planes_pair",
    "ships_scatter",
    "fields_checker",
    "texture_dunes",
    "roads_star",
    "water_coast",
    "courts_grid",
    "tanks_ring",
    "roads_parallel",
    "fields_circles",
    "water_islands",
    "houses_ring",
    "planes_row",
    "ships_grid",
    "courts_pair",
    "tanks_pair",
    "roads_tee",
    "water_fork",
    "fields_terraces",
    "texture_ridges",
    "houses_scatter",
    "planes_ring",
    "ships_row",
    "courts_ring",
    "tanks_row",
    "texture_waves",
    "fields_patches",
    "houses_grid",
    "planes_grid",
    "ships_pair",
    "courts_row",
    "tanks_scatter",
    "texture_rubble",
    "houses_pair",
    "planes_scatter",
    "ships_ring",
    "courts_scatter",
)


def scene_rng(seed: int, name: str, index: int) -> Rng:
    """The random generator of one scene: a counter-based one, keyed by seed, class and index."""
    digest = hashlib.sha256(f"scene {seed} {name} {index}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _soft_noise(rng: Rng, size: int, cells: int) -> NDArray[np.float32]:
    """Smooth noise (size, size) with standard deviation near 1."""
    small = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC))


def _clutter(image: NDArray[np.float32], rng: Rng, difficulty: float, strength: float) -> None:
    """Small things that belong to no class, weaker than the theme."""
    size = image.shape[0]
    for _ in range(int(rng.integers(0, 1 + round(7 * difficulty)))):
        x, y = (int(v) for v in rng.uniform(0, size * ONE, 2))
        colour = (image[y // ONE, x // ONE] + rng.normal(0, strength, 3)).tolist()
        length = float(rng.uniform(0.04, 0.12)) * size
        if rng.random() < 0.5:
            radius = round(0.35 * length * ONE)
            cv2.circle(image, (x, y), max(radius, 8), colour, -1, cv2.LINE_8, SHIFT)
        else:
            angle = float(rng.uniform(0, math.pi))
            end = (
                x + round(length * ONE * math.cos(angle)),
                y + round(length * ONE * math.sin(angle)),
            )
            cv2.line(image, (x, y), end, colour, max(1, size // 48), cv2.LINE_8, SHIFT)


def draw(name: str, rng: Rng, *, size: int, difficulty: float) -> Pixels:
    """Draw one scene of class ``name``: RGB uint8 ``(size, size, 3)``.

    Args:
        rng: ``scene_rng(seed, name, index)``; everything random comes from it.
        size: pixels, at least 16.
        difficulty: in [0, 1].
    """
    mask = theme_mask(name, rng, size=size, difficulty=difficulty)
    contrast = float(rng.uniform(0.8, 1.2)) * (80 - 52 * difficulty)  # grey levels
    ground = rng.uniform(90, 165, 3)
    tint = rng.normal(0, 0.35, 3)
    theme = float(rng.choice([-1.0, 1.0])) * contrast * (1 + tint)
    alpha = mask.astype(np.float32)[:, :, None] / 255
    light = _soft_noise(rng, size, 4)[:, :, None] * (4 + 12 * difficulty)
    image = (ground + theme * alpha + light).astype(np.float32)
    _clutter(image, rng, difficulty, 0.7 * contrast)
    blur = 0.9 * difficulty * float(rng.random()) * size / 64
    if blur > 0.25:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), blur))
    if rng.random() < 0.6 * difficulty:  # haze: a bright veil over a part
        veil = np.clip(_soft_noise(rng, size, 3) - 0.3, 0, 1)[:, :, None] * 0.6
        image = image * (1 - veil) + 225 * veil
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + noise * np.float32(3 + 11 * difficulty)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)

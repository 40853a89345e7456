"""The grammar of the procedural scenes: what a theme and a form look like, as a mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]  # (size, size), 0 to 255: how much of the theme's colour
Rng = np.random.Generator
Point = tuple[float, float]  # x, y as fractions of the side, (0, 0) the upper left corner

SHIFT = 4  # OpenCV draws with 1/16 pixel
ONE = 1 << SHIFT


class Canvas:
    """A mask to draw on, in fractions of its side, turned and shifted as a whole."""

    def __init__(self, size: int, rng: Rng, difficulty: float) -> None:
        self.size = size
        self.rng = rng
        self.mask: Mask = np.zeros((size, size), np.uint8)
        self.turn = float(rng.uniform(-1, 1)) * math.pi * (0.12 + 0.88 * difficulty)
        self.scale = float(rng.uniform(0.85, 1.15))
        reach = 0.04 + 0.08 * difficulty
        self.shift = (float(rng.uniform(-reach, reach)), float(rng.uniform(-reach, reach)))

    def _at(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        """Fractions (n, 2) around the middle to OpenCV's fixed-point pixels."""
        c, s = math.cos(self.turn), math.sin(self.turn)
        rotated = (points - 0.5) * self.scale @ np.array([[c, s], [-s, c]])
        pixels = (rotated + 0.5 + np.array(self.shift)) * self.size - 0.5
        return np.asarray(np.rint(pixels * ONE), dtype=np.int32)

    def polygon(self, points: NDArray[np.float64], value: int = 255) -> None:
        cv2.fillPoly(self.mask, [self._at(points)], value, cv2.LINE_AA, SHIFT)

    def path(self, points: NDArray[np.float64], width: float, *, closed: bool = False) -> None:
        """A strip of constant width (fraction of the side) along points."""
        pixels = max(1, round(width * self.scale * self.size))
        cv2.polylines(self.mask, [self._at(points)], closed, 255, pixels, cv2.LINE_AA, SHIFT)

    def disc(self, centre: Point, radius: float, value: int = 255, *, width: int = -1) -> None:
        (x, y) = self._at(np.array([centre]))[0]
        r = round(radius * self.scale * self.size * ONE)
        cv2.circle(self.mask, (int(x), int(y)), max(r, 8), value, width, cv2.LINE_AA, SHIFT)


def _points(*pairs: Point) -> NDArray[np.float64]:
    return np.array(pairs, dtype=np.float64)


def _box(centre: Point, length: float, width: float, angle: float) -> NDArray[np.float64]:
    c, s = math.cos(angle), math.sin(angle)
    corners = _points((-1, -1), (1, -1), (1, 1), (-1, 1)) * (length / 2, width / 2)
    return np.asarray(corners @ np.array([[c, s], [-s, c]]) + centre, dtype=np.float64)


# --- objects -----------------------------------------------------------------------------------


def _tank(canvas: Canvas, at: Point, r: float, angle: float) -> None:
    canvas.disc(at, r)
    canvas.disc((at[0] - 0.3 * r, at[1] - 0.3 * r), 0.35 * r, 150)


def _house(canvas: Canvas, at: Point, r: float, angle: float) -> None:
    canvas.polygon(_box(at, 1.8 * r, 1.7 * r, angle))


def _ship(canvas: Canvas, at: Point, r: float, angle: float) -> None:
    hull = _points((-1.5, -0.42), (0.8, -0.42), (1.6, 0), (0.8, 0.42), (-1.5, 0.42)) * r
    c, s = math.cos(angle), math.sin(angle)
    canvas.polygon(hull @ np.array([[c, s], [-s, c]]) + at)


def _plane(canvas: Canvas, at: Point, r: float, angle: float) -> None:
    c, s = math.cos(angle), math.sin(angle)
    turn = np.array([[c, s], [-s, c]])
    wings = _points(
        (0.35, 0), (-0.45, 1.25), (-0.75, 1.25), (-0.25, 0), (-0.75, -1.25), (-0.45, -1.25)
    )
    tail = _points((-0.8, 0), (-1.25, 0.5), (-1.4, 0.5), (-1.2, 0), (-1.4, -0.5), (-1.25, -0.5))
    body = _points((1.4, 0), (1.1, 0.2), (-1.3, 0.13), (-1.3, -0.13), (1.1, -0.2))
    for part in (wings, tail, body):
        canvas.polygon(part * r @ turn + at)


def _court(canvas: Canvas, at: Point, r: float, angle: float) -> None:
    outline = _box(at, 2.2 * r, 1.5 * r, angle)
    canvas.path(outline, 0.22 * r, closed=True)
    middle = _box(at, 0.01 * r, 1.5 * r, angle)
    canvas.path(middle[[0, 3]], 0.2 * r)


_OBJECTS: dict[str, Callable[[Canvas, Point, float, float], None]] = {
    "tanks": _tank,
    "houses": _house,
    "ships": _ship,
    "planes": _plane,
    "courts": _court,
}


def _arrange(form: str, rng: Rng) -> list[tuple[Point, float, float]]:
    """Places of objects: (centre, radius, angle)."""
    free = float(rng.uniform(0, math.pi))
    if form == "grid":
        n = 3
        step = 0.29
        return [
            ((0.5 + (i - 1) * step, 0.5 + (j - 1) * step), 0.095, free)
            for i in range(n)
            for j in range(n)
        ]
    if form == "row":
        n = int(rng.integers(4, 6))
        step = 0.92 / n
        return [((0.5 + (i - (n - 1) / 2) * step, 0.5), 0.4 * step, math.pi / 2) for i in range(n)]
    if form == "ring":
        n = int(rng.integers(6, 8))
        angles = [free + 2 * math.pi * i / n for i in range(n)]
        return [((0.5 + 0.34 * math.cos(a), 0.5 + 0.34 * math.sin(a)), 0.09, a) for a in angles]
    if form == "pair":
        side = float(rng.choice([-1.0, 1.0]))
        return [
            ((0.5 - 0.21, 0.5 - 0.08 * side), 0.17, free),
            ((0.5 + 0.21, 0.5 + 0.08 * side), 0.17, free),
        ]
    places: list[tuple[Point, float, float]] = []
    wanted = int(rng.integers(4, 7))
    for _ in range(60):  # scatter: no two too near, sizes and angles of their own
        at = (float(rng.uniform(0.12, 0.88)), float(rng.uniform(0.12, 0.88)))
        radius = float(rng.uniform(0.06, 0.11))
        if all(math.dist(at, other) > 2.1 * (radius + r) for other, r, _ in places):
            places.append((at, radius, float(rng.uniform(0, 2 * math.pi))))
        if len(places) == wanted:
            break
    return places


# --- lines and areas ---------------------------------------------------------------------------


def _winding(rng: Rng, start: Point, end: Point, sway: float, waves: float) -> NDArray[np.float64]:
    t = np.linspace(0, 1, 24)[:, None]
    line = np.array(start) * (1 - t) + np.array(end) * t
    across = np.array([-(end[1] - start[1]), end[0] - start[0]])
    return line + across * sway * np.sin(2 * math.pi * (waves * t + rng.uniform()))


def _blob(rng: Rng, centre: Point, radius: float, roughness: float) -> NDArray[np.float64]:
    a = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    r = np.full_like(a, radius)
    for k in (2, 3, 5):
        r += radius * roughness / k * rng.normal() * np.cos(k * a + rng.uniform(0, 6.3))
    return np.stack([centre[0] + r * np.cos(a), centre[1] + r * np.sin(a)], axis=1)


def _roads(canvas: Canvas, form: str, rng: Rng) -> None:
    width = float(rng.uniform(0.07, 0.12))
    far = 1.2
    if form == "cross":
        canvas.path(_points((0.5 - far, 0.5), (0.5 + far, 0.5)), width)
        canvas.path(_points((0.5, 0.5 - far), (0.5, 0.5 + far)), width)
    elif form == "tee":
        canvas.path(_points((0.5 - far, 0.4), (0.5 + far, 0.4)), width)
        canvas.path(_points((0.5, 0.4), (0.5, 0.5 + far)), width)
    elif form == "star":
        n = int(rng.integers(5, 7))
        for i in range(n):
            a = 2 * math.pi * i / n
            end = (0.5 + far * math.cos(a), 0.5 + far * math.sin(a))
            canvas.path(_points((0.5, 0.5), end), 0.75 * width)
    elif form == "parallel":
        gap = float(rng.uniform(0.24, 0.32))
        for offset in (-gap, 0.0, gap):
            line = _points((0.5 - far, 0.5 + offset), (0.5 + far, 0.5 + offset))
            canvas.path(line, 0.8 * width)
    else:  # ring: a roundabout with three or four ways
        radius = float(rng.uniform(0.2, 0.26))
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        circle = 0.5 + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        canvas.path(circle, width, closed=True)
        n = int(rng.integers(3, 5))
        for i in range(n):
            a = 2 * math.pi * i / n
            inner = (0.5 + radius * math.cos(a), 0.5 + radius * math.sin(a))
            outer = (0.5 + far * math.cos(a), 0.5 + far * math.sin(a))
            canvas.path(_points(inner, outer), 0.8 * width)


def _water(canvas: Canvas, form: str, rng: Rng) -> None:
    if form == "river":
        line = _winding(rng, (-0.4, 0.5), (1.4, 0.5), float(rng.uniform(0.08, 0.14)), 2.2)
        canvas.path(line, float(rng.uniform(0.09, 0.15)))
    elif form == "fork":
        width = float(rng.uniform(0.09, 0.13))
        for start in ((-0.4, 0.1), (-0.4, 0.9)):
            canvas.path(_winding(rng, start, (0.5, 0.5), 0.04, 1.5), 0.8 * width)
        canvas.path(_winding(rng, (0.5, 0.5), (1.5, 0.5), 0.04, 1.5), width)
    elif form == "lake":
        canvas.polygon(_blob(rng, (0.5, 0.5), float(rng.uniform(0.24, 0.32)), 0.3))
    elif form == "islands":
        for at, radius, _ in _arrange("scatter", rng):
            canvas.polygon(_blob(rng, at, 1.15 * radius, 0.6))
    else:  # coast: half of the picture behind a wavy line
        edge = _winding(rng, (-0.6, 0.5), (1.6, 0.5), 0.035, 3.0)
        canvas.polygon(np.concatenate([edge, _points((1.6, 1.9), (-0.6, 1.9))]))


def _fields(canvas: Canvas, form: str, rng: Rng) -> None:
    if form == "stripes":
        n = int(rng.integers(6, 9))
        for i in range(-n, 2 * n):
            centre = (0.5, (i + 0.5) / n)
            canvas.polygon(_box(centre, 3.0, 0.5 / n, 0.0))
    elif form == "checker":
        n = int(rng.integers(4, 6))
        for i in range(-n, 2 * n):
            for j in range(-n, 2 * n):
                if (i + j) % 2:
                    canvas.polygon(_box(((i + 0.5) / n, (j + 0.5) / n), 1 / n, 1 / n, 0.0))
    elif form == "circles":  # pivot irrigation: discs that nearly touch and fill the picture
        n = int(rng.integers(2, 4))
        for i in range(-n, 2 * n):
            for j in range(-n, 2 * n):
                canvas.disc(((i + 0.5) / n, (j + 0.5) / n), 0.46 / n)
    elif form == "terraces":
        centre = (float(rng.uniform(-0.1, 0.2)), float(rng.uniform(-0.1, 0.2)))
        step = float(rng.uniform(0.13, 0.17))
        outline = _blob(rng, (0.0, 0.0), 1.0, 0.12)
        for i in range(1, 11):
            canvas.path(outline * step * i + centre, 0.4 * step, closed=True)
    else:  # patches: a quilt of rectangles, each of its own shade
        cuts_x = np.sort(rng.uniform(-0.3, 1.3, 7))
        cuts_y = np.sort(rng.uniform(-0.3, 1.3, 7))
        for x0, x1 in zip(cuts_x[:-1], cuts_x[1:], strict=True):
            for y0, y1 in zip(cuts_y[:-1], cuts_y[1:], strict=True):
                corners = _points((x0, y0), (x1, y0), (x1, y1), (x0, y1))
                canvas.polygon(corners, int(rng.integers(0, 256)))


def _texture(canvas: Canvas, form: str, rng: Rng) -> None:
    size = canvas.size
    if form == "forest":  # many small crowns
        for x, y in rng.uniform(-0.25, 1.25, (110, 2)):
            canvas.disc((float(x), float(y)), float(rng.uniform(0.03, 0.05)), 255)
            canvas.disc((float(x) + 0.015, float(y) + 0.015), 0.025, 90)
        return
    if form == "rubble":  # angular pieces of random shade
        for x, y in rng.uniform(-0.25, 1.25, (130, 2)):
            length, width = rng.uniform(0.04, 0.13, 2)
            angle = float(rng.uniform(0, 3.2))
            box = _box((float(x), float(y)), float(length), float(width), angle)
            canvas.polygon(box, int(rng.integers(0, 256)))
        return
    if form == "waves":  # short crests, all along one direction
        for x, y in rng.uniform(-0.3, 1.3, (90, 2)):
            crest = _points((x - 0.07, y), (x, y - 0.025), (x + 0.07, y))
            canvas.path(crest, 0.022)
        return
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    c, s = math.cos(canvas.turn), math.sin(canvas.turn)
    u, v = (c * x + s * y) * canvas.scale, (-s * x + c * y) * canvas.scale
    coarse = cv2.resize(
        rng.normal(size=(5, 5)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC
    )
    if form == "dunes":  # soft parallel swells, bent by noise
        value = 0.5 + 0.5 * np.sin(2 * math.pi * (rng.uniform(3, 4) * v + 0.22 * coarse))
    else:  # ridges: sharp crests where smooth noise crosses zero, branching like valleys
        fine = cv2.resize(
            rng.normal(size=(9, 9)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC
        )
        value = np.exp(-5.0 * np.abs(coarse + 0.6 * fine + 0.3 * u))
    canvas.mask = np.clip(255 * value, 0, 255).astype(np.uint8)


def theme_mask(name: str, rng: Rng, *, size: int, difficulty: float) -> Mask:
    """Draw the theme of class ``name`` (``theme_form``): uint8 ``(size, size)``."""
    canvas = Canvas(size, rng, difficulty)
    theme, form = name.split("_")
    if theme in _OBJECTS:
        for at, radius, angle in _arrange(form, rng):
            _OBJECTS[theme](canvas, at, radius, angle)
    else:
        {"roads": _roads, "water": _water, "fields": _fields, "texture": _texture}[theme](
            canvas, form, rng
        )
    return canvas.mask

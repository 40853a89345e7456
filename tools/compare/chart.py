"""The Pareto picture as SVG: accuracy over latency, a marker a file, its area the bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 16, 44  # pixels of the margins
LEAST, MOST = 5.0, 17.0  # radius of a marker, pixels


@dataclass(frozen=True)
class Point:
    """One file.

    Attributes:
        number: its row in the table, written beside the marker.
        title: shown under the pointer.
        ms: an image; above 0.
        accuracy, low, high: fractions.
        bytes: on disk.
        group: number of its colour.
        square: drawn as a square (int8) instead of a disc.
        front, winner: on the front; the winner.
    """

    number: int
    title: str
    ms: float
    accuracy: float
    low: float
    high: float
    bytes: int
    group: int
    square: bool
    front: bool
    winner: bool


@dataclass(frozen=True)
class _Axes:
    """From milliseconds (logarithmic) and accuracy to pixels."""

    ms: tuple[float, float]
    accuracy: tuple[float, float]

    def x(self, ms: float) -> float:
        low, high = (math.log(end) for end in self.ms)
        return LEFT + (math.log(ms) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, accuracy: float) -> float:
        low, high = self.accuracy
        return HEIGHT - BOTTOM - (accuracy - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def draw(
    points: Sequence[Point],
    *,
    label: str,
    mark: str,
    ms: float | None = None,
    accuracy: float | None = None,
) -> str:
    """The picture as one ``<svg>``; its colours are classes and variables of the page.

    Args:
        label: of the horizontal axis.
        mark: word beside the winner.
        ms, accuracy: limits of the budget, drawn as dashed lines.
    """
    axes = _axes(points, ms, accuracy)
    parts = [*_grid(axes, label), *_limits(axes, ms, accuracy)]
    front = sorted((p for p in points if p.front), key=lambda p: p.ms)
    if len(front) > 1:
        path = " ".join(f"{axes.x(p.ms):.1f},{axes.y(p.accuracy):.1f}" for p in front)
        parts.append(f'<polyline class="front" points="{path}"/>')
    most = max(p.bytes for p in points)
    for point in sorted(points, key=lambda p: -p.bytes):  # small ones on top
        parts += _marker(axes, point, radius=_radius(point.bytes, most))
    parts += _numbers(axes, points, most, mark)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="accuracy over latency">'
        + "".join(parts)
        + "</svg>"
    )


def _radius(size: int, most: int) -> float:
    return max(LEAST, MOST * math.sqrt(size / max(most, 1)))


def _axes(points: Sequence[Point], ms: float | None, accuracy: float | None) -> _Axes:
    times = [p.ms for p in points] + ([ms] if ms else [])
    values = [p.accuracy for p in points] + ([accuracy] if accuracy is not None else [])
    slow, fast = max(times) * 1.35, min(times) / 1.35
    room = max(0.02, 0.12 * (max(values) - min(values)))
    return _Axes(
        (fast, slow), (max(0.0, min(values) - room), min(1 + 0.5 * room, max(values) + room))
    )


def _grid(axes: _Axes, label: str) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in _even(axes.accuracy[0], min(1.0, axes.accuracy[1])):
        y = axes.y(value)
        yield f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    for value in _round(*axes.ms):
        x = axes.x(value)
        yield f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>'
    turn = f'transform="translate(13 {(TOP + bottom) / 2:.0f}) rotate(-90)"'
    yield f'<text {turn} text-anchor="middle">accuracy on the test split</text>'


def _limits(axes: _Axes, ms: float | None, accuracy: float | None) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    if ms:
        x = axes.x(ms)
        yield f'<line class="limit" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>'
    if accuracy is not None:
        y = axes.y(accuracy)
        yield f'<line class="limit" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'


def _marker(axes: _Axes, point: Point, *, radius: float) -> Iterator[str]:
    x, y, r = axes.x(point.ms), axes.y(point.accuracy), radius
    top, bottom = axes.accuracy[1], axes.accuracy[0]
    ends = (axes.y(min(point.high, top)), axes.y(max(point.low, bottom)))
    yield f'<line class="bar" x1="{x:.1f}" y1="{ends[0]:.1f}" x2="{x:.1f}" y2="{ends[1]:.1f}"/>'
    if point.winner:
        yield f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{r + 5:.1f}"/>'
    shape = (
        f'<rect x="{x - 0.9 * r:.1f}" y="{y - 0.9 * r:.1f}" width="{1.8 * r:.1f}" '
        f'height="{1.8 * r:.1f}" rx="2"'
        if point.square
        else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"'
    )
    ending = "rect" if point.square else "circle"
    yield f'{shape} class="mark g{point.group}"><title>{escape(point.title)}</title></{ending}>'


def _numbers(axes: _Axes, points: Sequence[Point], most: int, mark: str) -> Iterator[str]:
    """The number of each point where it covers the fewest markers and other numbers."""
    discs = [(axes.x(p.ms), axes.y(p.accuracy), _radius(p.bytes, most)) for p in points]
    taken: list[tuple[float, float]] = []
    for point, (x, y, r) in zip(points, discs, strict=True):
        text = f"{point.number} {mark}" if point.winner else str(point.number)
        half, far = 4.5 * len(text), r + (11 if point.winner else 3)
        places = [
            (x + far + half, y), (x - far - half, y), (x, y - far - 7), (x, y + far + 8),
            (x + far + half, y - 14), (x - far - half, y + 14),
        ]  # fmt: skip

        def cost(at: tuple[float, float], half: float = half) -> float:
            inside = LEFT + half < at[0] < WIDTH - RIGHT - half and TOP < at[1] < HEIGHT - BOTTOM
            hit = sum(abs(at[0] - a) < half + c and abs(at[1] - b) < 7 + c for a, b, c in discs)
            near = sum(abs(at[0] - a) < half + 12 and abs(at[1] - b) < 13 for a, b in taken)
            return hit + 2 * near + (0 if inside else 5)

        best = min(places, key=cost)
        taken.append(best)
        style = ' class="win"' if point.winner else ""
        # Letters may be larger than thought (a narrow page): they grow away from the marker.
        side = (best[0] > x) - (best[0] < x)
        anchor = ("end", "middle", "start")[side + 1]
        at = f'x="{best[0] - side * half:.1f}" y="{best[1] + 4:.1f}" text-anchor="{anchor}"'
        yield f"<text{style} {at}>{text}</text>"


def _even(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, about five."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _round(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten from ``low`` to ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [n * 10.0**power for power in powers for n in (1, 2, 3, 5, 7)]
    found = [value for value in values if low <= value <= high]
    whole = [v for v in found if f"{v:.0e}"[0] in "125"]
    return whole if len(whole) > 2 else found

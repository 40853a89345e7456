"""What a network must beat: the most frequent class, and image features with a line, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from compare.check_data import prepared
from compare.contract import FLOORS_FILE, Floors, write
from shared_core.metrics.floor import floor_accuracy

T = TypeVar("T")
LEARN, JUDGE = 4_000, 2_000  # images at most
CLASSES = 200  # more make the linear classifier take minutes


def measure_floors(folder: Path, *, say: Callable[[str], None]) -> Floors:
    """Measure them on the run's split and write ``floors.json``."""
    data = prepared(folder)
    train, test = data.manifest.subset("train"), data.manifest.subset("test")
    frequent = Counter(item.label for item in train).most_common(1)[0][0]
    majority = sum(item.label == frequent for item in test) / len(test)
    floors = Floors(majority)
    if len(data.classes) > CLASSES:
        note = f"image features and a line are left out for more than {CLASSES} classes"
        floors = Floors(majority, note=note)
    else:
        learn, judge = spread(train, LEARN), spread(test, JUDGE)
        found = floor_accuracy(
            [data.root / item.path for item in learn], [item.label for item in learn],
            [data.root / item.path for item in judge], [item.label for item in judge],
        )  # fmt: skip
        note = ""
        if len(learn) < len(train) or len(judge) < len(test):
            note = f"learned from {len(learn):,} images, judged on {len(judge):,}"
        floors = Floors(majority, found["plain"], found["engineered"], note)
    write(folder / FLOORS_FILE, floors)
    say(_line(floors))
    return floors


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly spread: items are sorted by class, so each keeps its share."""
    if len(items) <= most:
        return list(items)
    return [items[n * len(items) // most] for n in range(most)]


def _line(floors: Floors) -> str:
    parts = [f"always the most frequent class {floors.majority:.3f}"]
    if floors.plain is not None and floors.engineered is not None:
        parts += [f"plain pixels {floors.plain:.3f}", f"image features {floors.engineered:.3f}"]
    return (
        "floors without a network: " + ", ".join(parts) + (f" ({floors.note})" * bool(floors.note))
    )

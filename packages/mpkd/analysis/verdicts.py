"""What a result is worth beside floors, a teacher, and the same student from labels: sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAINED_FLOOR = "trained features, linear"  # the core's name of it, whose module loads NumPy
PLAIN_FLOOR = "plain features, linear"
# Why a result may lie below its floor.
DIGITS = (
    "Gradients of strokes tell digits apart almost without a mistake: this run shows that the "
    "chain works, not that a network is better."
)
FROM_NOTHING = (
    "The student starts from nothing and is small; trained features come from a million images."
)


def against(found: float, floors: Mapping[str, Mapping[str, Any]], who: str) -> list[str]:
    """A sentence a floor: whether an accuracy on the test images is above it."""
    said = []
    for name, floor in floors.items():
        value = floor["accuracy"]
        side = "above" if found > value else "BELOW" if found < value else "equal to"
        said.append(f"The {who}, {found:.4f} on the test images, is {side} {name} ({value:.4f}).")
    return said


def floors_of(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The floors that a run's finished stages measured, by name."""
    found = {}
    for stage, name in (
        ("teacher", TRAINED_FLOOR),
        ("distil", TRAINED_FLOOR),
        ("floor", PLAIN_FLOOR),
    ):
        floor = stages.get(stage, {}).get("floor")
        if floor:
            found.setdefault(name, floor)
    return found


def verdicts(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a run's result is worth beside its floors and its teacher: whole sentences."""
    last = stages.get("distil", {})
    if "test_accuracy" in stages.get("quantize", {}):
        last = stages["quantize"]
    found = last.get("test_accuracy")
    if found is None:
        return []
    said = against(found, floors_of(stages), "student")
    if any("BELOW" in sentence for sentence in said):
        if stages.get("prepare", {}).get("name") == "digits":
            said.append(DIGITS)
        elif not stages["distil"].get("start"):
            said.append(FROM_NOTHING)
    teacher = stages.get("teacher", {}).get("test_accuracy")
    if teacher is not None:
        gap = 100 * (teacher - found)
        where = f"{gap:.1f} points above" if gap > 0 else f"NOT ABOVE ({gap:.1f} points)"
        said.append(f"The teacher, {teacher:.4f}, is {where} the student.")
    return said


def helped(gap: Mapping[str, Any], what: str) -> str:
    """Whether distillation helped, from a difference paired by seed.

    Args:
        gap: ``mean``, ``low``, ``high``, ``n``: of the distilled student's accuracy minus that of
            the same student from labels, fractions.
        what: the two that are compared.
    """
    word = "did not help for sure"
    if gap["low"] > 0:
        word = "helped"
    elif gap["high"] < 0:
        word = "did not help, it hurt"
    return (
        f"Distillation {word}: {100 * gap['mean']:+.1f} points (95 % interval "
        f"{100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}, {gap['n']} seeds; {what})."
    )

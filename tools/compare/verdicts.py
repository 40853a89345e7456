"""Whether the work paid: trainings against the linear head, students against twins from labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compare.asking import TEST, parts_of, stored_answers
from compare.choose import paired
from compare.contract import FLOAT, DataCheck, Judged, Plan, Planned, Value

PROBE = "probe"


def verdicts(folder: Path, check: DataCheck, plan: Plan, rows: Sequence[Judged]) -> list[str]:
    """Whole sentences on the float files and the test split, each with its paired interval.

    Args:
        folder: the run's, with the answers that were judged.
    """
    labels = parts_of(folder, check.root)[TEST].labels
    judged = {row.candidate for row in rows if row.form == FLOAT}

    def right(name: str) -> np.ndarray:
        return np.asarray(stored_answers(folder, name)[f"{FLOAT}/test"] == labels)

    told = []
    trained = [one for one in plan.candidates if one.name in judged and one.name != PROBE]
    for one in trained if PROBE in judged else ():
        gap = paired(right(one.name), right(PROBE))
        if gap.low <= 0:
            below = "lies below" if gap.value < 0 else "is not shown to lie above"
            told.append(f"{one.name} {below} the floor of trained features, linear: {_gap(gap)}.")
    for one in trained:
        twin = _twin(one, plan.candidates)
        if twin is not None and twin.name in judged:
            gap = paired(right(one.name), right(twin.name))
            told.append(f"Distillation ({one.name} against {twin.name}) {_helped(gap)}: "
                        f"{_gap(gap)}.")  # fmt: skip
    return told


def _twin(student: Planned, candidates: Sequence[Planned]) -> Planned | None:
    """The same network at the same size, from labels; of the same seed where there is one."""
    if not student.teacher:
        return None
    same = ("network", "input_size")
    twins = [
        one for one in candidates
        if not one.teacher and one.project == student.project
        and all(one.settings.get(key) == student.settings.get(key) for key in same)
    ]  # fmt: skip
    return next((one for one in twins if one.seed == student.seed), twins[0] if twins else None)


def _helped(gap: Value) -> str:
    if gap.low > 0:
        return "helped"
    return "did not help, it hurt" if gap.high < 0 else "did not help for sure"


def _gap(gap: Value) -> str:
    return (
        f"{100 * gap.value:+.1f} points, paired 95 % interval {100 * gap.low:+.1f} to "
        f"{100 * gap.high:+.1f}"
    )

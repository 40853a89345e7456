"""Whether the work paid: sentences against counts by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from compare import verdicts
from compare.contract import DataCheck, Plan, Planned

LABELS = np.arange(100) % 4


def answers(right: int, *, first: int = 0) -> dict[str, np.ndarray]:
    """Right on so many images, those from ``first`` on; else the next class."""
    wrong = (LABELS + 1) % 4
    good = (np.arange(100) - first) % 100 < right
    return {"onnx/test": np.where(good, LABELS, wrong)}


def planned(name: str, *, teacher: str = "", size: int = 96, seed: int = 0) -> Planned:
    settings = {"network": "net", "input_size": size}
    return Planned(name, name, "m", "zoo", name, settings, seed, 1.0, True, "", 0, teacher)


@pytest.fixture
def told(monkeypatch, tmp_path):
    def run(found: dict[str, dict], *candidates: Planned) -> list[str]:
        test = {"test": SimpleNamespace(labels=LABELS)}
        monkeypatch.setattr(verdicts, "parts_of", lambda folder, root: test)
        monkeypatch.setattr(verdicts, "stored_answers", lambda folder, name: found[name])
        rows = [SimpleNamespace(candidate=name, form="onnx") for name in found]
        check = DataCheck("s", "real", "/", ("a",), {}, "", False, 1)
        plan = Plan(1, 1, (), 1, "cpu", 1, {}, candidates)
        return verdicts.verdicts(tmp_path, check, plan, rows)

    return run


def test_a_training_below_its_floor_is_told(told):
    lines = told(
        {"probe": answers(80), "worse": answers(60), "same": answers(80), "better": answers(99)},
        *map(planned, ("probe", "worse", "same", "better")),
    )
    assert len(lines) == 2
    assert lines[0].startswith("worse lies below the floor of trained features, linear: -20.0")
    assert lines[1].startswith("same is not shown to lie above the floor")


@pytest.mark.parametrize(
    ("right", "says"),
    [
        (90, "helped: +30.0 points"),
        (30, "did not help, it hurt: -30.0 points"),
        (60, "did not help for sure: +0.0 points"),
    ],
)
def test_distillation_is_held_against_the_same_network_from_labels(told, right, says):
    lines = told(
        {"twin": answers(60), "other": answers(10), "student": answers(right)},
        planned("other", size=160), planned("student", teacher="teacher"), planned("twin"),
    )  # fmt: skip
    assert len(lines) == 1 and lines[0].startswith(f"Distillation (student against twin) {says}")

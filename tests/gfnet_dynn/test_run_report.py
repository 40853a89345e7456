"""The report's words and pictures, from made-up results."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from gfnet_dynn import plots
from gfnet_dynn.run_report import NOT_REPRODUCED, headline

EXITS = (1, 3)


def shape(path) -> tuple[int, int]:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = cv2.imread(str(path))
    assert picture is not None and picture.std() > 5
    return picture.shape[:2]


def run_of(kind: str, *, known: bool = True):
    facts = {"name": "x", "kind": kind, "images": 7, "pixels": 16}
    data = SimpleNamespace(
        facts=lambda: facts, kind=kind, classes=("a", "b"), manifest=SimpleNamespace(hash="f" * 64)
    )
    args = SimpleNamespace(scale="short", data_set="AID", known_set=known)
    return SimpleNamespace(data=data, args=args)


def test_headline():
    line = headline(run_of("built-in"))
    assert line.startswith("REHEARSAL") and "AID was not used" in line
    assert NOT_REPRODUCED[1:] in line and "\n" not in line
    for kind in ("real", "subset"):
        line = headline(run_of(kind))
        assert "REHEARSAL" not in line and f"({kind})" in line and "7 images, 2 classes" in line


@pytest.fixture
def measured():
    times = {"batch 1": 2.0, "batch 64": 1.0}
    plain = {"macs": 3e6, "accuracy": 0.9, "ms_per_image": times}
    return {
        "floor": {"plain": 0.4, "engineered": 0.5},
        "backbone": {**plain, "macs": 9e6},
        "student": plain,
        "exits": {
            "policy": "gate",
            "final_accuracy": 0.88,
            "ms_per_image_without_exits": times,
            "points": {
                name: {"macs": macs, "accuracy": 0.8, "ms_per_image": times}
                for name, macs in (("careful", 2.5e6), ("balanced", 2e6), ("fast", 1.5e6))
            },
        },
    }


def test_pictures_are_pictures(tmp_path, measured):
    rng = np.random.default_rng(0)
    sweep = SimpleNamespace(cost=np.linspace(1e6, 3e6, 9), accuracy=np.linspace(0.5, 0.9, 9))
    shape(plots.accuracy_cost(tmp_path, measured, sweep, {"max_prob": sweep, "entropy": sweep}))
    shape(plots.accuracy_time(tmp_path, measured, unit="CPU, 1 thread"))
    rates = rng.dirichlet(np.ones(3), size=45)
    rates[7] = np.nan  # a class without test images
    classes = [f"class_{n} $x^" for n in range(45)]
    assert shape(plots.exit_rates(tmp_path, rates, classes, EXITS))[0] > 1000  # room for 45 names
    probabilities = rng.dirichlet(np.ones(4), size=(3, 50))
    shape(plots.reliability(tmp_path, probabilities, rng.integers(0, 4, 50), EXITS))


def test_pictures_without_backbone_and_floor(tmp_path, measured):
    """A model from elsewhere was evaluated."""
    for name in ("floor", "backbone", "student"):
        del measured[name]
    sweep = SimpleNamespace(cost=np.array([1e6]), accuracy=np.array([0.5]))
    shape(plots.accuracy_cost(tmp_path, measured, sweep, {}))
    shape(plots.accuracy_time(tmp_path, measured, unit="GPU"))
    shape(plots.training_curves(tmp_path, [], EXITS))


def test_sheet_shrinks_rows_that_nobody_fills(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    full = [[image] * 4] * 3
    texts = [["beach\n(said $river^)"] * 4] * 3
    tall = shape(plots.samples_per_exit(tmp_path, full, texts, EXITS))
    low = shape(plots.samples_per_exit(tmp_path, [full[0], [], []], [texts[0], [], []], EXITS))
    nobody = shape(plots.samples_per_exit(tmp_path, [[], [], []], [[], [], []], EXITS))
    assert tall[0] > low[0] > nobody[0]


def test_easiest_class_is_on_top(tmp_path):
    """The class that leaves first is drawn as the first bar."""
    rates = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    picture = cv2.imread(str(plots.exit_rates(tmp_path, rates, ["hard", "easy"], EXITS)))
    # Columns through the bars; the first exit is the darkest shade of the map, the last is light.
    column = picture[:, picture.shape[1] // 2].astype(int)
    bars = [row for row in column.tolist() if max(row) - min(row) > 40]
    top, bottom = bars[len(bars) // 4], bars[-len(bars) // 4]
    assert sum(top) < sum(bottom)


def test_curves_by_epoch(tmp_path):
    lines = []
    for stage in ("backbone", "distil"):
        for step in range(2):
            lines.append({"stage": stage, "split": "train", "step": step, "loss": 1.0 - step / 3})
            lines.append({"stage": stage, "split": "val", "step": step, "acc": step / 2})
    for step in range(3):
        acc = {f"acc{e}": 0.3 for e in EXITS}
        lines.append({"stage": "exits", "split": "train", "step": step})
        more = {"acc_final": 0.5, "gated_acc": 0.4}
        lines.append({"stage": "exits", "split": "val", "step": step, **acc, **more})
    shape(plots.training_curves(tmp_path, lines, EXITS))

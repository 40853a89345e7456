"""The report's words and pictures, from made-up results."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from gfnet_dynn.report import run_plots as plots
from gfnet_dynn.report.lines import NOT_REPRODUCED, headline
from gfnet_dynn.report.run_page import _result_table, _sheet

EXITS = (1, 3)


def shape(path) -> tuple[int, int]:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = cv2.imread(str(path))
    assert picture is not None and picture.std() > 5
    return picture.shape[:2]


def run_of(kind: str, *, known: bool = True):
    facts = {"name": "x", "kind": kind, "images": 7, "pixels": 16}
    data = SimpleNamespace(
        facts=lambda: facts,
        rehearsal=kind == "built-in",
        classes=("a", "b"),
        manifest=SimpleNamespace(hash="f" * 64),
    )
    source = SimpleNamespace(data_set="AID", known=known)
    return SimpleNamespace(data=data, settings=SimpleNamespace(scale="short", source=source))


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


def test_who_passes_all_exits_has_a_time_of_its_own(measured):
    """The row of a network whose exits nobody takes is not that of the network without them."""
    measured["backbone"]["parameters"] = measured["student"]["parameters"] = 4e6
    exits = measured["exits"] | {
        "parameters": 5e6,
        "macs_without_exits": 3.0e6,
        "macs_per_exit": [1e6, 2e6, 3.2e6],
        "ms_per_image_at_exits": {"batch 1": [1.0, 1.5, 2.5], "batch 64": [0.5, 0.7, 1.2]},
    }
    tables = []
    report = SimpleNamespace(table=lambda columns, rows: tables.append(rows))
    _result_table(report, measured | {"exits": exits})
    rows = {row[0]: row[1:] for row in tables[0]}
    assert rows["its exits taken away"] == [0.88, 5.0, 3.0, 2.0, 1.0]
    assert rows["with exits, nobody leaves"] == [0.88, 5.0, 3.2, 2.5, 1.2]
    assert rows["plain features, linear"] == [0.4, None, None, None, None]
    assert rows["with exits, fast"] == [0.8, 5.0, 1.5, 2.0, 1.0]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, by name, instead of files."""
    from matplotlib.figure import Figure

    figures = {}

    def keep(folder, name, draw, *, size):
        figures[name] = Figure(figsize=size)
        draw(figures[name])
        return folder / name

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def test_the_plain_networks_stand_beside_the_measured_times(tmp_path, measured, drawn):
    measured["backbone"]["ms_per_image"] = {"batch 1": 7.0, "batch 64": 5.0}
    plots.accuracy_time(tmp_path, measured, unit="CPU, 1 thread")
    one, many = drawn["accuracy-time"].axes
    for axis, label in ((one, "batch 1"), (many, "batch 64")):
        points = {line.get_label(): line.get_xydata()[0].tolist() for line in axis.lines}
        for name in ("backbone", "student"):
            row = measured[name]
            assert points[name] == [row["ms_per_image"][label], row["accuracy"]]
        exits = measured["exits"]
        plain = [exits["ms_per_image_without_exits"][label], exits["final_accuracy"]]
        assert points["same net, no exits"] == plain
        fast = exits["points"]["fast"]
        assert points["exits, fast"] == [fast["ms_per_image"][label], fast["accuracy"]]


def test_every_exit_has_its_curve_and_colour(tmp_path, drawn):
    exits = tuple(range(11))
    numbers = {f"acc{e}": e / 20 for e in exits} | {"acc_final": 0.9, "gated_acc": 0.8}
    lines = [{"stage": "exits", "split": "val", "step": step, **numbers} for step in (0, 1)]
    plots.training_curves(tmp_path, lines, exits)
    shown = drawn["training"].axes[2].lines
    names = [line.get_label() for line in shown]
    assert names == [*(f"exit {e}" for e in exits), "final", "gated"]
    assert [line.get_ydata()[0] for line in shown[:11]] == [e / 20 for e in exits]
    assert len({str(line.get_color()) for line in shown}) == 13


def test_the_sheet_shows_who_leaves_where(tmp_path):
    paths = []
    for index in range(12):  # an image says its number by its colour
        paths.append(tmp_path / f"{index}.png")
        cv2.imwrite(str(paths[-1]), np.full((4, 4, 3), 20 * index, np.uint8))
    run = run_of("real")
    run.data.image_set = lambda split: {"test": SimpleNamespace(paths=paths)}[split]
    left = np.array([0, 2] * 6)
    labels, predicted = np.arange(12) % 4 // 2, np.zeros(12, int)
    judged = SimpleNamespace(real={"balanced": (predicted, left, labels)}, exits=EXITS)
    pictures, captions = _sheet(run, judged)
    found = [[int(picture[0, 0, 0]) // 20 for picture in row] for row in pictures]
    assert [set(row) for row in found] == [{0, 2, 4, 6, 8, 10}, set(), {1, 3, 5, 7, 9, 11}]
    for row, texts in zip(found, captions, strict=True):
        for number, text in zip(row, texts, strict=True):
            assert text == ("a" if labels[number] == 0 else "b\n(said a)")


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

"""Predictions in a file: the same numbers come back, a broken or hostile file is refused."""

from __future__ import annotations

import numpy as np
import pytest

from shared_core import metrics
from visiondistill_gc.utils.prediction_files import load_predictions, save_predictions


@pytest.mark.parametrize("ending", ["npz", "csv"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saved_predictions_give_the_same_metrics_to_the_bit(tmp_path, ending, dtype):
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.full(4, 0.2), 200).astype(dtype)
    labels = rng.integers(0, 4, 200)
    keys = [f'river/bild {i}, "grün" 图.jpg' for i in range(200)]
    path = tmp_path / "out" / f"predictions.{ending}"
    save_predictions(path, probs, labels, keys, class_names=["a", "b,c", "d", "é"])
    found = load_predictions(path)
    assert found.keys == tuple(keys) and found.class_names == ("a", "b,c", "d", "é")
    np.testing.assert_array_equal(found.probs, probs)
    np.testing.assert_array_equal(found.labels, labels)
    assert metrics.ece(found.probs, found.labels) == metrics.ece(probs, labels)
    assert metrics.nll(found.probs, found.labels) == metrics.nll(probs, labels)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ["npz", "csv"])
def test_predictions_without_rows(tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    save_predictions(path, np.zeros((0, 3)), np.zeros(0, int), [], class_names="abc")
    found = load_predictions(path)
    assert found.probs.shape == (0, 3) and found.class_names == ("a", "b", "c")


@pytest.mark.parametrize("ending", ["npz", "csv"])
def test_a_failed_save_leaves_the_old_file(tmp_path, ending, monkeypatch):
    path = tmp_path / f"p.{ending}"
    save_predictions(path, np.ones((1, 1)), [0], ["a"], class_names=["x"])

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_predictions(path, np.ones((2, 1)), [0, 0], ["a", "b"], class_names=["x"])
    assert len(load_predictions(path).keys) == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_broken_prediction_files_are_refused_in_one_line(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    (tmp_path / "a.npz").write_bytes(b"no zip")
    (tmp_path / "b.csv").write_text("name,0\nx,1\n")
    (tmp_path / "c.csv").write_text("key,label,a\nx,0,zero\n")
    (tmp_path / "d.csv").write_text("key,label,a\nx,7,0.5\n")
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "g.csv").write_text("")
    np.savez(tmp_path / "f.npz", probs=np.array([Hostile()], dtype=object))
    for name in ("a.npz", "b.csv", "c.csv", "d.csv", "e.txt", "f.npz", "g.csv"):
        with pytest.raises(ValueError, match=name) as caught:
            load_predictions(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(FileNotFoundError, match="no predictions"):
        load_predictions(tmp_path / "none.npz")
    for probs, labels, keys, names, message in (
        (np.ones((1, 1)), [0], [], ["x"], "0 keys"),
        (np.ones((1, 2)), [0], ["a"], ["x"], "class names"),
        (np.ones((1, 2)), [2], ["a"], ["x", "y"], "below 2"),
    ):
        with pytest.raises(ValueError, match=message):
            save_predictions(tmp_path / "x.npz", probs, labels, keys, class_names=names)
    with pytest.raises(ValueError, match="ends in"):
        save_predictions(tmp_path / "x.txt", np.ones((1, 1)), [0], ["a"], class_names=["x"])

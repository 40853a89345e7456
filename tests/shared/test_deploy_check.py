"""Two sets of answers: what counts as the same class, and when a file is refused."""

import numpy as np
import pytest

from shared_core.deploy.check import TIE, Agreement, ExportError, compare_answers
from shared_core.deploy.latency import measure_latency


def check_answers(expected, got, *, name="the file", min_same=0.999, max_distance=1e-3, **words):
    """A whole split at once, as an export goes through it batch by batch."""
    found = compare_answers(expected, got, name=name, **words)
    found.check(name=name, min_same=min_same, max_distance=max_distance)
    return found


def answers(count=2000, classes=5, seed=0):
    rows = np.random.default_rng(seed).dirichlet(np.ones(classes), count)
    return rows


def test_shares_and_distances_are_counted():
    expected = answers()
    got = expected.copy()
    got[:7] = np.roll(expected[:7], 1, axis=1)
    flipped = int((expected.argmax(1) != got.argmax(1)).sum())
    found = compare_answers(expected, got)
    assert (found.images, found.same) == (2000, 2000 - flipped)
    assert found.max_distance == pytest.approx(np.abs(got - expected).max())
    parts = [compare_answers(expected[i : i + 600], got[i : i + 600]) for i in range(0, 2000, 600)]
    assert sum(parts, Agreement()) == found
    assert found.as_dict()["same_class"] == 1 - flipped / 2000


def test_ties_have_no_order():
    expected = np.array([[0.4, 0.4, 0.2], [0.4, 0.4 - TIE / 2, 0.2], [0.4, 0.4 - 9 * TIE, 0.2]])
    got = expected[:, [1, 0, 2]] + [[-1e-9, 1e-9, 0]] * 3
    assert compare_answers(expected, got).same == 2


def test_a_file_that_answers_otherwise_is_refused_with_the_numbers():
    expected = answers()
    check_answers(expected, expected + 9e-4)
    with pytest.raises(
        ExportError, match=r"model.onnx .* largest distance .* 1.1e-03 \(expected 1e-03"
    ):
        check_answers(expected, expected + 1.1e-3, name="model.onnx")
    check_answers(expected, expected + 1.1e-3, max_distance=2e-3)
    for flips, refused in ((2, False), (3, True)):  # 0.1 % of 2,000
        got = expected.copy()
        got[:flips] = 1 - got[:flips]
        if refused:
            with pytest.raises(ExportError, match="99.85 % of 2000 images .expected 99.90 %"):
                check_answers(expected, got, max_distance=2.0)
        else:
            check_answers(expected, got, max_distance=2.0)
    few = answers(10)
    got = few.copy()
    got[:1] = 1 - got[:1]
    check_answers(few, got, max_distance=2.0)  # of a few images one may differ
    got[1:2] = 1 - got[1:2]
    with pytest.raises(ExportError, match="80.00 % of 10"):
        check_answers(few, got, max_distance=2.0)


def test_shapes_and_numbers_that_cannot_be_compared():
    expected = answers(4)
    for got, message in (
        (expected[:3], "answers of shape"),
        (expected[:, :4], "answers of shape"),
        (np.where(expected > 0.5, np.nan, expected), "not finite"),
    ):
        with pytest.raises(ExportError, match=message):
            check_answers(expected, got)
    with pytest.raises(ExportError, match="its network gives answers that are not finite"):
        check_answers(expected * np.inf, expected)
    with pytest.raises(ExportError):
        check_answers(expected[:0], expected[:0])
    with pytest.raises(ExportError, match="no image was asked"):
        Agreement().check(name="x")


def test_features_have_no_class():
    expected = answers(6)
    found = compare_answers(expected, expected[:, ::-1] * 1.0, task="embed")
    assert found.same == 6
    with pytest.raises(ExportError, match="largest distance"):
        check_answers(expected, expected[:, ::-1] * 1.0, task="embed")


def test_latency_is_an_images_and_the_models_take_turns():
    asked = []

    def burn(name, turns):
        def run(batch):
            asked.append((name, len(batch)))
            for _ in range(turns * len(batch)):
                sum(range(200))

        return run

    runs = {"quick": burn("quick", 5), "slow": burn("slow", 40)}
    found = measure_latency(runs, np.zeros((3, 2, 2, 3), np.uint8), batches=(1, 4), rounds=5)
    assert set(found) == {"quick", "slow"} and list(found["slow"]) == ["1", "4"]
    assert {size for _, size in asked} == {1, 4}  # of three images a batch of four is made
    for size in ("1", "4"):
        assert found["slow"][size]["cpu_ms"] > 3 * found["quick"][size]["cpu_ms"]
        assert found["slow"][size]["wall_ms"] > 0
    ratio = found["slow"]["4"]["cpu_ms"] / found["slow"]["1"]["cpu_ms"]
    assert 0.5 < ratio < 2  # an image's, not a batch's
    changes = sum(a[0] != b[0] for a, b in zip(asked, asked[1:], strict=False))
    assert changes >= 2 * 5 * 2 - 2

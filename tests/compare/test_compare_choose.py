"""The winner: exact bounds, paired intervals, budgets, ties, the Pareto front."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from compare.choose import at_least, choose, pack_bits, paired, pareto, unpack_bits
from compare.contract import ClassRow, Judged, Limit, Value

COUNT = 400  # calibration images


def row(name, right, *, bytes=4_000_000, ms=2.0, macs=1e8, memory=30.0, form="onnx", order=0,
        test=0.9):  # fmt: skip
    """A judged file that answers ``right`` of the calibration images, the first ones."""
    bits = np.arange(COUNT) < right
    return Judged(
        candidate=name, form=form, base=name, seed=0, project="p", title=name, order=order,
        files=("model.onnx",), input_size=(8, 8), calibration_accuracy=right / COUNT,
        accuracy=Value(test, 0, 1), difference=None, macro_f1=0.9, ece=0.01, agreement=1.0,
        bytes=bytes, memory_mb=memory, throughput=1.0, macs=macs,
        latency={"1": {"p50": ms, "p95": ms}, "16": {"p50": ms / 2, "p95": ms}},
        per_class=(ClassRow("a", 120, 0.9, 0.9, 0.9), ClassRow("b", 80, 0.9, 0.9, 0.9)),
        right=pack_bits(bits),
    )  # fmt: skip


def flipped(one, *places):
    """The same file, right where it was wrong and wrong where it was right, at these places."""
    bits = unpack_bits(one.right)
    bits[list(places)] ^= True
    return replace(one, right=pack_bits(bits), calibration_accuracy=float(bits.mean()))


BIG = row("big", 380, bytes=14_000_000, ms=3.0, macs=4e8, memory=60.0)
MIDDLE = row("middle", 377, bytes=5_000_000, ms=2.0, macs=2e8)
SMALL = row("small", 340, bytes=900_000, ms=0.5, macs=1e7, memory=12.0)
ROWS = (BIG, MIDDLE, SMALL)


@pytest.mark.parametrize(("right", "total"), [(0, 7), (1, 7), (7, 7), (93, 100), (1580, 1600)])
def test_the_promise_is_the_exact_binomial_bound(right, total):
    wanted = binomtest(right, total, alternative="greater").proportion_ci(0.95, "exact").low
    assert at_least(right, total) == pytest.approx(wanted, abs=1e-9)


def test_the_paired_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for count, gains, losses in ((40, 0.1, 0.1), (150, 0.06, 0.02), (25, 0.0, 0.0)):
        kept = 0
        for _ in range(1500):
            drawn = rng.random(count)
            first = drawn < gains + 0.5
            second = (drawn >= gains) & (drawn < 0.5 + gains + losses)
            found = paired(first, second)
            assert found.value == pytest.approx(first.mean() - second.mean())
            kept += found.low <= gains - losses <= found.high
        assert kept / 1500 > 0.935
    assert paired(first, first).low < 0 < paired(first, first).high
    second = paired(np.arange(100) < 90, np.arange(100) < 60)
    assert 0.2 < second.low < 0.3 < second.high < 0.4


def test_bits_survive_the_file():
    for count in (1, 7, 8, 9, 400):
        bits = np.random.default_rng(count).random(count) < 0.5
        assert (unpack_bits(pack_bits(bits)) == bits).all()


def test_the_front_is_what_nothing_matches_in_all_three():
    rng = np.random.default_rng(3)
    rows = [row(f"n{n}", int(rng.integers(300, 400)), bytes=int(rng.integers(1, 6)) * 10**6,
                ms=float(rng.integers(1, 5))) for n in range(40)]  # fmt: skip
    points = {one.candidate: (one.latency["1"]["p50"], one.bytes, -one.calibration_accuracy)
              for one in rows}  # fmt: skip
    front = pareto(rows, 1)
    for name, point in points.items():
        beaten = any(all(a <= b for a, b in zip(other, point, strict=True)) and other != point
                     for other in points.values())  # fmt: skip
        assert ((name, "onnx") in front) != beaten or list(points.values()).count(point) > 1
    accuracies = [-points[name][2] for name, _ in front]
    assert accuracies == sorted(accuracies, reverse=True)


def test_without_a_budget_the_smallest_within_a_point_of_the_best_wins():
    choice = choose(ROWS, ())
    assert (choice.candidate, choice.meets) == ("middle", True)  # 0.75 points below
    assert "0.9425 against 0.9500 of big float" in choice.sentence and "2 ms" in choice.sentence
    assert "the 2 of 3 files that count" in choice.sentence and "-0.8, 95 %" in choice.sentence
    assert choose(ROWS, (), within=0.005).candidate == "big"
    assert choose(ROWS, (), within=0.2).candidate == "small"
    assert choice.at_least == pytest.approx(
        binomtest(180, 200, alternative="greater").proportion_ci(0.95, "exact").low
    )


@pytest.mark.parametrize(
    ("limit", "winner"),
    [(Limit("ms", 1.0), "small"), (Limit("mb", 0.9), "small"), (Limit("macs", 1.5e8), "small"),
     (Limit("memory", 20.0), "small"), (Limit("accuracy", 0.95), "big"),
     (Limit("ms", 2.0), "middle")],
)  # fmt: skip
def test_each_wish_of_a_budget_decides(limit, winner):
    rows = [replace(MIDDLE, memory_mb=45.0), SMALL, BIG]
    choice = choose(rows, (limit,))
    assert (choice.candidate, choice.meets) == (winner, True), choice.sentence


def test_with_a_budget_a_smaller_one_wins_only_within_the_noise_and_a_point():
    budget = (Limit("mb", 100.0),)
    lost = row("lost", 372, bytes=MIDDLE.bytes)  # 8 lost, none gained: no noise
    assert paired(unpack_bits(lost.right), unpack_bits(BIG.right)).high < 0
    assert choose((BIG, lost), budget, within=0.02).candidate == "big"
    assert choose((BIG, lost), (), within=0.02).candidate == "lost"
    noisy = flipped(MIDDLE, *range(390, 400), *range(10))  # 10 gained, 10 lost, the same sum
    gap = paired(unpack_bits(noisy.right), unpack_bits(BIG.right))
    assert gap.value == -0.0075 and gap.high > 0
    assert choose((BIG, noisy, SMALL), budget).candidate == "middle"
    far = flipped(noisy, *range(20, 24))  # 1.75 points below: in the noise, but more than a point
    assert paired(unpack_bits(far.right), unpack_bits(BIG.right)).high > 0
    assert choose((BIG, far, SMALL), budget).candidate == "big"


def test_the_batch_of_the_budget_is_the_one_that_is_looked_at():
    assert choose(ROWS, (Limit("ms", 1.2),), batch=1).candidate == "small"
    assert choose(ROWS, (Limit("ms", 1.2),), batch=16).candidate == "middle"
    with pytest.raises(ValueError, match="not timed at batch 4"):
        choose(ROWS, (), batch=4)


def test_none_meets_it_the_nearest_is_named_with_its_numbers():
    choice = choose(ROWS, (Limit("ms", 1.9), Limit("accuracy", 0.94)))
    assert (choice.candidate, choice.meets) == ("middle", False)
    assert choice.missed == ("ms<=1.9: 2 ms",)
    assert choice.sentence == (
        "None of 3 files keeps to ms<=1.9 accuracy>=0.94; the nearest is middle float "
        "(ms<=1.9: 2 ms)."
    )
    unknown = [replace(one, macs=None) for one in ROWS]
    choice = choose(unknown, (Limit("macs", 1e12),))
    assert not choice.meets and "not known" in choice.sentence


def test_the_order_of_the_rows_decides_nothing_and_ties_go_to_the_simpler():
    twins = [row(name, 380, order=order, bytes=size, ms=ms)
             for name, order, size, ms in (("b", 1, 4_000_000, 1.0), ("a", 2, 3_990_000, 0.8),
                                           ("c", 0, 4_010_000, 3.0))]  # fmt: skip
    for rows in itertools.permutations([*twins, BIG]):
        assert choose(rows, ()).candidate == "c"  # sizes within 5 % are one, noise of ms is none
    less = [replace(twins[0], macs=5e7), *twins[1:]]
    assert choose(less, ()).candidate == "b"


def test_another_runtime_of_the_same_file_is_taken_only_where_it_is_clearly_faster():
    other = replace(MIDDLE, form="openvino", latency={"1": {"p50": 1.4, "p95": 2.0}})
    assert choose((MIDDLE, other), ()).form == "onnx"
    faster = replace(other, latency={"1": {"p50": 1.3, "p95": 2.0}})
    assert choose((MIDDLE, faster), ()).form == "openvino"


def test_what_no_command_of_the_core_opens_is_never_shipped():
    paddle = replace(SMALL, form="paddle", calibration_accuracy=BIG.calibration_accuracy,
                     right=BIG.right)  # fmt: skip
    choice = choose((BIG, paddle), ())
    assert (choice.candidate, choice.form) == ("big", "onnx")
    assert choice.front == (("big", "onnx"),)
    with pytest.raises(ValueError, match="can be shipped"):
        choose((paddle,), ())


def test_test_accuracy_decides_nothing():
    turned = [replace(one, accuracy=Value(1 - one.accuracy.value, 0, 1)) for one in ROWS]
    first, second = choose(ROWS, ()), choose(turned, ())
    assert replace(second, at_least=None) == replace(first, at_least=None)
    assert first.at_least != second.at_least

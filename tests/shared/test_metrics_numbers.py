"""Costs by formula, the Pareto front, seeds and prediction files."""

import math

import numpy as np
import pytest
from scipy import stats

from shared_core import metrics


def test_linear_counts_its_tokens():
    assert metrics.linear(196, 384, 1536) == metrics.LayerCost(
        "linear", 384 * 1536 + 1536, 196 * 384 * 1536
    )
    assert metrics.linear(1, 3, 5, bias=False).params == 15


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((7, 9), 3, {"padding": 1}),
        ((8, 8), (3, 2), {"stride": 2}),
        ((9, 7), 3, {"stride": (2, 1), "padding": (0, 2), "dilation": 2}),
        ((6, 6), 3, {"groups": 4}),
    ],
)
def test_conv2d_counts_what_a_loop_multiplies(size, kernel, options):
    inputs, outputs, groups = 4, 8, options.get("groups", 1)
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel

    def pair(name, default):
        value = options.get(name, default)
        return (value, value) if isinstance(value, int) else value

    (sh, sw), (ph, pw), (dh, dw) = pair("stride", 1), pair("padding", 0), pair("dilation", 1)
    positions = 0  # every place the kernel fits on the padded map
    for top in range(0, size[0] + 2 * ph, sh):
        for left in range(0, size[1] + 2 * pw, sw):
            fits_down = top + dh * (kh - 1) < size[0] + 2 * ph
            positions += fits_down and left + dw * (kw - 1) < size[1] + 2 * pw
    cost = metrics.conv2d(size, inputs, outputs, kernel, **options)
    assert cost.macs == positions * outputs * (inputs // groups) * kh * kw
    assert cost.params == outputs * (inputs // groups) * kh * kw + outputs


def test_attention_is_two_products_and_four_projections():
    n, d = 50, 64
    cost = metrics.attention(n, d)
    projections = [metrics.linear(n, d, d) for _ in range(4)]
    assert cost.params == metrics.total_params(projections)
    assert cost.macs == metrics.total_macs(projections) + 2 * n * n * d
    cross = metrics.attention(5, d, keys=7, bias=False)
    assert cross.macs == (5 + 7 + 7 + 5) * d * d + 2 * 5 * 7 * d
    assert cross.params == 4 * d * d
    assert metrics.attention(n, d, projections=False) == metrics.LayerCost(
        "attention", 0, 2 * n * n * d
    )


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (37, 37), (16, 16), (5, 4), (1, 1)])
def test_fft_costs_follow_the_stated_formula(grid):
    n, half = grid[0] * grid[1], grid[0] * (grid[1] // 2 + 1)
    assert metrics.rfft2(grid, 3).macs == n * 3 * math.ceil(math.log2(n))
    assert metrics.irfft2(grid, 3).macs == half * 3 * math.ceil(math.log2(half))


# Published multiply-adds of GFNet at 224 px, in units of 1e9, and counts without FFT and norm
# taken from an independent counter of PyTorch (it reports two operations each).
GFNETS = {
    "gfnet-ti": (256, 12, 7_511_784, 1.285, 2_543_833_088),
    "gfnet-xs": (384, 12, 15_985_768, 2.853, 5_665_437_696),
    "gfnet-s": (384, 19, 24_869_608, 4.483, 8_902_391_808),
    "gfnet-b": (512, 19, 43_120_616, 7.930, 15_774_752_768),
}


@pytest.mark.parametrize("name", GFNETS)
def test_the_formulas_give_gfnets_published_costs(name):
    dim, depth, params, giga, counted = GFNETS[name]
    grid, tokens = (14, 14), 196
    costs = [
        metrics.conv2d((224, 224), 3, dim, 16, stride=16),
        metrics.layernorm(tokens, dim),
        metrics.linear(1, dim, 1000),
        metrics.LayerCost("positions", tokens * dim),
    ]
    dense = [costs[0], costs[2]]
    for _ in range(depth):
        products = [metrics.linear(tokens, dim, 4 * dim), metrics.linear(tokens, 4 * dim, dim)]
        dense += products
        costs += products + [metrics.layernorm(tokens, dim)] * 2
        costs += [metrics.rfft2(grid, dim), metrics.irfft2(grid, dim)]
        costs.append(metrics.LayerCost("filter", 2 * 14 * 8 * dim))
    assert metrics.total_params(costs) == params
    assert metrics.total_macs(costs, elementwise=True) / 1e9 == pytest.approx(giga, rel=5e-4)
    assert metrics.flops(metrics.total_macs(dense)) == counted


def test_layernorm_is_elementwise_and_only_added_on_request():
    cost = metrics.layernorm(10, 4)
    assert (cost.params, cost.macs, cost.elementwise) == (8, 0, 200)
    assert metrics.total_macs([cost]) == 0
    assert metrics.total_macs([cost], elementwise=True) == 200
    assert metrics.layernorm(10, 4, affine=False).params == 0


def test_exit_costs_accumulate_and_give_the_expected_cost():
    costs = metrics.exit_costs([10, 20, 30], [1, 2, 3])
    np.testing.assert_array_equal(costs, [11, 33, 66])
    assert metrics.expected_cost(costs.tolist(), [0.5, 0.25, 0.25]) == 5.5 + 8.25 + 16.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.linear(0, 1, 1), "tokens"),
        (lambda: metrics.conv2d((4, 4), 3, 4, 3, groups=2), "groups"),
        (lambda: metrics.conv2d((2, 2), 1, 1, 3), "smaller"),
        (lambda: metrics.rfft2((0, 4), 1), "points"),
        (lambda: metrics.LayerCost("x", -1), "negative"),
        (lambda: metrics.exit_costs([1], [1, 2]), "segments"),
        (lambda: metrics.expected_cost([1, 2], [0.5, 0.6]), "exit rates"),
        (lambda: metrics.pareto_front([1], [1, 2]), "shapes"),
        (lambda: metrics.pareto_front([np.nan], [1]), "NaN"),
        (lambda: metrics.summarize([]), "runs"),
        (lambda: metrics.summarize([np.nan]), "NaN"),
        (lambda: metrics.paired_difference([1], [1]), "at least 2"),
        (lambda: metrics.paired_difference([1, 2], [1, 2, 3]), "same seeds"),
        (lambda: metrics.paired_difference([1, 2], [1, 2], confidence=1), "confidence"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    points = [tuple(p) for p in rng.integers(0, 12, (40, 2)).tolist()]  # many equal ones
    expected = set()
    for cost, value in points:
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points):
            expected.add((cost, value))
    front = metrics.pareto_front([p[0] for p in points], [p[1] for p in points])
    found = [points[i] for i in front]
    assert found == sorted(expected) and len(set(found)) == len(found)
    assert all(points.index(points[i]) == i for i in front)  # the first of equal points


def test_pareto_front_of_nothing_is_empty():
    assert metrics.pareto_front([], []).tolist() == []


def test_summary_and_paired_difference_equal_scipy():
    rng = np.random.default_rng(0)
    a = rng.normal(0.9, 0.02, 8)
    b = a - 0.01 + rng.normal(0, 0.01, 8)
    got = metrics.summarize(a)
    assert (got.mean, got.std, got.n) == (
        pytest.approx(np.mean(a)),
        pytest.approx(stats.tstd(a)),
        8,
    )
    assert metrics.summarize([0.5]) == metrics.Summary(0.5, None, 1)
    difference = metrics.paired_difference(a, b, confidence=0.9)
    interval = stats.ttest_rel(a, b).confidence_interval(0.9)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.mean == pytest.approx(np.mean(a - b)) and difference.n == 8
    assert difference.std == pytest.approx(stats.tstd(a - b))
    assert difference.wins == sum(x > y for x, y in zip(a, b, strict=True))

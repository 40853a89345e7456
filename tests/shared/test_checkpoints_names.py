"""Weights under torch's and Paddle's names: a table by hand, and there and back bit for bit."""

import numpy as np
import pytest

from shared_core.checkpoints import CheckpointError, names


def torch_weights():
    rng = np.random.default_rng(1)

    def real(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "conv.weight": real(4, 3, 3, 3),
        "bn.weight": real(4),
        "bn.bias": real(4),
        "bn.running_mean": real(4),
        "bn.running_var": real(4) ** 2,
        "bn.num_batches_tracked": np.array(17, dtype=np.int64),
        "embed.weight": real(9, 4),
        "fc.weight": real(5, 4),
        "fc.bias": real(5),
    }


def test_hand_table():
    weights = torch_weights()
    linear = names.linear_names(weights, not_linear=["embed.weight"])
    assert linear == ["fc.weight"]
    got = names.to_paddle(weights, linear)
    assert list(got) == [
        "conv.weight",
        "bn.weight",
        "bn.bias",
        "bn._mean",
        "bn._variance",
        "embed.weight",
        "fc.weight",
        "fc.bias",
    ]
    assert got["fc.weight"].shape == (4, 5)
    assert np.array_equal(got["fc.weight"], weights["fc.weight"].T)
    assert got["fc.weight"].flags["C_CONTIGUOUS"]
    assert got["embed.weight"].shape == (9, 4)
    assert np.array_equal(got["bn._variance"], weights["bn.running_var"])


def test_there_and_back_is_bit_identical_and_in_order():
    weights = torch_weights()
    linear = names.linear_names(weights, not_linear=["embed.weight"])
    tracked = names.counters(weights)
    assert tracked == {"bn.num_batches_tracked": 17}
    back = names.to_torch(names.to_paddle(weights, linear), linear, tracked=tracked)
    assert list(back) == list(weights)
    for name, array in weights.items():
        assert back[name].dtype == array.dtype
        assert back[name].tobytes() == array.tobytes(), name


def test_without_counters_torch_starts_at_zero():
    back = names.to_torch(names.to_paddle(torch_weights(), []), [])
    assert back["bn.num_batches_tracked"] == 0


def test_a_top_level_layer_has_no_prefix():
    paddle = names.to_paddle({"running_mean": np.zeros(2), "weight": np.zeros((2, 3))}, ["weight"])
    assert {name: a.shape for name, a in paddle.items()} == {"_mean": (2,), "weight": (3, 2)}


@pytest.mark.parametrize("change", [names.to_paddle, names.to_torch])
def test_errors(change):
    with pytest.raises(CheckpointError, match="linear weight gone is not among the weights"):
        change({"w": np.zeros((2, 2))}, ["gone"])
    with pytest.raises(CheckpointError, match=r"linear weight w has shape \(2,\)"):
        change({"w": np.zeros(2)}, ["w"])


def test_fused_attention_and_unknown_embedding():
    with pytest.raises(CheckpointError, match="in_proj_weight: torch's fused attention"):
        names.to_paddle({"attn.in_proj_weight": np.zeros((6, 2))}, [])
    with pytest.raises(CheckpointError, match="no weight is called 'gone'"):
        names.linear_names({}, not_linear=["gone"])


def test_unbiased_variance_is_the_sample_variance():
    values = np.random.default_rng(0).normal(size=(36, 5))
    got = names.unbiased_variance(values.var(axis=0), count=36)
    np.testing.assert_allclose(got, values.var(axis=0, ddof=1), rtol=1e-12)
    with pytest.raises(ValueError, match="count is 1"):
        names.unbiased_variance(np.ones(2), count=1)

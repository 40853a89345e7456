"""Gate features against scipy and sorting, and the gates themselves."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from gfnet_dynn.models.gates import (
    IdentityGate,
    UncertaintyGate,
    entropy_from_logits,
    make_gate,
    uncertainty,
)


@pytest.mark.parametrize("classes", [2, 10, 45])
@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_features_against_scipy_and_sorting(classes, scale):
    logits = np.random.default_rng(0).normal(size=(50, classes)) * scale
    p = softmax(logits, axis=1)
    ranked = np.sort(p, axis=1)[:, ::-1]
    truth = np.stack(
        [
            ranked[:, 0],
            entropy(p, axis=1),
            ranked[:, 0] - ranked[:, 1],
            entropy(p**2, axis=1),  # scipy normalises
        ],
        axis=1,
    )
    assert np.allclose(uncertainty(torch.tensor(logits)).numpy(), truth, atol=1e-10)
    single = uncertainty(torch.tensor(logits, dtype=torch.float32)).numpy()
    assert np.allclose(single, truth, atol=2e-5)


def test_power_entropy_is_the_entropy_at_twice_the_logits():
    logits = torch.randn(20, 7, dtype=torch.float64)
    assert torch.allclose(uncertainty(logits)[:, 3], entropy_from_logits(2 * logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e4, 3e38])
def test_finite_for_any_logits(dtype, size):
    size = min(size, torch.finfo(dtype).max)
    rows = torch.tensor([[1, -1, 0], [1, 1, -1], [-1, -1, -1], [0, 0, 0]]).to(dtype) * size
    features = uncertainty(rows)
    assert features.isfinite().all()
    expected = [
        [1, 0, 1, 0],
        [0.5, math.log(2), 0, math.log(2)],
        [1 / 3, math.log(3), 0, math.log(3)],
        [1 / 3, math.log(3), 0, math.log(3)],
    ]
    assert torch.allclose(features.double(), torch.tensor(expected).double(), atol=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 10, 45, 128, 129])
def test_one_row_alone_has_the_features_it_has_in_a_batch(classes):
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(1)) * 5
    logits[0], logits[1, 0] = 0, 3e38
    logits[2, classes // 2 :] = -3e38
    together = uncertainty(logits)
    for grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with grad():
            alone = torch.cat([uncertainty(row[None]) for row in logits])
        assert alone.dtype == torch.float32 and alone.isfinite().all()
        assert torch.allclose(alone, together, atol=2e-6), (alone - together).abs().max()
    with torch.no_grad():
        lost = uncertainty(torch.full((1, classes), float("nan")))
        half = uncertainty(logits[3:4].bfloat16())
    assert lost.isnan().any()
    assert torch.allclose(half, uncertainty(logits[3:4].bfloat16()), atol=2e-6)


def test_one_class_and_no_rows():
    assert uncertainty(torch.randn(3, 1)).tolist() == [[1, 0, 1, 0]] * 3
    assert uncertainty(torch.zeros(0, 5)).shape == (0, 4)


def test_features_are_detached_and_the_gate_is_logistic_regression_on_them():
    torch.manual_seed(0)
    gate = UncertaintyGate()
    assert sum(p.numel() for p in gate.parameters()) == 5
    logits = torch.randn(6, 4, requires_grad=True)
    out = gate(logits)
    truth = uncertainty(logits).numpy() @ gate.linear.weight.detach().numpy()[0]
    assert out.shape == (6,)
    assert np.allclose(out.detach().numpy(), truth + gate.linear.bias.item(), atol=1e-6)
    out.sum().backward()
    assert logits.grad is None and gate.linear.weight.grad.abs().sum() > 0


def test_nothing_leaves_the_device():
    # On the meta device there are no values: anything that needs one on the host raises.
    gate = UncertaintyGate().to("meta")
    assert gate(torch.randn(5, 7, device="meta")).device.type == "meta"


def test_kinds_and_initial_values():
    gate = make_gate("unc", num_gates=4)
    p = torch.sigmoid(gate(torch.randn(8, 5)))
    assert torch.allclose(p, torch.tensor(0.2))  # each of 4 exits and the head owns a fifth
    torch.manual_seed(3)
    expected = torch.nn.Linear(4, 1).weight
    torch.manual_seed(3)
    assert torch.equal(make_gate("unc", num_gates=4, init="torch").linear.weight, expected)
    identity = make_gate("identity", num_gates=4)
    assert isinstance(identity, IdentityGate) and not list(identity.parameters())
    logits = torch.randn(8, 5)
    expected = torch.softmax(logits, 1).amax(1)
    assert torch.allclose(torch.sigmoid(identity(logits)), expected, atol=1e-6)
    assert identity(torch.tensor([[1e4, -1e4]])).isfinite().all()
    with pytest.raises(ValueError, match="got 'mlp', expected one of"):
        make_gate("mlp", num_gates=4)
    with pytest.raises(ValueError, match="got 'zero', expected one of"):
        make_gate("unc", num_gates=4, init="zero")

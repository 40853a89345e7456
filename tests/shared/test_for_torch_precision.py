"""Precision: one code path, equal to the loop one would write by hand."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from shared_core.for_torch import precision as precision_module  # noqa: E402
from shared_core.for_torch.precision import Precision, Step, computes_bf16  # noqa: E402


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(4, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x, y = (torch.randn(8, n, generator=generator) for n in (4, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), x, y


def test_fp32_is_the_plain_loop():
    model, optimizer, x, y = problem()
    twin, twin_optimizer, _, _ = problem()
    precision = Precision("cpu")
    for _ in range(3):
        with precision.autocast():
            loss = (model(x) - y).square().mean()
        step = precision.backward_step(loss, optimizer)
        assert step == Step(stepped=True, grad_norm=None)
        (twin(x) - y).square().mean().backward()
        twin_optimizer.step()
        twin_optimizer.zero_grad()
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_clipping_sees_unscaled_gradients(dtype):
    """Gradient by hand for a linear least-squares step, clipped to norm 0.5."""
    model, optimizer, x, y = problem()
    w, b = (p.detach().double().numpy().copy() for p in model.parameters())
    precision = Precision("cpu", dtype, init_scale=1024.0)
    loss = (model(x) - y).square().mean()  # outside autocast: only scale and clip are looked at
    step = precision.backward_step(loss, optimizer, clip=0.5)
    xs, ys = x.double().numpy(), y.double().numpy()
    error = 2 * (xs @ w.T + b - ys) / ys.size
    grad_w, grad_b = error.T @ xs, error.sum(axis=0)
    norm = np.sqrt((grad_w**2).sum() + (grad_b**2).sum())
    assert norm > 0.5
    assert step.grad_norm == pytest.approx(norm, rel=1e-5)
    np.testing.assert_allclose(
        model.weight.detach(), w - 0.1 * 0.5 / norm * grad_w, rtol=1e-5, atol=1e-6
    )
    assert model.weight.grad is None


def test_bf16_computes_in_bf16_and_disabled_does_not():
    model, optimizer, x, y = problem()
    with Precision("cpu", "bf16").autocast():
        assert model(x).dtype == torch.bfloat16
    with Precision("cpu", "fp16").autocast():
        assert model(x).dtype == torch.float16
    off = Precision("cpu", "fp16", enabled=False)
    with off.autocast():
        assert model(x).dtype == torch.float32
    assert off.dtype == "fp32"
    assert off.scaler.get_scale() == 1.0


def test_fp16_skips_a_step_with_infinite_gradients_and_counts_it():
    model, optimizer, x, y = problem()
    before = model.weight.detach().clone()
    precision = Precision("cpu", "fp16", init_scale=64.0, growth_interval=2)
    bad = precision.backward_step((model(x) * float("inf")).sum(), optimizer, clip=1.0)
    assert not bad.stepped
    assert torch.equal(model.weight, before)
    assert (precision.skipped_steps, precision.scaler.get_scale()) == (1, 32.0)
    for expected in (32.0, 64.0):  # doubles after two good steps
        good = precision.backward_step((model(x) - y).square().mean(), optimizer)
        assert good.stepped
        assert precision.scaler.get_scale() == expected
    assert precision.skipped_steps == 1
    assert not torch.equal(model.weight, before)


def test_gathered_gradients_equal_one_large_batch():
    model, optimizer, x, y = problem()
    twin, twin_optimizer, _, _ = problem()
    precision = Precision("cpu")
    halves = zip(x.chunk(2), y.chunk(2), strict=True)
    for number, (a, b) in enumerate(halves):
        step = precision.backward_step(
            (model(a) - b).square().mean() / 2, optimizer, update=number == 1
        )
        assert step.stepped == (number == 1)
    precision.backward_step((twin(x) - y).square().mean(), twin_optimizer)
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-6, atol=1e-7)


def test_state_goes_on_exactly():
    model, optimizer, x, y = problem()
    first = Precision("cpu", "fp16", init_scale=64.0, growth_interval=3)
    first.backward_step((model(x) * float("inf")).sum(), optimizer)
    first.backward_step((model(x) - y).square().mean(), optimizer)
    second = Precision("cpu", "fp16", growth_interval=3)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    for precision in (first, second):
        for _ in range(2):
            precision.backward_step((model(x) - y).square().mean(), optimizer)
        assert precision.scaler.get_scale() == 64.0


def test_errors():
    with pytest.raises(ValueError, match="precision is 'fp8', expected one of fp32, bf16, fp16"):
        Precision("cpu", "fp8")
    with pytest.raises(ValueError, match="stored precision is 'fp32', expected 'fp16'"):
        Precision("cpu", "fp16").load_state_dict(Precision("cpu").state_dict())
    model, optimizer, x, _ = problem()
    with pytest.raises(ValueError, match="clip is 0, expected more than 0"):
        Precision("cpu").backward_step(model(x).sum(), optimizer, clip=0)


@pytest.mark.parametrize(
    ("features", "native"),
    [(["avx2"], False), (["avx512f"], False), (["avx512_bf16"], True), (["amx_bf16"], True)],
)
def test_bf16_is_native_where_the_processor_says_so(monkeypatch, features, native):
    monkeypatch.setattr(precision_module, "environment", lambda: {"cpu_features": features})
    assert computes_bf16(torch.device("cpu")) == native

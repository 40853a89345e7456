"""The global filter against float64 DFT sums, circular convolution, and its own other forms."""

import numpy as np
import pytest
import torch

from gfnet_dynn.models.global_filter import (
    DftTables,
    GlobalFilter,
    choose_form,
    largest_prime_factor,
)

FORMS = ("fft", "dft", "dft-dense")
GRIDS = [(4, 4), (5, 5), (8, 8), (16, 16), (37, 37), (4, 7), (7, 4), (1, 6), (6, 1), (1, 1), (2, 3)]


def forms_for(grid):
    return [f for f in FORMS if f != "dft-dense" or grid[0] * grid[1] <= 300]


def make(grid, channels=3, *, form="fft", seed=0, dtype=torch.float32):
    layer = GlobalFilter(channels, grid, form=form).to(dtype)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        layer.complex_weight.copy_(torch.tensor(rng.normal(size=layer.complex_weight.shape)))
    return layer


def tokens(grid, channels=3, *, n=2, seed=1):
    return np.random.default_rng(seed).normal(size=(n, grid[0] * grid[1], channels))


def by_dft_sums(x, weight, grid):
    """Full complex DFT by explicit matrices; the missing half by Hermitian symmetry."""
    h, w = grid
    k = weight[..., 0] + 1j * weight[..., 1]  # (h, w', C)
    full = np.zeros((h, w, k.shape[2]), complex)
    for a in range(h):
        for b in range(w):
            mirror = k[-a % h, -b % w].conj() if -b % w <= w // 2 else None
            if b <= w // 2:
                # A column that is its own mirror acts by its Hermitian part only.
                full[a, b] = (k[a, b] + mirror) / 2 if -b % w == b else k[a, b]
            else:
                full[a, b] = mirror
    rows = np.exp(-2j * np.pi * np.outer(np.arange(h), np.arange(h)) / h)
    cols = np.exp(-2j * np.pi * np.outer(np.arange(w), np.arange(w)) / w)
    image = x.reshape(-1, h, w, x.shape[2])
    spectrum = np.einsum("fa,kb,nabc->nfkc", rows, cols, image) * full
    out = np.einsum("fa,kb,nfkc->nabc", rows.conj(), cols.conj(), spectrum) / (h * w)
    assert abs(out.imag).max() < 1e-9
    return out.real.reshape(x.shape)


def by_circular_convolution(x, weight, grid):
    h, w = grid
    kernel = np.fft.irfft2(weight[..., 0] + 1j * weight[..., 1], s=grid, axes=(0, 1))
    image = x.reshape(-1, h, w, x.shape[2])
    out = np.zeros_like(image)
    for a in range(h):
        for b in range(w):
            out += kernel[a, b] * np.roll(image, (a, b), axis=(1, 2))
    return out.reshape(x.shape)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_form_is_the_dft_product_and_the_circular_convolution(grid):
    x = tokens(grid)
    for form in forms_for(grid):
        layer = make(grid, form=form)
        weight = layer.complex_weight.detach().double().numpy()
        truth = by_dft_sums(x, weight, grid)
        assert np.allclose(truth, by_circular_convolution(x, weight, grid), atol=1e-9)
        with torch.no_grad():
            got = layer(torch.tensor(x, dtype=torch.float32)).numpy()
        assert abs(got - truth).max() < 1e-5 * abs(truth).max(), form
        with torch.no_grad():  # float64 all the way: the tables too
            exact = layer.double()(torch.tensor(x)).numpy()
        assert abs(exact - truth).max() < 1e-12 * max(abs(truth).max(), 1), form


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (8, 8), (16, 16), (37, 37)])
def test_forms_agree_in_output_and_both_gradients(grid):
    x = torch.tensor(tokens(grid), dtype=torch.float32)
    toward = torch.tensor(tokens(grid, seed=2), dtype=torch.float32)
    results = {}
    for form in [*forms_for(grid), "auto"]:
        layer = make(grid, form=form)
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.backward(toward)
        results[form] = (out.detach(), leaf.grad, layer.complex_weight.grad)
    for form, values in results.items():
        for value, reference in zip(values, results["fft"], strict=True):
            assert (value - reference).abs().max() < 1e-5 * reference.abs().max(), form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_gradients_in_float64(grid, form):
    layer = make(grid, channels=2, form=form, dtype=torch.float64)
    x = torch.tensor(tokens(grid, 2), requires_grad=True)

    def run(x, weight):
        return torch.func.functional_call(layer, {"complex_weight": weight}, x)

    assert torch.autograd.gradcheck(run, (x, layer.complex_weight))


@pytest.mark.parametrize("form", FORMS)
def test_linear_shift_equivariant_and_identity(form):
    grid = (5, 8)
    layer = make(grid, form=form, dtype=torch.float64)
    x, y = torch.tensor(tokens(grid)), torch.tensor(tokens(grid, seed=3))
    with torch.no_grad():
        assert torch.allclose(layer(2 * x - 3 * y), 2 * layer(x) - 3 * layer(y), atol=1e-12)

        def shift(z):
            return torch.roll(z.view(2, *grid, 3), (2, 3), dims=(1, 2)).reshape(z.shape)

        assert torch.allclose(layer(shift(x)), shift(layer(x)), atol=1e-12)
        layer.complex_weight[..., 0], layer.complex_weight[..., 1] = 1, 0
        assert torch.allclose(layer(x), x, atol=1e-12)


def test_no_grad_and_grad_paths_give_the_same_numbers():
    x = torch.tensor(tokens((6, 8)), dtype=torch.float32)
    layer = make((6, 8), form="dft")
    with torch.no_grad():
        quiet = layer(x)
    assert torch.allclose(quiet, layer(x).detach(), atol=1e-6)


def test_auto_is_the_table_and_says_so():
    assert choose_form((4, 4), "cpu") == "dft-dense"
    assert [choose_form((n, n), "cpu") for n in (8, 14, 16, 20, 37, 40, 61)] == ["dft"] * 7
    assert choose_form((64, 64), "cpu") == "fft"
    assert choose_form((8, 8), "cuda") == "fft"
    layer = make((16, 16), form="auto")
    assert layer.chosen == "dft" and "chosen=dft" in repr(layer)
    layer.set_form("fft")
    assert layer.chosen == "fft"
    assert [largest_prime_factor(n) for n in (1, 2, 12, 37, 49, 74)] == [1, 2, 3, 37, 7, 37]


def test_state_dict_has_the_parameter_only_and_tables_can_be_shared():
    tables = DftTables((8, 8))
    layers = [GlobalFilter(3, (8, 8), form="dft", tables=tables) for _ in range(2)]
    assert list(layers[0].state_dict()) == ["complex_weight"]
    assert layers[0].complex_weight.shape == (8, 5, 3, 2)
    assert layers[0].tables.row is layers[1].tables.row
    assert 0.015 < GlobalFilter(64, (16, 16)).complex_weight.std().item() < 0.025


def test_half_precision_and_autocast_still_compute_in_float32():
    x = torch.tensor(tokens((8, 8)), dtype=torch.float32)
    for form in ("fft", "dft"):
        layer = make((8, 8), form=form)
        with torch.no_grad():
            plain = layer(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(layer(x), plain)
            half = layer(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half.float(), plain, atol=0.02 * plain.abs().max().item())


def test_channels_last_does_not_break_the_parameter():
    x = torch.tensor(tokens((8, 8)), dtype=torch.float32)
    layer = make((8, 8), form="fft")
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer.to(memory_format=torch.channels_last)(x), before)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="got 'fht', expected one of"):
        GlobalFilter(3, (8, 8), form="fht")
    with pytest.raises(ValueError, match="37x37 tokens"):
        GlobalFilter(3, (37, 37), form="dft-dense")
    with pytest.raises(ValueError, match="expected >= 1"):
        GlobalFilter(3, (0, 8))
    with pytest.raises(ValueError, match=r"expected \(N, 64, C\)"):
        GlobalFilter(3, (8, 8))(torch.zeros(2, 49, 3))

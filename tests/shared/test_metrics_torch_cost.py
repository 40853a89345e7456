"""Measured parameters and MACs against PyTorch's own counter and the formulas."""

import pytest

from shared_core import metrics

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from shared_core.for_torch.cost import count_params, layer_costs  # noqa: E402


def _counted(model, *inputs):
    """PyTorch's counter, two operations a MAC. Grad mode keeps it off the fused kernels."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "px"), [("resnet18", 64), ("vit_b_16", 32), ("swin_t", 64)])
def test_equals_pytorchs_counter_on_torchvision_nets(name, px):
    torchvision = pytest.importorskip("torchvision")
    options = {"image_size": px} if name == "vit_b_16" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=6, **options).eval()
        images = torch.empty(2, 3, px, px)
    costs = layer_costs(model, images)
    assert metrics.total_macs(costs) == _counted(model, images) > 0
    assert metrics.total_params(costs) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_fused_encoder_layer_hides_nothing(training):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).train(training)
    costs = layer_costs(layer, torch.zeros(1, 10, 16))
    parts = [
        metrics.attention(10, 16),
        metrics.linear(10, 16, 32),
        metrics.linear(10, 32, 16),
    ]
    assert metrics.total_macs(costs) == metrics.total_macs(parts)
    assert layer.training is training and layer.self_attn.training is training
    assert torch.backends.mha.get_fastpath_enabled()


class Everything(nn.Module):
    """A layer of each kind that the formulas know."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 12, bias=False)
        self.batch_norm = nn.BatchNorm1d(12)
        self.shared = self.fc

    def forward(self, x):  # (N, 4, 8, 8)
        x = self.up(self.conv(x)).flatten(2).transpose(1, 2)  # (N, 64, 6)
        return self.shared(self.norm(x)).mean(1)


def test_each_layer_costs_what_its_formula_says():
    model = Everything()
    costs = {cost.name: cost for cost in layer_costs(model, torch.zeros(3, 4, 8, 8))}
    conv = metrics.conv2d((8, 8), 4, 8, 3, stride=2, padding=1, groups=2)
    assert (costs["conv"].params, costs["conv"].macs) == (conv.params, 3 * conv.macs)
    assert costs["up"].macs == 3 * 16 * 8 * 6 * 4 and costs["up"].params == 8 * 6 * 4 + 6
    assert costs["fc"].macs == 3 * metrics.linear(64, 6, 12).macs
    assert costs["fc"].params == 72  # a shared module appears once
    assert costs["norm"].elementwise == 3 * metrics.layernorm(64, 6).elementwise
    assert costs["norm"].macs == 0
    assert costs["batch_norm"] == metrics.LayerCost("batch_norm", 24)


class Functional(nn.Module):
    """Products that no submodule owns."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 7))

    def forward(self, x):  # (N, L, 7)
        y = F.linear(x, self.weight)  # (N, L, 5)
        z = torch.einsum("nld,nmd->nlm", y, y)
        return F.scaled_dot_product_attention(y, y, x) + 0 * z.sum()


def test_functional_calls_belong_to_the_module_that_makes_them():
    model = nn.Sequential(nn.Identity(), Functional())
    (cost,) = layer_costs(model, torch.zeros(2, 9, 7))
    expected = 2 * (9 * 5 * 7 + 9 * 9 * 5 + 9 * 9 * 5 + 9 * 9 * 7)
    assert cost == metrics.LayerCost("1", 35, expected)


class Filter(nn.Module):
    def forward(self, x):  # (N, h, w, C)
        spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho")


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (14, 14)])
def test_ffts_cost_what_the_formula_says(grid):
    (cost,) = layer_costs(Filter(), torch.zeros(2, *grid, 3))
    assert cost.name == "(model)"
    assert cost.macs == 2 * (metrics.rfft2(grid, 3).macs + metrics.irfft2(grid, 3).macs)


class Dense(nn.Module):
    """A filter written as a matrix product: counted by the formula that is handed in."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x)


class Special(Dense):
    pass


def test_a_formula_for_a_class_replaces_what_is_inside():
    model = nn.Sequential(nn.Linear(6, 6), Special())
    x = torch.zeros(4, 6)
    plain = layer_costs(model, x)
    assert [c.macs for c in plain] == [144, 144]
    calls = []

    def formula(module, inputs, output):
        calls.append((type(module), inputs[0].shape, output.shape))
        return 7

    costs = layer_costs(model, x, formulas={Dense: formula})  # also for its subclass
    assert {c.name: c.macs for c in costs} == {"0": 144, "1": 7, "1.inner": 0}
    assert metrics.total_params(costs) == 84
    assert calls == [(Special, x.shape, x.shape)]
    nearest = layer_costs(model, x, formulas={Dense: formula, Special: lambda *_: 1})
    assert {c.name: c.macs for c in nearest}["1"] == 1


def _state(model):
    return {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for name, m in model.named_modules()
    }


def test_hooks_and_modes_are_put_back_even_after_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval(), nn.Linear(4, 4)).train()
    model[1].eval()
    before, buffers = _state(model), [b.clone() for b in model.buffers()]
    with pytest.raises(RuntimeError):
        layer_costs(model, torch.zeros(2, 3))  # the last layer wants 4
    assert _state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    layer_costs(model[:2], torch.ones(2, 3))
    assert _state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_the_users_own_hooks_stay():
    model, seen = nn.Linear(2, 2), []
    model.register_forward_hook(lambda *_: seen.append(1))
    layer_costs(model, torch.zeros(1, 2))
    model(torch.zeros(1, 2))
    assert len(seen) == 2


def test_count_params_leaves_out_buffers_and_frozen_ones():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    model[0].requires_grad_(False)
    assert count_params(model) == 30
    assert count_params(model, trainable=True) == 10


class Vectors(nn.Module):
    def forward(self, a, b, m):  # (5,), (5,), (3, 5)
        batch = m.expand(2, 3, 5)
        out = torch.baddbmm(torch.zeros(2, 3, 3), batch, batch.transpose(1, 2))
        return torch.dot(a, b) + (m @ a).sum() + torch.addmv(torch.zeros(3), m, b).sum() + out


def test_products_with_vectors_are_counted():
    (cost,) = layer_costs(Vectors(), torch.ones(5), torch.ones(5), torch.ones(3, 5))
    assert cost.macs == 2 * 3 * 3 * 5 + 5 + 15 + 15

"""The network with exits: sizes, the full pass, gradients, configuration."""

import pytest
import torch

from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn


def small(exits=(0, 2), depth=5, **options):
    torch.manual_seed(0)
    backbone = GFNet(img_size=32, patch_size=8, num_classes=3, embed_dim=8, depth=depth)
    return GFNetDynn(backbone, exits, **options)


@pytest.mark.parametrize(
    "pixels, classes, params",
    [
        (256, 21, 15_959_165),
        (256, 45, 16_005_365),
        (128, 10, 14_905_798),
        (256, 38, 15_991_890),
        (600, 30, 21_555_626),
    ],
)
def test_published_parameter_counts(pixels, classes, params):
    with torch.device("meta"):
        model = GFNetDynn(build_gfnet("gfnet-xs", img_size=pixels, num_classes=classes))
    assert sum(p.numel() for p in model.parameters()) == params
    assert model.exits == (3, 5, 7, 9)


def test_full_pass_is_norm_mean_head_after_each_exit():
    model = small().eval()
    x = torch.randn(4, 3, 32, 32)
    logits, gate_logits = model(x)
    backbone, z = model.backbone, None
    z = backbone.patch_embed(x) + backbone.pos_embed
    expected = []
    for i, block in enumerate(backbone.blocks):
        z = block(z)
        if i in (0, 2):
            expected.append(model.exit_heads[(0, 2).index(i)](backbone.norm(z).mean(1)))
    expected.append(backbone(x))
    assert len(logits) == 3 and gate_logits.shape == (4, 2)
    for got, truth in zip(logits, expected, strict=True):
        assert torch.allclose(got, truth, atol=1e-6)
    for i, gate in enumerate(model.gates):
        assert torch.equal(gate_logits[:, i], gate(logits[i]))


def test_features_and_classify_are_the_two_halves_of_forward():
    model = small()
    x = torch.randn(4, 3, 32, 32)
    features = model.exit_features(x)
    assert [tuple(f.shape) for f in features] == [(4, 8)] * 3
    again, whole = model.classify(features), model(x)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, whole.logits, strict=True))
    assert torch.equal(again.gate_logits, whole.gate_logits)


def test_gate_losses_reach_gates_only_and_head_losses_their_head():
    model = small(gate_init="torch")
    out = model(torch.randn(4, 3, 32, 32))
    out.gate_logits.sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {f"gates.{i}.linear.{part}" for i in (0, 1) for part in ("weight", "bias")}
    model.zero_grad()
    model.backbone.requires_grad_(False)
    out = model(torch.randn(4, 3, 32, 32))
    out.logits[1].sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"exit_heads.1.weight", "exit_heads.1.bias"}


def test_names_and_initial_values():
    model = small()
    own = [n for n in model.state_dict() if not n.startswith("backbone.")]
    assert own == [
        "exit_heads.0.weight",
        "exit_heads.0.bias",
        "exit_heads.1.weight",
        "exit_heads.1.bias",
        "gates.0.linear.weight",
        "gates.0.linear.bias",
        "gates.1.linear.weight",
        "gates.1.linear.bias",
    ]
    wide = GFNetDynn(GFNet(img_size=16, num_classes=50, embed_dim=100, depth=2), (0,))
    assert wide.exit_heads[0].weight.abs().max() <= 0.1  # 1 / sqrt(fan in)
    assert wide.exit_heads[0].weight.std() > 0.05  # uniform, not the backbone's 0.02 normal


@pytest.mark.parametrize("exits", [(), (0,), (3,), (0, 1, 2, 3)])
def test_any_list_of_exits(exits):
    model = small(exits)
    logits, gate_logits = model(torch.randn(2, 3, 32, 32))
    assert len(logits) == len(exits) + 1 and gate_logits.shape == (2, len(exits))
    assert len(model.exit_costs()) == len(exits) + 1
    assert (model.exit_costs()[1:] > model.exit_costs()[:-1]).all()


@pytest.mark.parametrize("exits", [(2, 0), (1, 1), (4,), (5,), (-1, 2)])
def test_bad_exits_are_refused(exits):
    with pytest.raises(ValueError, match="expected rising block indices from 0 to 3"):
        small(exits)


def test_config_rebuilds():
    model = small((1, 3), gate="identity")
    again = GFNetDynn.from_config(model.config())
    again.load_state_dict(model.state_dict())
    assert again.config() == model.config() and again.exits == (1, 3)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x).gate_logits, model(x).gate_logits)


def test_pyramids_are_refused():
    pyramid = build_gfnet("gfnet-h-ti", img_size=32, num_classes=3, embed_dim=(8,), depth=(3,))
    with pytest.raises(ValueError, match="got a GFNetPyramid, expected a GFNet"):
        GFNetDynn(pyramid, (0,))

"""Class activation maps: the papers' formulas by hand in float64, default layers, pictures."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from shared_core.for_torch.data import Normalizer
from shared_core.runs import UsageError
from torch_cls_zoo.explain.cam import METHODS, class_maps, normalized
from torch_cls_zoo.explain.cam_layers import Layout, default_layer, layout_of, to_maps
from torch_cls_zoo.explain.overlays import METHOD_NAMES, explain, overlay, visualise
from torch_cls_zoo.models import build_model


class Tiny(nn.Module):
    """Maps, a bent path from them to two logits: so that gradients differ from place to place."""

    def __init__(self, *, linear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.maps = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU())
        self.fc = nn.Linear(4, 2)
        self.linear = linear
        self.mix = torch.randn(4, 5, 5, dtype=torch.float64)

    def forward(self, x):
        a = self.maps(x)
        pooled = a.mean((2, 3)) if self.linear else (a * self.mix + a.square()).mean((2, 3))
        return self.fc(pooled)


def _numpy_maps(net: Tiny, image: np.ndarray, label: int) -> dict[str, np.ndarray]:
    """Feature maps, their gradient by differences, and the formulas as loops over maps."""
    with torch.no_grad():
        a = net.maps(torch.from_numpy(image)[None])[0].numpy()
    w = net.fc.weight.detach().numpy()
    mix = net.mix.numpy()

    def logit(maps: np.ndarray) -> float:
        inner = maps if net.linear else maps * mix + maps**2
        return float(w[label] @ inner.mean((1, 2)) + net.fc.bias.detach().numpy()[label])

    g = np.zeros_like(a)
    for place in np.ndindex(a.shape):
        step = np.zeros_like(a)
        step[place] = 1e-5
        g[place] = (logit(a + step) - logit(a - step)) / 2e-5
    cam = np.zeros(a.shape[1:])
    grad_cam, grad_cam_pp = cam.copy(), cam.copy()
    for k in range(len(a)):
        cam += w[label, k] * a[k]
        grad_cam += g[k].mean() * a[k]
        weight = 0.0
        for i, j in np.ndindex(a[k].shape):
            below = 2 * g[k, i, j] ** 2 + a[k].sum() * g[k, i, j] ** 3
            share = g[k, i, j] ** 2 / below if below else 0.0
            weight += share * max(g[k, i, j], 0.0)
        grad_cam_pp += weight * a[k]
    found = {"cam": cam, "grad-cam": grad_cam, "grad-cam++": grad_cam_pp}
    return {name: np.maximum(value, 0) for name, value in found.items()}


@pytest.mark.parametrize("linear", [False, True])
def test_maps_are_those_of_the_formulas(linear) -> None:
    net = Tiny(linear=linear).double()
    images = np.random.default_rng(0).normal(0, 1, (3, 3, 5, 5))
    methods = METHODS if linear else METHODS[1:]
    classes = [[0, 1], [1, 0], [1, 1]]
    maps, logits = class_maps(net, torch.from_numpy(images), classes, layer="maps", methods=methods)
    assert logits.shape == (3, 2)
    for i, wanted in enumerate(classes):
        for m, label in enumerate(wanted):
            expected = _numpy_maps(net, images[i], label)
            for name in methods:
                np.testing.assert_allclose(
                    maps[name][i, m].numpy(), expected[name], rtol=1e-6, atol=1e-8
                )


def test_cam_is_refused_where_it_is_not_defined() -> None:
    net = Tiny().double()
    with pytest.raises(ValueError, match="use grad-cam"):
        class_maps(net, torch.randn(1, 3, 5, 5).double(), [[0]], layer="maps", methods=["cam"])


LAYERS = {
    "resnet18": "layer4", "mobilenet_v2": "features", "efficientnet_b0": "features",
    "resnest50_fast_1s1x64d": "layer4", "densenet121": "features", "shufflenet_v2_x0_5": "conv5",
    "mnasnet0_5": "layers", "googlenet": "inception5b", "swin_t": "permute", "resnetv2_50": "norm",
    "pvt_v2_b0": "stages",
}  # fmt: skip


@pytest.mark.parametrize("arch", LAYERS)
def test_cam_is_grad_cam_times_the_places(arch) -> None:
    torch.manual_seed(0)
    net = build_model(arch, num_classes=3, image_size=(64, 64)).model
    images = torch.randn(2, 3, 64, 64)
    layer = default_layer(net, images[:1], 3)
    assert layer == LAYERS[arch]
    modes = [module.training for module in net.modules()]
    maps, logits = class_maps(net, images, [[0, 2], [1, 2]], layer=layer)
    assert modes == [module.training for module in net.modules()]
    assert not any(module._forward_hooks for module in net.modules())
    height, width = maps["cam"].shape[2:]
    torch.testing.assert_close(maps["cam"], maps["grad-cam"] * height * width, rtol=1e-4, atol=1e-5)
    assert torch.allclose(logits, net.eval()(images), atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "layer", "size"),
    [
        ("vit_tiny_patch16_224", "blocks.11.norm1", (96, 64)),
        ("deit_tiny_distilled_patch16_224", "blocks.11.norm1", (64, 64)),
        ("timm/swin_tiny_patch4_window7_224", "norm", (64, 64)),
        ("mobilenetv3_small", "features", (64, 96)),
        ("squeezenet1_1", "classifier.0", (64, 64)),
        ("convnext_tiny", "features", (64, 64)),
    ],
)
def test_transformers_and_nets_without_cam_have_a_layer(arch, layer, size) -> None:
    torch.manual_seed(0)
    net = build_model(arch, num_classes=3, image_size=size).model
    for name, p in net.named_parameters():  # some heads start at 0
        if name.startswith(("head", "classifier")) and name.endswith("weight"):
            nn.init.normal_(p, std=0.1)
    images = torch.randn(1, 3, *size)
    assert default_layer(net, images, 3) == layer
    maps, _ = class_maps(net, images, [[0, 1, 2]], layer=layer, methods=["grad-cam", "grad-cam++"])
    assert maps["grad-cam"].shape[:2] == (1, 3) and min(maps["grad-cam"].shape[2:]) > 1
    assert all(float(found.max()) > 0 for found in maps.values())


def test_the_map_is_where_the_evidence_is() -> None:
    """A network that can only see red says that the red corner is why."""
    net = nn.Sequential()
    net.add_module("seen", nn.Conv2d(3, 2, 1, bias=False))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("fc", nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net.seen.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None])
        net.fc.weight.copy_(torch.eye(2))
    image = torch.zeros(1, 3, 8, 8)
    image[0, 0, :2, 6:] = 1.0  # red, top right
    image[0, 1, 6:, :2] = 1.0  # green, bottom left
    maps, _ = class_maps(net, image, [[0, 1]], layer="seen")
    for found in maps.values():
        red, green = normalized(found)[0]
        assert torch.equal(red.bool(), image[0, 0].bool())
        assert torch.equal(green.bool(), image[0, 1].bool())


def test_layouts() -> None:
    grid = torch.arange(24.0).reshape(1, 4, 6)
    tokens = torch.cat([torch.full((1, 2, 1), -1.0), grid.reshape(1, 24, 1)], dim=1)
    found = layout_of(tokens, (64, 96), 1)
    assert found == Layout("tokens", (4, 6), 2)
    assert torch.equal(to_maps(tokens, found)[0], grid)
    last = torch.randn(2, 7, 7, 5)
    assert layout_of(last, (56, 56), 5) == Layout("nhwc", (7, 7))
    assert torch.equal(to_maps(last, Layout("nhwc", (7, 7)))[:, 2], last[..., 2])
    assert layout_of(torch.zeros(1, 5, 7, 7), (56, 56), 5) == Layout("nchw", (7, 7))
    for odd, size in (((2, 5), (96, 64)), ((1, 3, 25, 64), (96, 64)), ((1, 23, 7), (96, 96))):
        with pytest.raises(ValueError, match="expected maps"):
            layout_of(torch.zeros(odd), size, 7)


@pytest.mark.parametrize(
    ("layer", "message"),
    [("layer5", "close: layer4"), ("", "expected a module"), ("fc", "expected maps")],
)
def test_a_wrong_layer_is_one_line(layer, message) -> None:
    net = build_model("resnet18", num_classes=3).model
    with pytest.raises(ValueError, match=message):
        class_maps(net, torch.zeros(1, 3, 32, 32), [[0]], layer=layer, methods=["grad-cam"])


def test_an_empty_map_stays_empty_and_others_fill_the_range() -> None:
    maps = torch.stack([torch.zeros(2, 2), torch.tensor([[0.0, 2.0], [4.0, 1.0]])])
    assert normalized(maps).tolist() == [[[0, 0], [0, 0]], [[0, 0.5], [1, 0.25]]]


def test_overlay_leaves_pixels_without_evidence_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    heat = np.zeros((6, 6))
    heat[0, 0] = 1.0
    drawn = overlay(image, heat)
    changed = (drawn != image).any(axis=2)
    assert changed[0, 0] and changed.sum() == 1


def test_the_true_class_is_always_explained() -> None:
    net = Tiny(linear=True).float()
    net.fc = nn.Linear(4, 5)
    images = np.zeros((2, 5, 5, 3), np.uint8)
    inputs = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        worst = net(inputs).argmin(1).tolist()
    found = explain(
        net, images, inputs, names=["a", "b"], labels=worst, layer="maps", methods=["cam"], top=2
    )
    for one, label in zip(found, worst, strict=True):
        assert label in one.classes and len(set(one.classes)) == 2
        assert one.maps["cam"].shape == (2, 5, 5)


def test_pictures_and_sheet_are_written(tmp_path) -> None:
    torch.manual_seed(0)
    net = build_model("mobilenetv3_small", num_classes=3).model  # has no CAM
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 48, 3)).astype(np.uint8)
    batches = [(images[:2], [0, None], ["a/x.jpg", "b/x.jpg"]), (images[2:], [2], ["a/x.png"])]
    facts = visualise(
        net, batches, tmp_path / "out", class_names=["one", "two", "three"],
        normalise=Normalizer(), method="all",
    )  # fmt: skip
    assert facts["methods"] == ["grad-cam", "grad-cam++"] and "CAM left out" in facts["notes"][0]
    assert facts["images"] == 3
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["a_x.png", "a_x_2.png", "b_x.png", "contact_sheet.png"]
    sheet = cv2.imread(str(tmp_path / "out" / "contact_sheet.png"))
    single = cv2.imread(str(tmp_path / "out" / "a_x.png"))
    assert sheet.shape[0] > 2 * single.shape[0] and sheet.std() > 10


def test_method_names() -> None:
    assert METHOD_NAMES["grad-camm++"] == ("grad-cam++",)  # as the first README prints it
    with pytest.raises(UsageError, match="--visual_method 'heat'"):
        visualise(nn.Identity(), [], "x", class_names="ab", normalise=Normalizer(), method="heat")

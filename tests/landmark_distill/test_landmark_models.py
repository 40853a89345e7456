"""The five networks by name: counts, shapes, the shared head, weights that must fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from landmark_distill.head.cosine_head import CosineMarginHead
from landmark_distill.model import (
    MODELS,
    build_model,
    load_weights,
    parameter_counts,
    share_head,
)

# Without head, at 384 pixels. The first three are the published ones.
COUNTS = {
    "Swin_base": 86_878_584,
    "Swin_tiny": 48_899_740,
    "Resnet12": 32_137_856,
    "Resnet50": 55_387_456,
    "Resnet20": 338_384,
}
CLASSES = 252_903


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = build_model(name, num_classes=CLASSES)
    assert parameter_counts(model.encoder) == {"trainable": COUNTS[name], "all": COUNTS[name]}
    assert tuple(model.head.weight.shape) == (CLASSES, 1024)
    assert parameter_counts(model.head)["all"] == 258_972_672


def test_all_choices_are_here():
    assert set(MODELS) == {"Swin_base", "Swin_tiny", "Resnet20", "Resnet12", "Resnet50"}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (45, 70)])
def test_any_image_size_gives_features_and_logits(name, size):
    torch.manual_seed(0)
    model = build_model(name, num_classes=7, feature_dim=64, image_size=32)
    labels = torch.tensor([6, 0])
    images = torch.randn(2, 3, *size)
    features, logits = model(images, labels)
    assert features.shape == (2, 64) and logits.shape == (2, 7)
    logits.square().sum().backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lost
    model.eval()
    with torch.no_grad():
        alone = model.embed(images[:1])
        torch.testing.assert_close(model.embed(images)[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COUNTS)
def test_channels_last_and_whole_depth_change_no_number(name):
    torch.manual_seed(0)
    model = build_model(name, feature_dim=64, image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.embed(images)
        model.to(memory_format=torch.channels_last)
        found = model.embed(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_have_1024_numbers():
    model = build_model("Resnet12", num_classes=3).eval()
    with torch.no_grad():
        features, logits = model(torch.randn(1, 3, 32, 32))
    assert features.shape == (1, 1024) and logits.shape == (1, 3)


def test_logits_can_be_left_out():
    model = build_model("Resnet20", num_classes=3, feature_dim=64)
    assert model(torch.randn(2, 3, 16, 16), logits=False)[1] is None
    assert build_model("Resnet20", feature_dim=64)(torch.randn(2, 3, 16, 16))[1] is None


def test_margin_is_for_training_only():
    torch.manual_seed(0)
    model = build_model("Resnet20", num_classes=5, feature_dim=64).eval()
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 4, 0])
    with torch.no_grad():
        plain = model(images)[1]
        assert torch.equal(model(images, labels)[1], plain)
        model.head.train()
        lowered = plain - model(images, labels)[1]
    expected = 3.2 * nn.functional.one_hot(labels, 5)
    torch.testing.assert_close(lowered, expected, rtol=1e-4, atol=1e-5)


def test_shared_head_is_one_frozen_weight():
    torch.manual_seed(0)
    teacher = build_model("Swin_base", num_classes=9, feature_dim=64, image_size=32, scale=20.0)
    student = build_model("Resnet12", num_classes=4, feature_dim=64)
    teacher.eval()
    share_head(student, teacher)
    assert student.head.weight is teacher.head.weight
    assert student.head.scale == 20 and student.head.num_classes == 9
    assert not student.head.weight.requires_grad
    assert student.head.training and not teacher.head.training  # margin here, none there
    before = teacher.head.weight.clone()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        _, logits = student(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 8]))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 8])).backward()
        optimizer.step()
    assert torch.equal(teacher.head.weight, before) and student.head.weight.grad is None
    trainable = parameter_counts(student)["trainable"]
    assert trainable == parameter_counts(student.encoder)["all"]


def test_share_head_refuses_what_does_not_fit():
    student = build_model("Resnet20", feature_dim=64)
    with pytest.raises(ValueError, match="no head"):
        share_head(student, build_model("Resnet20", feature_dim=64))
    with pytest.raises(ValueError, match="takes 32 features, the student makes 64"):
        share_head(student, CosineMarginHead(5, 32))


def test_teacher_answers_alike_while_the_student_trains():
    torch.manual_seed(0)
    teacher = build_model("Swin_base", num_classes=5, feature_dim=64, image_size=32, drop_path=0.9)
    teacher.eval().requires_grad_(False)
    student = build_model("Resnet20", feature_dim=64)
    share_head(student, teacher)
    student.train()
    images = torch.randn(2, 3, 32, 32)
    first, second = teacher(images, torch.tensor([0, 1]))[1], teacher(images)[1]
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("resnet12", {}, "backbone is 'resnet12', expected one of Swin_base"),
        ("Resnet12", {"drop_path": 0.1}, "Resnet12 has no option 'drop_path'"),
        ("Resnet50", {"width": 3}, "expected one of: none"),
        ("Swin_tiny", {"feature_dim": 100}, "feature_dim is 100"),
        ("Resnet20", {"num_classes": 0}, "head is 0 x 1024"),
        ("Resnet20", {"num_classes": 5, "scale": 0}, "scale is 0"),
        ("Resnet20", {"num_classes": 5, "margin": 1}, "margin is 1"),
    ],
)
def test_bad_choices_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        build_model(name, **options)


def test_options_that_are_none_leave_the_default():
    assert build_model("Resnet12", feature_dim=16, drop_block=None).encoder.layer4.drop.block == 5


@pytest.mark.parametrize("shape", [(2, 3, 31, 40), (2, 1, 32, 32), (3, 32, 32)])
def test_bad_images_are_named(shape):
    with pytest.raises(ValueError, match="expected \\(N, 3, H, W\\) with at least 32 pixels"):
        build_model("Resnet12", feature_dim=16).embed(torch.randn(shape))


class TestLoadWeights:
    """Files of parallel wrappers and of the published code fit; what does not is named."""

    def model(self, seed: int):
        torch.manual_seed(seed)
        return build_model("Swin_tiny", num_classes=3, feature_dim=128, image_size=32)

    @pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder."])
    def test_prefixes(self, prefix):
        one, two = self.model(0), self.model(1)
        state = {prefix + name: value for name, value in one.encoder.state_dict().items()}
        load_weights(two.encoder, state)
        ours = two.encoder.state_dict()
        assert all(torch.equal(ours[n], value) for n, value in one.encoder.state_dict().items())

    def test_published_layout(self):
        """``encoder.module.``, the head inside the encoder, buffers that can be worked out."""
        one, two = self.model(0), self.model(1)
        state = {f"encoder.module.{n}": v for n, v in one.encoder.state_dict().items()}
        state["encoder.module.head.weight"] = one.head.weight.detach()
        state["encoder.module.layers.0.blocks.1.attn_mask"] = torch.zeros(3)
        state["encoder.module.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(3)
        load_weights(two, state)
        assert torch.equal(two.head.weight, one.head.weight)
        assert torch.equal(two.encoder.norm.bias, one.encoder.norm.bias)
        three = self.model(2)
        load_weights(three.encoder, state)
        assert torch.equal(three.encoder.norm.weight, one.encoder.norm.weight)

    def test_nothing_changes_when_something_does_not_fit(self):
        one, two = self.model(0), self.model(1)
        state = one.state_dict()
        del state["encoder.norm.bias"]
        state["encoder.nrom.bias"] = torch.zeros(1)
        state["head.weight"] = torch.zeros(4, 128)
        before = {name: value.clone() for name, value in two.state_dict().items()}
        with pytest.raises(ValueError) as error:
            load_weights(two, state, source="file.pth")
        text = str(error.value)
        assert text.startswith("file.pth do not fit: encoder.norm.bias is missing")
        assert "encoder.nrom.bias is not known" in text and "\n" not in text
        assert "head.weight has shape (4, 128), expected (3, 128)" in text
        assert all(torch.equal(before[name], value) for name, value in two.state_dict().items())

"""The networks: counts of the original, what is frozen stays frozen, any teacher by name."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from visiondistill_gc.models.student_model import BLOCKS, build_student, count_parameters
from visiondistill_gc.models.teacher_model import build_teacher, freeze, teach, teacher_names


def small(**more):
    return build_student(num_classes=3, scale=0.1, hidden=8, **more)


def test_counts_of_the_original():
    net = build_student(num_classes=4)
    assert count_parameters(net) == {"trainable": 2_999_236, "total": 3_541_764, "state": 3_577_924}
    frozen = sum(int(p.size) for p in net.frozen_parameters())
    assert frozen == 558_656  # batch-norm statistics among them
    names = list(net.state_dict())
    assert len(names) == 268 and names[0] == "features.0.0.weight"
    assert net.state_dict()["classifier.2.weight"].shape == [1280, 1024]
    assert net.state_dict()["classifier.6.weight"].shape == [1024, 4]


def test_teacher_count():
    assert count_parameters(build_teacher(num_classes=4))["state"] == 23_569_348


@pytest.mark.parametrize("frozen", [0, 1, 14, BLOCKS])
def test_trainable_count_by_depth(frozen):
    net = small(frozen=frozen)
    by_hand = 0
    for name, value in net.state_dict().items():
        parts = name.split(".")
        below = parts[0] == "features" and int(parts[1]) < frozen
        if not below and parts[-1] not in ("_mean", "_variance"):
            by_hand += int(value.size)
    assert count_parameters(net)["trainable"] == by_hand


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_frozen_blocks_after_steps(freeze_bn):
    paddle.seed(0)
    net = small(frozen=3, freeze_bn=freeze_bn, dropout=0.0)
    before = {k: v.numpy().copy() for k, v in net.state_dict().items()}
    learned = [p for p in net.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.Adam(1e-2, parameters=learned)
    net.train()
    for _ in range(2):
        loss = net(paddle.randn([4, 3, 32, 32])).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
    after = {k: v.numpy() for k, v in net.state_dict().items()}
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    below = {k for k in before if k.startswith(("features.0.", "features.1.", "features.2."))}
    statistics = {k for k in below if k.endswith(("_mean", "_variance"))}
    assert changed & below == (set() if freeze_bn else statistics)
    assert {k for k in before if k.startswith(("features.3.", "classifier."))} <= changed | {
        "classifier.2.bias"  # batch norm follows: its gradient is zero but for rounding
    }


def test_train_and_eval_modes():
    net = small(frozen=2)
    net.train()
    assert not net.features[1].training and net.features[2].training and net.training
    net.eval()
    assert not any(layer.training for layer in net.sublayers())


def test_two_in_one_process_have_the_same_names():
    first, second = small(), small()
    names = [[p.name for p in net.parameters()] for net in (first, second)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_classes": 2, "frozen": 20}, "0 to 19"),
        ({"num_classes": 2, "head": "big"}, "improved, plain"),
        ({"num_classes": 2, "dropout": 1.0}, "dropout is 1.0"),
        ({"num_classes": 2, "scale": 0}, "scale is 0"),
        ({"num_classes": 2, "source": "elsewhere"}, "paddle.vision, paddleclas"),
    ],
)
def test_bad_student(words, said):
    with pytest.raises(ValueError, match=said):
        build_student(**words)


def test_plain_head():
    net = small(head="plain")
    assert net(paddle.randn([2, 3, 32, 32])).shape == [2, 3]
    assert net.state_dict()["classifier.3.weight"].shape == [1280, 3]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_other_teachers(name):
    net = freeze(build_teacher(name, num_classes=3))
    images = paddle.randn([2, 3, 64, 64])
    first, second = teach(net, images), teach(net, images)
    assert first.shape == [2, 3] and np.array_equal(first.numpy(), second.numpy())
    assert first.stop_gradient and all(p.stop_gradient for p in net.parameters())


def test_googlenet_gives_its_main_answer():
    net = freeze(build_teacher("googlenet", num_classes=3))
    images = paddle.randn([1, 3, 224, 224])
    assert np.array_equal(teach(net, images).numpy(), net.net(images)[0].numpy())


def test_unknown_teacher():
    assert {"resnet50", "vgg16", "densenet121"} <= set(teacher_names())
    assert not {"lenet", "ResNet"} & set(teacher_names())
    with pytest.raises(ValueError, match="resnet50"):
        build_teacher("resnet5", num_classes=2)


def test_without_paddleclas(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "paddleclas", None)
    with pytest.raises(ImportError, match=r"visiondistill_gc\[paddleclas\]"):
        build_teacher("ResNet50", num_classes=4, source="paddleclas")
    with pytest.raises(ValueError, match="expected head plain"):
        build_student(num_classes=4, source="paddleclas")

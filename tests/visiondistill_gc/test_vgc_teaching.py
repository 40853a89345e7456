"""Teachers: Paddle Inference says what dygraph says, stored answers are found, mixed, refused."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from shared_core.datasets.views.mixing import Mix
from shared_core.knowledge import KnowledgeError, KnowledgeStore
from shared_core.metrics import softmax
from visiondistill_gc.models.teacher_model import build_teacher, freeze, teach
from visiondistill_gc.utils.teaching import (
    LiveTeacher,
    StoredTeacher,
    check_same,
    with_random_head,
)

CLASSES = ["a", "b", "c"]
KEYS = [f"{n:032x}" for n in range(4)]
EVAL, TRAIN = {"view": "eval", "size": [32, 32]}, {"view": "garbage", "seed": 3}
LOGITS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def live(tmp_path, engine):
    paddle.seed(1)
    net = build_teacher("shufflenet_v2_x0_25", num_classes=3)
    return LiveTeacher(net, engine=engine, folder=tmp_path, input_size=32)


def test_engines_agree(tmp_path):
    teachers = [live(tmp_path, engine) for engine in ("dygraph", "inference")]
    for size in (3, 5):
        images = paddle.randn([size, 3, 32, 32])
        a, b = (t(images, keys=[], view=0, mix=None).numpy() for t in teachers)
        assert a.shape == (size, 3) and np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    assert live(tmp_path, "auto").engine == "inference"  # on a CPU


def test_other_answers_are_refused(tmp_path):
    teacher = live(tmp_path, "inference")
    with_random_head(teacher.net, seed=0)  # dygraph is no longer what was exported
    with pytest.raises(ValueError, match="--teacher-engine dygraph"):
        teacher(paddle.randn([2, 3, 32, 32]), keys=[], view=0, mix=None)
    with pytest.raises(ValueError, match="differs"):
        check_same(np.array([1.0, np.nan]), np.array([1.0, 2.0]))


def test_unknown_engine(tmp_path):
    with pytest.raises(ValueError, match="auto, dygraph, inference"):
        live(tmp_path, "tensorrt")


def store(folder, *, view=EVAL, kind="logits", values=LOGITS, views=1, classes=CLASSES):
    words = {"teacher_hash": "f" * 64, "classes": classes, "view": view, "dtype": "float32"}
    with KnowledgeStore.create(folder, kind=kind, **words) as made:
        for number in range(views):
            made.put(KEYS, number, values + number)
    return folder


def reader(folder, temperature=4.0):
    return StoredTeacher(folder, classes=CLASSES, train_view=TRAIN, temperature=temperature)


@pytest.mark.parametrize("view", [EVAL, {"view": "letterbox", "size": [64, 64]}])
def test_one_answer_an_image(tmp_path, view):
    """Whatever its teacher saw: larger images, another frame."""
    teacher = reader(store(tmp_path / "s", view=view))
    assert teacher.views is None
    order = [KEYS[2], KEYS[0]]
    for epoch in (0, 7):
        found = teacher(None, keys=order, view=epoch, mix=None).numpy()
        assert np.array_equal(found, LOGITS[[2, 0]])


def test_views_replay(tmp_path):
    teacher = reader(store(tmp_path / "s", view=TRAIN, views=2))
    assert teacher.views == 2
    assert np.array_equal(teacher(None, keys=KEYS, view=1, mix=None).numpy(), LOGITS + 1)


def test_mixed_answers_at_the_temperature(tmp_path):
    teacher = reader(store(tmp_path / "s"), temperature=2.5)
    mix = Mix(0.3, np.array([1, 0, 3, 2]))
    found = softmax(teacher(None, keys=KEYS, view=0, mix=mix).numpy() / 2.5)
    soft = softmax(LOGITS / 2.5)
    assert found == pytest.approx(0.3 * soft + 0.7 * soft[[1, 0, 3, 2]], abs=1e-6)


def test_probabilities(tmp_path):
    teacher = reader(store(tmp_path / "s", kind="probs", values=softmax(LOGITS)))
    found = teacher(None, keys=KEYS, view=0, mix=None).numpy()
    assert softmax(found) == pytest.approx(softmax(LOGITS), abs=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"view": {"view": "flips"}, "views": 2}, "its teacher saw 2 views"),
        ({"classes": ["b", "a", "c"]}, "classes"),
        ({"kind": "features"}, "expected logits or probs"),
        ({"views": 0}, "holds no outputs"),
    ],
)
def test_other_stores_are_refused(tmp_path, words, said):
    with pytest.raises(KnowledgeError, match=said):
        reader(store(tmp_path / "s", **words))


def test_missing_sample_is_named(tmp_path):
    with pytest.raises(KnowledgeError, match="e" * 32):
        reader(store(tmp_path / "s"))(None, keys=["e" * 32], view=0, mix=None)


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="no knowledge store"):
        reader(tmp_path / "none")


def test_random_head_changes_the_head_only():
    net = freeze(build_teacher("resnet18", num_classes=3))
    before = {k: v.numpy().copy() for k, v in net.state_dict().items()}
    images = paddle.randn([1, 3, 32, 32])
    answer = teach(net, images).numpy()
    assert with_random_head(net, seed=4) == "fc"
    after = {k: v.numpy() for k, v in net.state_dict().items()}
    assert {k for k in before if not np.array_equal(before[k], after[k])} == {
        "fc.weight",
        "fc.bias",
    }
    assert np.abs(after["fc.weight"]).max() <= 1 / np.sqrt(512)
    assert not np.array_equal(answer, teach(net, images).numpy())

"""The loop: what the teacher sees, mixed labels, early stop, the best epoch, EMA, weights given."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from shared_core.checkpoints import CheckpointError, names, neutral
from shared_core.checkpoints.facts import make_facts
from shared_core.datasets import BatchLoader, EpochOrder, ImageSet
from shared_core.datasets.views.mixing import Mix
from shared_core.for_paddle.data import Normalizer
from shared_core.for_paddle.distributed import World
from shared_core.for_paddle.ema import Ema
from shared_core.for_paddle.mixing import one_hot
from shared_core.for_paddle.precision import Precision
from shared_core.for_paddle.pretrained import start_weights
from shared_core.runs import StageLog, read_metrics
from visiondistill_gc.models.student_model import build_student
from visiondistill_gc.options import TrainingOptions
from visiondistill_gc.utils import train_utils
from visiondistill_gc.utils.loss import DistillationLoss
from visiondistill_gc.utils.model_files import fill_body
from visiondistill_gc.utils.train_utils import Plan, Training, draw_mix, fit, train_step
from visiondistill_gc.utils.transforms import GarbageView
from visiondistill_gc.utils.visual_log import VisualLog, precision_recall_points

WORLD = World(0, 1, "cpu")


class Linear(paddle.nn.Layer):
    """A network of one matrix that keeps what it was shown."""

    def __init__(self, classes=3, pixels=4):
        super().__init__()
        self.body = paddle.nn.Linear(3 * pixels * pixels, classes)
        self.shown = []

    def forward(self, images):
        self.shown.append(images.numpy())
        return self.body(images.flatten(1))


class Spy:
    """A teacher that keeps what it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, images, *, keys, view, mix):
        self.shown.append((images.numpy(), list(keys), view, mix))
        return paddle.ones([images.shape[0], 3])


def step(net, teacher, mix, images, labels, alpha=0.5):
    optimizer = paddle.optimizer.SGD(0.1, parameters=net.parameters())
    return train_step(
        net,
        images,
        one_hot(labels, num_classes=3),
        optimizer=optimizer,
        loss=DistillationLoss(alpha=alpha),
        precision=Precision("cpu"),
        teacher=teacher,
        keys=["k"],
        view=5,
        mix=mix,
    )


def test_teacher_and_student_see_the_same_mixed_images():
    net, spy = Linear(), Spy()
    images, labels = paddle.randn([4, 3, 4, 4]), paddle.to_tensor([0, 1, 2, 0])
    mix = Mix(0.25, np.array([1, 0, 3, 2]))
    _, _, targets = step(net, spy, mix, images, labels)
    pixels = images.numpy()
    mixed = 0.25 * pixels + 0.75 * pixels[[1, 0, 3, 2]]
    assert spy.shown[0][0] == pytest.approx(mixed, abs=1e-6)
    assert np.array_equal(spy.shown[0][0], net.shown[0])
    assert spy.shown[0][1:] == (["k"], 5, mix)
    expected = 0.25 * np.eye(3)[[0, 1, 2, 0]] + 0.75 * np.eye(3)[[1, 0, 0, 2]]
    assert targets.numpy() == pytest.approx(expected)


def test_weight_one_is_no_mixup():
    found = []
    images, labels = paddle.randn([4, 3, 4, 4]), paddle.to_tensor([0, 1, 2, 0])
    for mix in (None, Mix(1.0, np.array([3, 2, 1, 0]))):
        paddle.seed(0)
        net = Linear()
        losses, _, _ = step(net, Spy(), mix, images, labels)
        found.append((losses, net.body.weight.numpy()))
    assert found[0][0] == found[1][0] and np.array_equal(found[0][1], found[1][1])


def test_when_batches_are_mixed():
    plan = Plan(TrainingOptions(mixup=0.2, mixup_start=5), seed=3)
    assert draw_mix(plan, epoch=4, batch=0, size=8) is None
    mix = draw_mix(plan, epoch=5, batch=1, size=8)
    again = draw_mix(plan, epoch=5, batch=1, size=8)
    assert mix.lam == again.lam and np.array_equal(mix.permutation, again.permutation)
    lams = [draw_mix(plan, epoch=5, batch=n, size=2).lam for n in range(3000)]
    assert np.mean(lams) == pytest.approx(0.5, abs=0.03)
    assert np.var(lams) == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.01)  # of Beta(0.2, 0.2)
    assert draw_mix(Plan(TrainingOptions(mixup=0.0)), epoch=8, batch=0, size=8) is None


def training(folder, *, found, plan, net=None):
    """A training whose validation answers what ``found`` lists, and the network."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 4, 4, 3)).astype(np.uint8)
    images = ImageSet(None, np.arange(16) % 3, [f"{n:032x}" for n in range(16)], source=pixels)
    order = EpochOrder(16, seed=1)
    view = GarbageView(4, padding=0)
    loader = BatchLoader(images, view=view, batch_size=8, order=order, threads=0)
    paddle.seed(0)
    net = net or Linear()
    answers = iter(found)
    return net, Training(
        stage="s",
        net=net,
        optimizer=paddle.optimizer.Adam(0.01, parameters=net.parameters()),
        loss=DistillationLoss(alpha=1.0),
        teacher=None,
        images=images,
        loader=loader,
        validate=lambda trained: {"loss": 0.0, "acc": next(answers)},
        num_classes=3,
        normalizer=Normalizer(),
        precision=Precision("cpu"),
        plan=plan,
        log=StageLog(folder),
        world=WORLD,
        visual=VisualLog(None),
    )


def test_stops_after_exactly_the_patience_and_keeps_the_best(tmp_path):
    plan = Plan(TrainingOptions(epochs=20, lr=0.01, warmup_epochs=1, patience=3, mixup=0.0))
    found = [0.2, 0.5, 0.5, 0.4, 0.5, 0.9]
    kept, weights = {}, []
    net, job = training(tmp_path, found=found, plan=plan)
    validate = job.validate

    def remember(trained):
        weights.append({k: v.numpy().copy() for k, v in trained.state_dict().items()})
        return validate(trained)

    job.validate = remember
    best, _ = fit(job)
    lines = [x for x in read_metrics(tmp_path / "metrics.jsonl") if x["split"] == "val"]
    assert [x["acc"] for x in lines] == found[:5]  # an equal epoch is no better one
    assert (best.epoch, best.accuracy) == (1, 0.5)
    kept = {k: v.numpy() for k, v in net.state_dict().items()}
    assert all(np.array_equal(kept[k], weights[1][k]) for k in kept)


def test_last_epoch_is_kept_when_nothing_is_chosen(tmp_path):
    plan = Plan(TrainingOptions(epochs=3, lr=0.01, warmup_epochs=0, patience=0), keep="last")
    best, _ = fit(training(tmp_path, found=[0.9, 0.2, 0.1], plan=plan)[1])
    assert (best.epoch, best.accuracy) == (2, 0.1)


def test_what_a_step_is_given(tmp_path, monkeypatch):
    """Smoothed targets of its own images, their keys, the limit of the gradient, the mixture."""
    how = TrainingOptions(
        epochs=2, lr=0.01, warmup_epochs=0, patience=0, label_smoothing=0.3, clip_grad=0.7,
        mixup=0.5, mixup_start=1,
    )  # fmt: skip
    steps, real = [], train_utils.train_step

    def spy(net, images, targets, **words):
        steps.append((images.numpy(), targets.numpy(), words))
        return real(net, images, targets, **words)

    monkeypatch.setattr(train_utils, "train_step", spy)
    plan = Plan(how, seed=3)
    _, job = training(tmp_path, found=[0.1] * 2, plan=plan)
    fit(job)
    assert len(steps) == 4
    for number, (images, targets, words) in enumerate(steps):
        rows = [int(key, 16) for key in words["keys"]]
        expected = 0.7 * np.eye(3)[np.array(rows) % 3] + 0.3 / 3
        assert targets == pytest.approx(expected) and images.shape == (8, 3, 4, 4)
        assert words["clip"] == 0.7 and words["view"] == number // 2
        mix = draw_mix(plan, epoch=number // 2, batch=number % 2, size=8)
        assert (words["mix"] is None) == (number < 2) == (mix is None)
        assert mix is None or words["mix"].lam == mix.lam
    assert sorted(int(k, 16) for s in steps[:2] for k in s[2]["keys"]) == list(range(16))


def test_the_gradient_is_no_longer_than_its_limit():
    moved = []
    for clip in (0.0, 1e-3):
        paddle.seed(0)
        net = Linear()
        before = net.body.weight.numpy().copy()
        train_step(
            net,
            10 * paddle.ones([4, 3, 4, 4]),
            one_hot(paddle.to_tensor([0, 1, 2, 0]), num_classes=3),
            optimizer=paddle.optimizer.SGD(1.0, parameters=net.parameters()),
            loss=DistillationLoss(alpha=1.0),
            precision=Precision("cpu"),
            clip=clip,
        )
        moved.append(np.linalg.norm(net.body.weight.numpy() - before))
    assert moved[0] > 0.1 and moved[1] <= 1e-3 * (1 + 1e-4)


def test_the_average_is_what_is_validated_and_kept(tmp_path):
    plan = Plan(TrainingOptions(epochs=2, lr=0.05, warmup_epochs=0, patience=0, ema=0.9))
    net, job = training(tmp_path, found=[0.1, 0.2], plan=plan)
    judged, own = [], []
    update, validate = Ema.update, job.validate

    def watch(ema, model):
        update(ema, model)
        own.append(model.body.weight.numpy().copy())

    def judge(trained):
        judged.append(trained.body.weight.numpy().copy())
        return validate(trained)

    job.validate = judge
    paddle.seed(0)
    average = Linear().body.weight.numpy().astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ema, "update", watch)
        fit(job)
    assert np.array_equal(net.body.weight.numpy(), judged[1])  # kept: as judged
    for number, weights in enumerate(own, 1):
        decay = min(0.9, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * weights
    assert judged[1] == pytest.approx(average, rel=1e-5) and not np.array_equal(own[-1], judged[1])


def test_rates_are_the_schedules(tmp_path):
    plan = Plan(TrainingOptions(epochs=4, lr=0.01, warmup_epochs=2, patience=0))
    fit(training(tmp_path, found=[0.1] * 4, plan=plan)[1])
    lines = [x for x in read_metrics(tmp_path / "metrics.jsonl") if x["split"] == "train"]
    assert [x["lr"] for x in lines] == pytest.approx([0.005, 0.01, 0.01, 0.005])


def small(**more):
    return build_student(num_classes=3, scale=0.1, hidden=8, **more)


def started(file, net):
    """The net with a file's weights, as ``--init FILE`` fills it; what was not filled."""
    arrays, _ = start_weights("mobilenet_v2", str(file))
    return fill_body(net, arrays, path=file)


def test_pretrained_body_under_torchs_names(tmp_path):
    source, target = small(), small()
    arrays = {k: v.numpy() for k, v in source.state_dict().items()}
    arrays["classifier.6.weight"] = np.zeros((8, 9), np.float32)  # a head of nine classes
    arrays["classifier.6.bias"] = np.zeros(9, np.float32)
    torchs = names.to_torch(arrays, names.linear_names(arrays))
    facts = make_facts(project="x", architecture="y", class_names=[], framework="torch")
    neutral.write(tmp_path / "w.safetensors", torchs, facts)
    new = started(tmp_path / "w.safetensors", target)
    assert new and all(name.startswith("classifier.") for name in new)
    for name, value in target.state_dict().items():
        if name.startswith("features."):
            assert np.array_equal(value.numpy(), arrays[name]), name


def test_pretrained_whole_file_of_paddle(tmp_path):
    source, target = small(), small()
    paddle.save(source.state_dict(), str(tmp_path / "w.pdparams"))
    assert started(tmp_path / "w.pdparams", target) == []
    images = paddle.randn([2, 3, 32, 32])
    source.eval(), target.eval()
    assert np.array_equal(source(images).numpy(), target(images).numpy())


def test_pretrained_of_another_network(tmp_path):
    other = build_student(num_classes=3, scale=0.35, hidden=8)
    paddle.save(other.state_dict(), str(tmp_path / "w.pdparams"))
    net = small()
    before = {k: v.numpy().copy() for k, v in net.state_dict().items()}
    with pytest.raises(CheckpointError, match="misshaped"):
        started(tmp_path / "w.pdparams", net)
    assert all(np.array_equal(v.numpy(), before[k]) for k, v in net.state_dict().items())


def test_precision_recall_points():
    truth = np.array([1, 0, 1, 1, 0], bool)
    scores = np.array([0.9, 0.8, 0.8, 0.3, 0.1])
    found = precision_recall_points(truth, scores, points=11)
    for index, threshold in enumerate(np.linspace(0, 1, 11)):
        said = [s >= threshold for s in scores]
        hits = sum(t and s for t, s in zip(truth, said, strict=True))
        assert (found["tp"][index], found["fp"][index]) == (hits, sum(said) - hits)
        assert found["recall"][index] == pytest.approx(hits / 3)
        assert found["precision"][index] == pytest.approx(hits / sum(said) if any(said) else 0)
        assert found["tn"][index] + found["fp"][index] == 2

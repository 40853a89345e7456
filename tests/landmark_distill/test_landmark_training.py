"""Distillation as the command does it: what is frozen, what is stored, what the losses are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from landmark_distill.head.distillation import KDSettings
from landmark_distill.images.landmark_data import prepare_landmarks
from landmark_distill.model import build_model, share_head
from landmark_distill.model_files import load_model
from landmark_distill.objective import Objective
from landmark_distill.parsing import parse
from landmark_distill.teacher import Teacher, TeacherOutputs
from landmark_distill.trainer import Trainer
from shared_core.for_torch.distributed import start
from shared_core.for_torch.precision import Precision
from shared_core.knowledge import KnowledgeStore
from shared_core.runs import read_metrics


@pytest.fixture
def trainer_of(tmp_path, landmark_tiny, landmark_teacher):
    """A trainer of a tiny run, not started."""

    def make(*more, distill=True, name="run"):
        words = landmark_tiny(tmp_path, "--augment", *more)
        if distill:
            words += ["--is_distill", "--teacher_backbone_class", "Resnet12"]
            words += ["--teacher_init_weights", str(landmark_teacher)]
        config = parse(words, prog="main.py")
        folder = tmp_path / name
        folder.mkdir()
        world = start(device="cpu")
        return Trainer(config, folder, prepare_landmarks(config.data, folder), world)

    return make


def test_a_fixed_head_is_the_teachers_bit_for_bit_and_never_moves(trainer_of, landmark_teacher):
    trainer = trainer_of("--head_fixed")
    teacher, _ = load_model(landmark_teacher)
    assert teacher.head is not None
    before = {k: v.clone() for k, v in trainer.teacher.model.state_dict().items()}
    start_weights = {k: v.clone() for k, v in trainer.model.encoder.state_dict().items()}
    trainer.train()
    assert trainer.model.head is not None
    assert torch.equal(trainer.model.head.weight, teacher.head.weight)
    learned = [p for g in trainer.optimizer.param_groups for p in g["params"]]
    assert all(p is not trainer.model.head.weight for p in learned)
    assert len(learned) == len(list(trainer.model.encoder.parameters()))
    after = trainer.teacher.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not trainer.teacher.model.training
    assert all(not p.requires_grad for p in trainer.teacher.model.parameters())
    moved = trainer.model.encoder.state_dict()
    assert any(not torch.equal(v, moved[k]) for k, v in start_weights.items())
    content = torch.load(trainer.folder / "max_acc.pth", weights_only=True)["model"]
    assert {name.split(".")[0] for name in content} == {"encoder"}  # no head, no teacher


def test_the_teacher_stays_quiet_while_the_student_trains():
    torch.manual_seed(0)
    model = build_model(
        "Swin_base", num_classes=5, image_size=32, feature_dim=16, window=2,
        depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), drop_path=0.9,
    )  # fmt: skip
    teacher = Teacher(model, Precision("cpu"))
    student = build_model("Resnet12", feature_dim=16)
    share_head(student, teacher.model)
    objective = Objective(student, kd_loss="KD", teacher_head=teacher.head)
    objective.train()
    images = torch.randn(3, 3, 32, 32)
    first = teacher.features(images)
    assert torch.equal(first, teacher.features(images))  # no drop-path
    assert not first.requires_grad and not teacher.model.training


@pytest.mark.parametrize("variant", ["canonical", "original"])
def test_a_shared_head_and_an_own_copy_of_it_give_the_same_losses(variant):
    torch.manual_seed(1)
    teacher = build_model("Resnet12", num_classes=9, feature_dim=16).eval()
    student = build_model("Resnet12", feature_dim=16, drop_rate=0.0, drop_block=0)
    share_head(student, teacher)
    own = build_model("Resnet12", num_classes=9, feature_dim=16, drop_rate=0.0, drop_block=0)
    own.encoder.load_state_dict(student.encoder.state_dict())
    own.head.weight.data.copy_(teacher.head.weight)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 8, 3])
    with torch.no_grad():
        features = teacher.embed(images)
    found = []
    for model in (student, own):
        objective = Objective(
            model,
            kd_loss="KD",
            teacher_head=teacher.head,
            kd=KDSettings(variant, 4.0),
            kd_weight=0.5,
            ce_weight=2.0,
        ).train()
        losses = objective(images, labels, TeacherOutputs(features=features))
        losses["loss"].backward()
        found.append((losses, model.encoder.stem[0].weight.grad))
    for name in ("loss", "ce", "kd", "correct"):
        a, b = (float(losses[name].detach()) for losses, _ in found)
        assert a == pytest.approx(b, rel=1e-4), name
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-3, atol=1e-5)
    total = 2.0 * float(found[0][0]["ce"]) + 0.5 * float(found[0][0]["kd"])
    assert float(found[0][0]["loss"].detach()) == pytest.approx(total, rel=1e-5)


def test_losses_by_hand():
    """Through a head of unit rows the objective's numbers are those of NumPy in float64."""
    torch.manual_seed(2)
    teacher = build_model("Resnet12", num_classes=6, feature_dim=16).eval()
    student = build_model("Resnet12", feature_dim=16, drop_rate=0.0, drop_block=0)
    share_head(student, teacher)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 5, 2])
    with torch.no_grad():
        teaching = teacher.embed(images)
        student.train()
        learning = student.embed(images)

    def cosine(x):
        w = teacher.head.weight.double().numpy()
        w = w / np.linalg.norm(w, axis=1, keepdims=True)
        x = x.double().numpy()
        return x / np.linalg.norm(x, axis=1, keepdims=True) @ w.T

    def log_softmax(z):
        z = z - z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    z_s, z_t = 32 * cosine(learning), 32 * cosine(teaching)
    margin = 3.2 * np.eye(6)[labels]
    ce = -log_softmax(z_s - margin)[np.arange(3), labels].mean()
    expected = {}
    q, p = log_softmax(z_s / 4), log_softmax(z_t / 4)
    expected["canonical"] = 16 * (np.exp(p) * (p - q)).sum(1).mean()
    q, p = log_softmax((z_s - margin) / 4), log_softmax(z_t - margin)
    expected["original"] = (np.exp(p) * (p - q)).sum()
    for variant, value in expected.items():
        objective = Objective(student, kd_loss="KD", kd=KDSettings(variant, 4.0)).train()
        with torch.no_grad():
            losses = objective(images, labels, TeacherOutputs(features=teaching))
        assert float(losses["ce"]) == pytest.approx(ce, rel=1e-4)
        assert float(losses["kd"]) == pytest.approx(value, rel=1e-3)
    gap = (learning - teaching).double().numpy()
    for variant, value in (("original", (gap**2).sum()), ("canonical", (gap**2).sum() / 3)):
        objective = Objective(student, kd_loss="global_KD", kd=KDSettings(variant)).train()
        with torch.no_grad():
            losses = objective(images, labels, TeacherOutputs(features=teaching))
        assert float(losses["kd"]) == pytest.approx(value, rel=1e-4)
    a, b = learning.double().numpy(), teaching.double().numpy()
    close = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    objective = Objective(student, kd_loss="cosine").train()
    with torch.no_grad():
        losses = objective(images, labels, TeacherOutputs(features=teaching))
    assert float(losses["kd"]) == pytest.approx((1 - close).mean(), rel=1e-4)


@pytest.mark.parametrize("kind", ["features", "soft", "topk"])
def test_stored_answers_train_as_live_ones(trainer_of, tmp_path, kind):
    """To float16's rounding, and the teacher looks at each view once."""
    more = ["--head_fixed", "--views", "1", "--max_epoch", "1"]
    if kind == "topk":  # all but one logit is kept, at temperature 1: exact
        more += ["--kd_temperature", "1"]
    live = trainer_of(*more, name="live")
    live.train()
    store = ["--knowledge", str(tmp_path / "k"), "--knowledge_kind", kind]
    if kind == "topk":
        store += ["--knowledge_top_k", "100"]
    first = trainer_of(*more, *store, name="first")
    first.train()
    assert first.source.asked == len(first.data.train)
    second = trainer_of(*more, *store, name="second")
    second.train()
    assert second.source.asked == 0  # the teacher's cost is paid once
    a, b = (t.model.encoder.state_dict() for t in (first, second))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    kd = [read_metrics(t.folder / "metrics.jsonl")[0]["kd"] for t in (live, first)]
    assert kd[1] == pytest.approx(kd[0], rel=0.02)


def test_a_soft_label_is_small_and_a_store_knows_its_views(trainer_of, tmp_path):
    words = ("--head_fixed", "--views", "1", "--max_epoch", "1", "--knowledge", str(tmp_path / "k"))
    trainer_of(*words, "--knowledge_kind", "soft", name="one").train()
    store = KnowledgeStore.open(tmp_path / "k" / "soft")
    assert store.about["dtype"] == "float16" and store.width == 16 + 4
    with pytest.raises(ValueError, match="stored view"):
        trainer_of(*words, "--knowledge_kind", "soft", "--kd_temperature", "2", name="two")
    with pytest.raises(ValueError, match="stored view"):
        trainer_of(*words, "--knowledge_kind", "soft", "--hflip", "0", name="three")


def test_fill_knowledge_then_train(landmark, landmark_tiny, landmark_teacher, tmp_path):
    words = landmark_tiny(
        tmp_path, "--augment", "--is_distill", "--head_fixed", "--teacher_backbone_class",
        "Resnet12", "--teacher_init_weights", landmark_teacher, "--knowledge", tmp_path / "k",
    )  # fmt: skip
    done = landmark(*words, "--fill_knowledge")
    assert done.code == 0 and "2 an image" in done.out, done.err
    store = KnowledgeStore.open(tmp_path / "k" / "features")
    assert store.views == (0, 1) and store.count(0) == store.count(1)
    before = len(store)
    done = landmark(*words, "--resume", "auto")
    assert done.code == 0, done.err
    assert len(KnowledgeStore.open(tmp_path / "k" / "features")) == before


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [(("--channels_last",), 1e-3), (("--grad_checkpointing",), 1e-3), (("--amp", "bf16"), 0.05)],
)
def test_ways_to_compute_change_little(trainer_of, flags, tolerance):
    more = ("--head_fixed", "--max_epoch", "1", "--lr", "0.01")
    losses = []
    for name, words in (("plain", ()), ("other", flags)):
        trainer = trainer_of(*more, *words, name=name)
        trainer.train()
        losses.append(read_metrics(trainer.folder / "metrics.jsonl")[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_memory_format_and_checkpointing_reach_the_network(trainer_of):
    trainer = trainer_of("--channels_last", "--grad_checkpointing", distill=False)
    assert trainer.model.encoder.checkpointing
    weight = trainer.model.encoder.layer4.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_save_all_adds_head_and_teacher_and_the_file_still_loads(trainer_of):
    trainer = trainer_of("--head_fixed", "--save_all", "--max_epoch", "1")
    trainer.train()
    content = torch.load(trainer.folder / "max_acc.pth", weights_only=True)["model"]
    assert {name.split(".")[0] for name in content} == {"encoder", "head", "teacher"}
    model, _ = load_model(trainer.folder / "max_acc.pth")
    assert torch.equal(model.head.weight, trainer.teacher.head.weight)


def test_the_first_of_equal_epochs_is_the_best_and_later_ones_do_not_replace_it(trainer_of):
    trainer = trainer_of("--max_epoch", "3", distill=False)
    wanted = iter([(1.0, 0.5), (1.0, 0.75), (1.0, 0.75)])
    trainer.evaluate = lambda: next(wanted)
    result = trainer.train()
    assert result["max_acc"] == 0.75 and result["best_epoch"] == 2
    assert load_model(trainer.folder / "max_acc.pth")[1]["epoch"] == 2
    assert load_model(trainer.folder / "last.pth")[1]["epoch"] == 3


def test_validation_is_the_mean_over_images_without_margin(trainer_of):
    trainer = trainer_of(distill=False)
    loss, accuracy = trainer.evaluate()
    images = torch.cat([batch.images for batch in trainer.validation])
    labels = torch.from_numpy(trainer.data.calibration.labels)
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model.head(model.embed(images)).double()
    picked = torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels]
    assert loss == pytest.approx(float(-picked.mean()), rel=1e-4)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


def test_eval_interval_leaves_epochs_out_but_not_the_last(trainer_of):
    trainer = trainer_of("--max_epoch", "3", "--eval_interval", "2", distill=False)
    trainer.train()
    lines = read_metrics(trainer.folder / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "val"] == [2, 3]


def test_a_loss_that_is_not_a_number_ends_the_run(trainer_of):
    trainer = trainer_of("--lr", "1e30", distill=False)
    with pytest.raises(ValueError, match="smaller --lr"):
        trainer.train()

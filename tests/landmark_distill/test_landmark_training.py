"""Distillation as the command does it: what is frozen, what is stored, what the losses are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from landmark_distill.config import DistillConfig
from landmark_distill.head.cosine_head import CosineMarginHead
from landmark_distill.head.distillation import KDSettings
from landmark_distill.images.landmark_data import LandmarkData, prepare_landmarks
from landmark_distill.model import EmbeddingModel, build_model, share_head
from landmark_distill.model_files import load_model
from landmark_distill.objective import Objective
from landmark_distill.parsing import parse
from landmark_distill.teacher import Teacher, TeacherOutputs, in_the_teachers_rows
from landmark_distill.trainer import Trainer
from shared_core.datasets import ImageSet
from shared_core.for_torch.checkpoints import save_checkpoint
from shared_core.for_torch.distributed import start
from shared_core.for_torch.precision import Precision
from shared_core.knowledge import KnowledgeStore
from shared_core.runs import read_metrics


@pytest.fixture
def trainer_of(tmp_path, landmark_tiny, landmark_teacher):
    """A trainer of a tiny run, not started."""

    def make(*more, distill=True, name="run", teacher=landmark_teacher):
        words = landmark_tiny(tmp_path, "--augment", *more)
        if distill:
            words += ["--is_distill", "--teacher_backbone_class", "Resnet12"]
            words += ["--teacher_init_weights", str(teacher)]
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


@pytest.mark.parametrize("asked", ["unseen", "accuracy"])
def test_unseen_classes_choose_the_file_that_is_kept(trainer_of, asked):
    trainer = trainer_of("--choose_by", asked, "--validation_share", "0.25", distill=False)
    known, unseen = iter([(1.0, 0.5), (1.0, 0.75)]), iter([(0.75, 0.25), (0.875, 0.0)])
    trainer.evaluate = lambda: next(known)
    if asked == "unseen":  # the mean of both numbers decides
        assert 0 <= min(trainer.judge_unseen().values()) <= 1
        names = ("recall_at_1", "vr_0.01")
        trainer.judge_unseen = lambda: dict(zip(names, next(unseen), strict=True))
    result = trainer.train()
    epoch, accuracy = (1, 0.5) if asked == "unseen" else (2, 0.75)
    assert (result["best_epoch"], result["max_acc"]) == (epoch, accuracy)
    assert load_model(trainer.folder / "max_acc.pth")[1]["epoch"] == epoch


@pytest.mark.parametrize("flags", [(), ("--head_fixed",), ("--head_fixed", "--head_dtype", "bf16")])
def test_validation_is_the_mean_over_images_without_margin(trainer_of, monkeypatch, flags):
    """In full precision whatever the head is kept in, and never through whole logits."""
    trainer = trainer_of(*flags, distill=bool(flags))
    with monkeypatch.context() as patch:
        patch.setattr(CosineMarginHead, "forward", None)
        loss, accuracy = trainer.evaluate()
    images = torch.cat([batch.images for batch in trainer.validation])
    labels = torch.from_numpy(trainer.data.calibration.labels)
    model = trainer.model.eval()
    weight = model.head.weight.detach().double()
    with torch.no_grad():
        features = model.embed(images).double()
    logits = 32 * normalize(features, dim=1) @ normalize(weight, dim=1).T
    picked = torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels]
    assert loss == pytest.approx(float(-picked.mean()), rel=1e-5)
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


def test_the_teacher_sees_the_pixels_that_the_student_sees(trainer_of, monkeypatch):
    """Cropped, mirrored and lit alike, in every step."""
    trainer = trainer_of("--head_fixed", "--channels_last", "--max_epoch", "1")
    seen, real = {"student": [], "teacher": []}, EmbeddingModel.embed

    def spy(self, images):
        if self.training or self is trainer.teacher.model:
            name = "teacher" if self is trainer.teacher.model else "student"
            seen[name].append(images.clone())
        return real(self, images)

    monkeypatch.setattr(EmbeddingModel, "embed", spy)
    trainer.train()
    assert len(seen["student"]) == len(seen["teacher"]) == len(trainer.loader) > 1
    for mine, other in zip(seen["student"], seen["teacher"], strict=True):
        assert torch.equal(mine, other)


# -- whose row is whose ---------------------------------------------------------------------------


def reordered(source, target, order):
    """The same teacher with the rows of its head in another order."""
    content = torch.load(source, weights_only=True)
    weights, facts = content["model"], json.loads(content["facts"])
    weights["head.weight"] = weights["head.weight"][order]
    facts["class_names"] = [facts["class_names"][i] for i in order]
    save_checkpoint(target, weights, facts)
    return target


@pytest.mark.parametrize("head", [("--head_fixed",), ()], ids=["shared", "own"])
def test_rows_of_the_head_are_found_by_the_names_of_the_classes(
    trainer_of, landmark_teacher, tmp_path, head
):
    """A teacher that learned the same classes in another order teaches the same."""
    count = len(load_model(landmark_teacher)[1]["class_names"])
    other = reordered(landmark_teacher, tmp_path / "other.pth", list(reversed(range(count))))
    found = []
    for name, file in (("first", landmark_teacher), ("second", other)):
        trainer = trainer_of(*head, "--max_epoch", "1", "--lr", "1e-4", name=name, teacher=file)
        if not head:  # an own head is drawn row by row: let it mean the same
            torch.manual_seed(0)
            rows = torch.randn(count, trainer.model.feature_dim)
            mine = rows if name == "first" else rows.flip(0)
            trainer.model.head.weight.data.copy_(mine)
        trainer.train()
        found.append(read_metrics(trainer.folder / "metrics.jsonl"))
        _, facts = load_model(trainer.folder / "max_acc.pth")
        assert facts["class_names"] == load_model(file)[1]["class_names"]
    for a, b in zip(*found, strict=True):
        shared = ["loss", "acc"] + (["ce", "kd"] if "kd" in a else [])
        assert [a[key] for key in shared] == pytest.approx([b[key] for key in shared], rel=1e-4)


def test_a_teacher_that_has_seen_the_test_is_refused_or_said_so(
    landmark, landmark_tiny, landmark_teacher, tmp_path, file_of
):
    words = landmark_tiny(
        tmp_path, "--is_distill", "--head_fixed", "--teacher_backbone_class", "Resnet12",
        "--teacher_init_weights", landmark_teacher, "--max_epoch", "1",
    )  # fmt: skip
    split = json.loads((landmark_teacher.parent / "split.json").read_text())
    tested = {label for _, label, _, part in split["samples"] if part == "test"}
    groups = sorted({split["classes"][label].split("/")[0] for label in tested})
    learned = sorted({name.split("/")[0] for name in split["classes"]} - set(groups))
    # Another split: two groups that the teacher has learned are tested.
    drop = words.index("--test_share")
    others = [*words[:drop], *words[drop + 2 :], "--test_groups", ",".join(learned[:2])]
    done = landmark(*others)
    assert done.code == 1 and "has learned 2 classes of the test" in done.err, done.err
    assert not list(tmp_path.rglob("*.pth*"))  # before anything was trained
    # Without the classes that it does not know its rows are found.
    done = landmark(*others, "--teacher_may_know_test")
    assert done.code == 1 and "does not know" in done.err and groups[0] in done.err


def data_of(names, unseen=(), labels=(0, 1, 2)):
    images = ImageSet([f"{label}.png" for label in labels], labels)
    return LandmarkData(
        "d", "real", images, images, images, {}, tuple(names), len(names) or 3, "h",
        unseen=tuple(unseen),
    )  # fmt: skip


def teacher_of(names, rows=None):
    model = build_model("Resnet20", num_classes=rows or len(names), feature_dim=16)
    return Teacher(model, Precision("cpu"), class_names=names)


ASKED = DistillConfig("Resnet20", Path("teacher.pth"), head_fixed=True)


def test_labels_become_the_rows_of_their_names():
    data, notes = in_the_teachers_rows(data_of("abc"), teacher_of("xcba"), ASKED)
    assert data.train.labels.tolist() == data.calibration.labels.tolist() == [3, 2, 1]
    assert data.class_names == tuple("xcba") and data.num_classes == 4 and not notes
    same, _ = in_the_teachers_rows(
        data_of("abc"), teacher_of("xcba"), replace(ASKED, by_number=True)
    )
    assert same.train.labels.tolist() == [0, 1, 2]
    lists, _ = in_the_teachers_rows(data_of(""), teacher_of("", rows=7), ASKED)
    assert lists.train.labels.tolist() == [0, 1, 2] and lists.num_classes == 7
    features = replace(ASKED, head_fixed=False, loss="cosine")
    own, _ = in_the_teachers_rows(data_of("abc"), teacher_of("xyz"), features)
    assert own.class_names == tuple("abc")  # only features are compared


def test_what_is_known_of_the_test_stands_in_the_record():
    asked = replace(ASKED, may_know_test=True)
    _, notes = in_the_teachers_rows(data_of("abc", "xy"), teacher_of("xcba"), asked)
    assert notes == {"teacher_knows_test_classes": 1}


@pytest.mark.parametrize(
    ("data", "teacher", "message"),
    [
        (data_of("abc"), teacher_of("abx"), "does not know 1 classes of the data .'c'."),
        (data_of("abc", "x"), teacher_of("abcx"), "has learned 1 classes of the test .'x'."),
        (data_of("abc"), teacher_of("", rows=5), "only the data have names"),
        (data_of(""), teacher_of("abc"), "only teacher.pth has names"),
        (data_of(""), teacher_of("", rows=2), "knows 2 classes, the data have 3"),
    ],
)
def test_heads_that_do_not_fit_the_data_are_refused(data, teacher, message):
    with pytest.raises(ValueError, match=message):
        in_the_teachers_rows(data, teacher, ASKED)

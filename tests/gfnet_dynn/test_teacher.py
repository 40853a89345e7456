"""A trained network as the teacher: its turns, its stored answers, its start and its floor."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gfnet_dynn.judge.evaluate import gain_of, paired_shares
from gfnet_dynn.model_files import load_model
from gfnet_dynn.models.named import NamedNetwork
from gfnet_dynn.report.lines import WHY_BELOW, verdicts
from gfnet_dynn.scene_views import (
    ALL_TURNS,
    MIRRORED,
    ShiftedView,
    TurnedLoader,
    turn_images,
    turn_pixels,
)
from gfnet_dynn.train.networks import usual_epochs
from shared_core.datasets import EpochOrder, EvalView, ImageSet, Manifest
from shared_core.datasets.reading.loader import BatchLoader
from shared_core.for_torch.data import Normalizer, TorchLoader
from shared_core.for_torch.pretrained import start_network
from shared_core.knowledge.store import KnowledgeStore
from shared_core.runs import read_metrics, read_result
from shared_core.weights.catalogue import CATALOGUE
from shared_core.weights.finding import installed_file

SIDE = 32
WORDS = (
    *("--scale", "short", "--input-size", str(SIDE), "--depth", "4", "--exits", "0,1,2"),
    *("--student-dim", "12", "--backbone-epochs", "2", "--student-epochs", "3"),
    *("--finetune-batch", "16", "--num_epoch", "2", "--max_warmup_epoch", "1", "--batch", "16"),
    *("--amp", "fp32", "--num_workers", "1", "--threads", "1", "--use_mlflow", "false"),
    *("--device", "cpu", "--bilevel_batch_count", "2"),
)
needs_weights = pytest.mark.skipif(
    installed_file(CATALOGUE[0]) is None, reason="the package of lite0's weights is not installed"
)


# --- turns


@pytest.mark.parametrize("turn", ALL_TURNS)
def test_a_turn_moves_each_pixel_where_it_belongs(turn):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 5, 5, 3))
    turned = np.stack([turn_pixels(image, turn) for image in images])
    for i in range(5):
        for j in range(5):
            # Counter-clockwise: a pixel comes from the column that was as far right.
            row, column = {0: (i, j), 1: (j, 4 - i), 2: (4 - i, 4 - j), 3: (4 - j, i)}[turn % 4]
            column = 4 - column if turn >= 4 else column
            assert (turned[:, i, j] == images[:, row, column]).all()
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    seen = turn_images(tensors, torch.full((2,), turn)).permute(0, 2, 3, 1).numpy()
    assert (seen == turned).all()


def loader_of(number: int, *, batch: int) -> TorchLoader:
    """Pictures whose first pixel says which they are."""
    pixels = np.random.default_rng(1).integers(0, 255, (number, 8, 8, 3), dtype=np.uint8)
    images = ImageSet(None, np.arange(number) % 3, source=pixels)
    order = EpochOrder(number, seed=3)
    view = EvalView(8, resize_ratio=1.0)
    return TorchLoader(
        BatchLoader(images, view=view, batch_size=batch, order=order, threads=0), Normalizer()
    )


@pytest.mark.parametrize("turns", [ALL_TURNS, MIRRORED])
def test_every_image_is_shown_in_every_turn_with_the_answer_to_it(turns):
    number = 10
    answers = np.arange(number * len(turns), dtype=np.float32).reshape(number, len(turns), 1)
    upright = {}
    for batch in loader_of(number, batch=4):
        upright.update(zip(batch.indices.tolist(), batch.images.clone(), strict=True))
    loader = TurnedLoader(loader_of(number, batch=4), turns=turns, seed=5, answers=answers)
    seen = set()
    for _ in turns:
        orders = []
        for batch in loader:
            for row, index in enumerate(batch.indices.tolist()):
                turn = int(batch.turns[row])
                wanted = turn_images(upright[index][None], torch.tensor([turn]))[0]
                assert torch.equal(batch.images[row], wanted)
                assert batch.answers[row].item() == index * len(turns) + turns.index(turn)
                seen.add((index, turn))
                orders.append(turn)
        assert len(set(orders)) > 1  # not one turn for all of an epoch
    assert len(seen) == number * len(turns)


def test_a_shifted_view_is_drawn_from_its_seed_and_moves_no_more_than_an_eighth():
    image = np.full((16, 16, 3), 10, np.uint8)
    image[6:10, 6:10] = 200
    view = ShiftedView(16, turns=(0,), seed=1, resize_ratio=1.0)
    places = set()
    for number in range(40):
        out = view(image, np.random.default_rng(number))
        assert (out == view(image, np.random.default_rng(number))).all()
        rows, columns = np.nonzero(out[..., 0] == 200)
        places.add((int(rows.min()) - 6, int(columns.min()) - 6))
        assert out[..., 0].min() == 10  # mirrored at the edge, not filled
    assert {abs(a) for a, _ in places} | {abs(b) for _, b in places} == {0, 1, 2}


# --- the network


@needs_weights
def test_a_named_network_answers_as_the_core_and_keeps_the_statistics_of_its_norms():
    started = start_network("lite0", init="trained", num_classes=5)
    pixels = np.random.default_rng(0).integers(0, 255, (6, SIDE, SIDE, 3), dtype=np.uint8)
    core, ours = Normalizer(started.mean, started.std), Normalizer()
    started.model.eval()
    with torch.no_grad():
        wanted = started.model(core(pixels))
    network = NamedNetwork(
        network="core/efficientnet_lite0", num_classes=5, img_size=(SIDE, SIDE), started=started
    )
    network.eval()
    with torch.no_grad():
        logits = network(ours(pixels))
        features, again = network(ours(pixels), embed=True)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, logits) and features.shape == (6, network.embed_dim) == (6, 1280)
    torch.testing.assert_close(network.head(features), logits)
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    network.train()
    network(ours(pixels)).sum().backward()
    after = network.state_dict()
    assert before and all(torch.equal(after[name], value) for name, value in before.items())
    rebuilt = NamedNetwork(**network.config())
    rebuilt.load_state_dict(network.state_dict())
    assert 7e6 < network.macs() < 8.3e6  # published: 407 M at 224 pixels, 49 times as many


# --- a run


@pytest.fixture(scope="module")
def images(tmp_path_factory, folder_of_images) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("images") / "three", images=40, size=SIDE)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, command, images) -> tuple[Path, str]:
    """A run on a user's own folder whose teacher is lite0, and what it said."""
    if installed_file(CATALOGUE[0]) is None:
        pytest.skip("the package of lite0's weights is not installed")
    folder = tmp_path_factory.mktemp("taught") / "run"
    done = command(*WORDS, "--data-path", images, "--output", folder)
    assert done.code == 0, done.err
    return folder, done.out


def model_of(folder: Path, name: str) -> torch.nn.Module:
    (path,) = (folder / "checkpoint").glob(f"{name}_*.pth")
    return load_model(path)[0]


def pixels_of(folder: Path, root: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    items = Manifest.read(folder / "split.json", root=root).subset(split)
    paths = [root / item.path for item in items]
    loader = BatchLoader(
        ImageSet(paths, [item.label for item in items]),
        view=EvalView(SIDE, resize_ratio=1.0, method="cubic"),
        batch_size=len(paths),
        threads=0,
    )
    batch = next(iter(loader))
    return batch.images.copy(), batch.labels, [item.key for item in items]


def test_stored_answers_are_those_of_the_teacher_to_the_view_that_the_student_sees(taught, images):
    folder, _ = taught
    teacher = model_of(folder, "backbone")
    assert isinstance(teacher, NamedNetwork)
    store = KnowledgeStore.open(folder / "knowledge")
    pixels, _, keys = pixels_of(folder, images, "train")
    assert store.views == ALL_TURNS and store.verify() == 8 * len(keys)
    for turn in (0, 3, 6):
        turned = np.stack([np.rot90(p[:, ::-1] if turn > 3 else p, turn % 4) for p in pixels])
        with torch.no_grad():
            live = teacher(Normalizer()(turned.copy())).numpy()
        np.testing.assert_allclose(store.get(keys, turn), live, atol=0.02, rtol=2e-3)  # float16


def test_the_student_learns_from_the_answers_alone_and_its_twin_from_labels(taught):
    folder, _ = taught
    rows = list(read_metrics(folder / "metrics.jsonl"))
    student, twin = (
        [row for row in rows if row.get("stage") == stage and "loss" in row]
        for stage in ("distil", "labels")
    )
    assert len(student) == len(twin) == 3
    for row in student:  # the recipe's label weight is 0
        assert row["loss"] == pytest.approx(row["kd"] + row["deep"], rel=1e-4)
    assert all("kd" not in row for row in twin)


def test_the_gain_is_student_minus_twin():
    right = {
        "student": np.array([True] * 9 + [False]),
        "labels": np.array([True] * 7 + [False] * 3),
    }
    gap = gain_of(right)
    assert gap["difference"] == pytest.approx(0.2) and gap["images"] == 10


def test_the_report_says_what_it_is_worth(taught, images):
    folder, said = taught
    measured = read_result(folder / "result.json")["measured"]
    probe = np.load(folder / "trained-features.npz")
    pixels, labels, _ = pixels_of(folder, images, "test")
    network = start_network("lite0", init="trained", num_classes=3)
    network.model.eval()
    with torch.no_grad():
        net = network.model
        features = net.forward_features(Normalizer(network.mean, network.std)(pixels))
    logits = features.mean((2, 3)).numpy() @ probe["weight"].T + probe["bias"]
    floor = measured["trained_floor"]
    assert floor["accuracy"] == float((logits.argmax(1) == labels).mean())
    right = {}
    for name in ("student", "labels"):
        with torch.no_grad():
            right[name] = model_of(folder, name)(Normalizer()(pixels)).argmax(1).numpy() == labels
        assert measured[name]["accuracy"] == right[name].mean()
    start = measured["backbone"]["start"]
    assert start["licence"] == "Apache-2.0" and len(start["sha256"]) == 64
    gap = measured["distillation"]
    assert gap["difference"] == pytest.approx(right["student"].mean() - right["labels"].mean())
    assert gap["low"] <= gap["difference"] <= gap["high"] and gap["images"] == len(labels)
    last = said.strip().splitlines()[-1]
    for sentence in verdicts(measured):
        assert sentence in last and sentence in (folder / "report.md").read_text()
    assert "trained features, linear" in last and "Distillation" in last


def test_training_begins_at_the_probe(tmp_path, taught, images, command, monkeypatch):
    """With no steps to learn in, the teacher answers as the floor does."""
    from gfnet_dynn.train import finetune

    folder = tmp_path / "run"
    monkeypatch.setattr(finetune.FineTune, "_step", lambda self, batch, epoch: _count(self))
    words = ("--data-path", images, "--output", folder, "--stage", "prepare")
    assert command(*WORDS, *words).code == 0
    done = command(*WORDS, *words[:-1], "backbone")
    assert done.code == 0, done.err
    teacher, probe = model_of(folder, "backbone"), np.load(folder / "trained-features.npz")
    np.testing.assert_array_equal(teacher.head.weight.detach().numpy(), probe["weight"])
    np.testing.assert_array_equal(teacher.head.bias.detach().numpy(), probe["bias"])


def _count(training) -> None:
    training.means.add({"loss": torch.zeros(())})
    training.step += 1


@pytest.mark.parametrize("stage", [pytest.param("backbone", marks=pytest.mark.slow), "distil"])
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path, taught, images, command, monkeypatch, digests, stage
):
    from gfnet_dynn.train import finetune

    folder = tmp_path / "run"
    words = (*WORDS, "--data-path", images, "--output", folder)
    step = finetune.FineTune._step

    def stopping(self, batch, epoch):
        if self.stage == stage and self.step == 8:  # in the second epoch of five steps
            raise KeyboardInterrupt
        step(self, batch, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.FineTune, "_step", stopping)
        assert command(*words).code != 0
    done = command(*words, "--resume")
    assert done.code == 0, done.err
    assert f"{stage}: resumed at epoch 2" in done.out
    assert digests(folder) == digests(taught[0])


def test_a_teacher_of_other_classes_is_refused(tmp_path, taught, folder_of_images, command):
    others = folder_of_images(tmp_path / "others", ("a", "b", "x"), images=40, size=SIDE)
    (path,) = (taught[0] / "checkpoint").glob("backbone_*.pth")
    copy = shutil.copyfile(path, tmp_path / "teacher.pth")
    words = [word for word in WORDS if word not in ("--backbone-epochs",)]
    del words[words.index("2")]
    done = command(*words, "--data-path", others, "--teacher", copy, "--output", tmp_path / "run")
    assert (
        done.code == 1 and "knows 3 classes (a, b, c...), the data has 3 (a, b, x...)" in done.err
    )


def test_fewer_images_are_shown_more_often():
    # AID at 128 pixels has 6,400 training images: 5 and 36 epochs.
    for images, teacher, student in ((6400, 5, 36), (2000, 16, 115), (500, 20, 120), (9**6, 3, 12)):
        assert usual_epochs(images, started=True) == teacher
        assert usual_epochs(images, started=False) == student


# --- the paired interval


def test_paired_shares_by_hand_and_by_simulation():
    first = np.array([True] * 60 + [False] * 40)
    second = np.array([True] * 50 + [False] * 10 + [True] * 4 + [False] * 36)
    found = paired_shares(first, second)
    assert found["difference"] == pytest.approx(0.06) and found["images"] == 100
    centre = 6 / 102
    half = 1.959963984540054 * math.sqrt(10.5 + 4.5 - 102 * centre**2) / 102
    assert found["low"] == pytest.approx(centre - half)
    assert found["high"] == pytest.approx(centre + half)
    swapped = paired_shares(second, first)
    assert swapped["low"] == pytest.approx(-found["high"])
    rng = np.random.default_rng(0)
    truth, held = 0.05, 0
    for _ in range(2000):
        cell = rng.choice(4, 200, p=[0.6, 0.12, 0.07, 0.21])
        pair = paired_shares(np.isin(cell, (0, 1)), np.isin(cell, (0, 2)))
        held += pair["low"] <= truth <= pair["high"]
    assert 0.935 < held / 2000 < 0.975


def test_verdicts_say_below_and_whether_distillation_helped():
    measured = {
        "floor": {"plain": 0.5, "engineered": 0.7},
        "trained_floor": {"accuracy": 0.9},
        "student": {"accuracy": 0.8},
        "distillation": {"difference": 0.05, "low": 0.01, "high": 0.09, "images": 100},
    }
    floors, helped = verdicts(measured)
    assert "above the floor (engineered features, linear) of 0.7000" in floors
    assert "BELOW the floor (trained features, linear) of 0.9000" in floors
    assert helped.startswith("Distillation helped: +5.0 points")
    assert WHY_BELOW in verdicts(measured, rehearsal=True)
    assert WHY_BELOW not in verdicts(measured | {"student": {"accuracy": 0.95}}, rehearsal=True)
    measured["distillation"] |= {"low": -0.01}
    assert "did not help for sure" in verdicts(measured)[1]
    measured["distillation"] |= {"low": -0.1, "high": -0.01}
    assert "did not help, it hurt" in verdicts(measured)[1]

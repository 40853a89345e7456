"""What a run was measured on, chosen by and taught from: each recomputed from what it left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from command_tools import without
from gfnet_dynn.choices import POINTS
from gfnet_dynn.decide.exit_outputs import ExitLogits
from gfnet_dynn.decide.findings import findings_of
from gfnet_dynn.decide.thresholds import calibrated_policy, three_policies
from gfnet_dynn.model_files import load_model, save_model
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet_pyramid import GFNetPyramid
from gfnet_dynn.our_train_helper import BestExits
from shared_core.datasets import EvalView, ImageSet, Manifest
from shared_core.datasets.reading.loader import BatchLoader
from shared_core.runs import read_metrics, read_result

STUDENT = "checkpoint/student_built-in-scenes.pth"
BACKBONE = "checkpoint/backbone_built-in-scenes.pth"
NO_FLOOR = {"plain": 0.0, "engineered": 0.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch, no_figures):
    """The floor and the figures are tested elsewhere."""
    from gfnet_dynn import pipeline

    monkeypatch.setattr(pipeline, "floor_accuracy", lambda *words: NO_FLOOR)


def images_of(folder: Path, split: str, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A split as the models see it, computed here, and its labels."""
    items = Manifest.read(folder / "split.json").subset(split)
    paths = [folder / "data/scenes" / item.path for item in items]
    view = EvalView(size, resize_ratio=1.0, method="cubic")
    images = ImageSet(paths, [0] * len(paths))
    batch = next(iter(BatchLoader(images, view=view, batch_size=len(paths), threads=0)))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = ((batch.images / 255.0 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    return torch.from_numpy(pixels), torch.tensor([item.label for item in items])


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("model") or content["state"]


def best_of(folder: Path) -> Path:
    (path,) = (folder / "checkpoint/best").glob("*.pth")
    return path


# --- thresholds


def test_thresholds_come_from_the_calibration_outputs_alone(finished):
    folder, _ = finished
    exits = read_result(folder / "result.json")["measured"]["exits"]
    found, splits = {}, {}
    for split in ("calibration", "test"):
        splits[split] = outputs = ExitLogits.load(folder / f"outputs-{split}.npz")
        policy = calibrated_policy(ExitPolicy(exits["policy"]), outputs)
        points = three_policies(policy, outputs, max_loss=0.01)
        found[split] = [points[name].thresholds[0] for name in POINTS]
        if split == "calibration":
            assert exits["temperatures"] == list(policy.temperatures)
    assert [exits["points"][name]["threshold"] for name in POINTS] == found["calibration"]
    assert found["calibration"] != found["test"]  # it would have shown
    wanted = {"kind": exits["policy"], "max_accuracy_loss": 0.01}
    right = findings_of(splits["calibration"], splits["test"], **wanted)
    wrong = findings_of(splits["test"], splits["calibration"], **wanted)
    mine, theirs, swapped = (
        [row["threshold"] for row in rows["budgets"]] for rows in (exits, right, wrong)
    )
    assert mine == theirs != swapped


def test_other_labels_of_the_test_split_move_no_threshold(
    tmp_path, copy_of, tiny, command, monkeypatch
):
    from gfnet_dynn.judge import evaluate

    folder = copy_of(tmp_path / "run")
    before = read_result(folder / "result.json")["measured"]["exits"]
    collect = evaluate.collect

    def mislabelled(*words, **more):
        found = collect(*words, **more)
        if found.split == "test":
            object.__setattr__(found, "labels", (found.labels + 1) % 3)
        return found

    monkeypatch.setattr(evaluate, "collect", mislabelled)
    assert command(*tiny(folder, "--eval")).code == 0
    after = read_result(folder / "result.json")["measured"]["exits"]
    assert after["temperatures"] == before["temperatures"]
    assert after["final_accuracy"] != before["final_accuracy"]
    for name in POINTS:
        assert after["points"][name]["threshold"] == before["points"][name]["threshold"]
    for rows in ("budgets", "risk"):
        assert [row["threshold"] for row in after[rows]] == [
            row["threshold"] for row in before[rows]
        ]
    for kind, row in after["policies"].items():
        assert row["threshold"] == before["policies"][kind]["threshold"]
    assert [row["quantiles"] for row in after["conformal"]] == [
        row["quantiles"] for row in before["conformal"]
    ]


# --- which epoch


def test_phase_2_is_chosen_by_the_level_loss(finished):
    folder, _ = finished
    rows = [
        row
        for row in read_metrics(folder / "metrics.jsonl")
        if (row["stage"], row["split"]) == ("exits", "val") and row["step"] >= 2
    ]
    best = min(rows, key=lambda row: row["level_loss"])
    done = json.loads((folder / "stages.json").read_text())["exits"]
    assert (done["epoch"], done["calibration_level_loss"]) == (best["step"], best["level_loss"])
    model, facts = load_model(best_of(folder))
    assert facts["epoch"] == best["step"]
    # The shipped weights have that level loss: CE + lambda * cost where the gates say 0.5.
    images, labels = images_of(folder, "calibration")
    with torch.no_grad():
        full = model(images)
    left = ExitPolicy("gate", 0.5).select(*full)
    logits = torch.stack(full.logits)[left, torch.arange(len(labels))]
    costs = model.exit_costs()[left.numpy()].mean() / model.exit_costs()[-1]
    wanted = F.cross_entropy(logits, labels).item() + 0.75 * costs
    assert best["level_loss"] == pytest.approx(wanted, rel=1e-4)


def test_gates_that_save_much_win_over_gates_that_have_learned_nothing():
    """Nobody leaves at first: accuracy is highest there, and no later epoch would ever win."""
    best, head = BestExits(), torch.nn.Linear(1, 1)
    for epoch, (accuracy, loss) in enumerate([(0.90, 1.05), (0.89, 0.80), (0.88, 0.80)]):
        with torch.no_grad():
            head.weight.fill_(epoch)
        best.offer(head, {"gated_acc": accuracy, "level_loss": loss}, epoch)
    assert (best.epoch, best.gated_accuracy, best.weights["weight"].item()) == (1, 0.89, 1.0)
    again = BestExits()
    again.load_state_dict(best.state_dict())
    assert not again.offer(head, {"gated_acc": 1.0, "level_loss": 0.80}, 3)
    assert not again.offer(head, {"gated_acc": 1.0, "level_loss": float("nan")}, 4)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, tiny, command):
    """A backbone trained with averaged weights, and its raw weights after every step."""
    from shared_core.for_torch import ema

    folder, seen = tmp_path_factory.mktemp("averaged") / "run", []
    update = ema.Ema.update

    def keep(self, model):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        update(self, model)

    start = {}
    begin = ema.Ema.__init__

    def note(self, model, **more):
        start.update({k: v.clone() for k, v in model.state_dict().items()})
        begin(self, model, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema.Ema, "update", keep)
        patch.setattr(ema.Ema, "__init__", note)
        done = command(*tiny(folder, "--stage", "backbone", "--ema", "0.9"))
    assert done.code == 0, done.err
    return folder, start, seen


def test_the_averaged_weights_are_judged_and_kept(averaged):
    folder, start, seen = averaged
    model, facts = load_model(folder / BACKBONE)
    average = {name: value.double() for name, value in start.items()}
    for step, raw in enumerate(seen[: 6 * (facts["epoch"] + 1)], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in raw.items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    assert len(seen) == 12
    for name, value in model.state_dict().items():
        assert torch.allclose(value.double(), average[name], atol=1e-5), name
    assert not torch.equal(model.head.weight, seen[6 * facts["epoch"] + 5]["head.weight"])
    images, labels = images_of(folder, "calibration")
    with torch.no_grad():
        right = (model(images).argmax(dim=1) == labels).double().mean().item()
    log = {row["step"]: row for row in read_metrics(folder / "metrics.jsonl") if "acc" in row}
    assert log[facts["epoch"]]["acc"] == pytest.approx(right)


# --- distillation


def test_class_centres_are_those_of_the_training_images(finished, tmp_path, tiny, command):
    from gfnet_dynn.train import networks

    folder, _ = finished
    centres = []
    compute = networks.class_centres
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            networks,
            "class_centres",
            lambda *a, **k: centres.append(compute(*a, **k)) or centres[0],
        )
        run = tmp_path / "run"
        words = distil_words(tiny, folder, run)
        assert command(*words, "--stage", "backbone").code == 0
        assert command(*words, "--stage", "distil").code == 0
    images, labels = images_of(run, "train")
    teacher, _ = load_model(folder / BACKBONE)
    with torch.no_grad():
        embeddings = teacher.embed(images)
    wanted = torch.stack([embeddings[labels == k].mean(dim=0) for k in range(3)])
    assert torch.allclose(centres[0], wanted, atol=1e-4)
    # The teacher was trained in that run with the same seeds: so is the student, bit for bit.
    mine, theirs = weights(run / STUDENT), weights(folder / STUDENT)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (run / BACKBONE).read_bytes() == (folder / BACKBONE).read_bytes()


def distil_words(tiny, teacher: Path, run: Path, *more: str) -> list[str]:
    words = without(tiny(run), "--backbone-dim", "--backbone-epochs")
    return [*words, "--teacher", str(teacher / BACKBONE), *more]


DISTIL_FLAGS = (
    *("--kd-weight 3", "--kd-temperature 1", "--kd-warmup 2", "--nd-weight 0.1"),
    # Against another weight: the layers of this loss alone shift every draw after them.
    *("--spectrum-weight 1 | --spectrum-weight 3", "--student-lr 0.01", "--student-dim 8"),
    *("--deep-supervision 0.5", "--smoothing 0.3", "--mixup 0.8", "--finetune-batch 8"),
    *("--deep-supervision 0.5 | --deep-kd 3", "--deep-supervision 0.5 | --deep-temperature 1"),
    "--deep-supervision 0.5 | --exits 0,2",
)


@pytest.fixture(scope="module")
def students(finished, tmp_path_factory, tiny, command):
    """What a distil stage leaves under some words; each asked once."""
    known: dict[str, tuple] = {}

    def of(more: str) -> tuple[bytes, str]:
        if more not in known:
            run = tmp_path_factory.mktemp("student") / "run"
            words = distil_words(tiny, finished[0], run, *more.split())
            for stage in ("backbone", "distil"):
                done = command(*words, "--stage", stage)
                assert done.code == 0, done.err
            log = (run / "metrics.jsonl").read_bytes()
            known[more] = (log, load_model(run / STUDENT)[1]["sha256"])
        return known[more]

    return of


@pytest.mark.parametrize("flag", DISTIL_FLAGS)
def test_every_flag_of_the_distillation_changes_the_student(students, flag):
    base, _, more = flag.rpartition(" | ")
    changed, plain = students(f"{base} {more}".strip()), students(base)
    assert changed[0] != plain[0] and changed[1] != plain[1]


def test_a_pyramid_teaches_a_student(finished, tmp_path, tiny, command):
    """A network that cannot carry exits itself."""
    torch.manual_seed(0)
    run = tmp_path / "run"
    network = GFNetPyramid(img_size=32, num_classes=3, embed_dim=(4, 6, 8, 10), depth=(1, 1, 1, 1))
    words = without(
        tiny(run), "--backbone-dim", "--backbone-epochs", "--input-size", "--patch-size"
    )
    words += ["--input-size", "32", "--patch-size", "8"]
    assert command(*words, "--stage", "prepare").code == 0
    from gfnet_dynn.data_loader_helper import prepare_data
    from gfnet_dynn.settings import Settings

    config = json.loads((run / "config.json").read_text())
    data = prepare_data(Settings.of(config).source, run, seed=0)
    file = tmp_path / "pyramid.pth"
    save_model(file, network, network.state_dict(), data=data, epoch=0, metrics={}, config={})
    shutil.rmtree(run)
    done = command(*words, "--teacher", str(file))
    assert done.code == 0, done.err
    measured = read_result(run / "result.json")["measured"]
    assert measured["backbone"]["parameters"] == sum(p.numel() for p in network.parameters())
    # The plain features of 10 numbers were projected to: the loss knew the teacher's width.
    log = read_metrics(run / "metrics.jsonl")
    assert {"kd", "nd"} <= next(row for row in log if row["stage"] == "distil").keys()
    again = command(*words, "--teacher", str(file), "--spectrum-weight", "1", "--fresh")
    assert again.code == 1 and "compares tokens of one grid" in again.err


# --- exits


@pytest.mark.parametrize("phase2", ["exits", "joint", "backbone"])
def test_which_heads_move_after_the_warm_up(finished, tmp_path, tiny_on_file, command, phase2):
    run, (folder, _) = tmp_path / "run", finished
    words = tiny_on_file(run, "--checkpoint-path", str(folder / STUDENT), "--phase2", phase2)
    if phase2 == "joint":
        words = without(words, "--bilevel_batch_count")
    assert command(*words, "--stage", "exits").code == 0
    shipped = weights(best_of(run))
    for block in (0, 1, 2):
        (warm,) = (run / "checkpoint/_warmup").glob(f"*/{block}.pth")
        same = torch.equal(weights(warm)["weight"], shipped[f"exit_heads.{block}.weight"])
        assert same == (phase2 == "backbone")
    theirs = weights(folder / STUDENT)
    moved = any(not torch.equal(shipped[f"backbone.{name}"], theirs[name]) for name in theirs)
    assert moved == (phase2 != "exits")


def test_only_images_that_are_timed_are_read(finished, monkeypatch):
    """The test set may be larger than memory."""
    from gfnet_dynn.data_loader_helper import prepare_data
    from gfnet_dynn.judge import timing
    from gfnet_dynn.run import Run
    from gfnet_dynn.settings import Settings
    from gfnet_dynn.tracking import RunLog
    from gfnet_dynn.train.parallel import ALONE
    from shared_core.datasets.reading import loader

    folder, _ = finished
    config = json.loads((folder / "config.json").read_text())
    settings = Settings.of(config)
    data = prepare_data(settings.source, folder, seed=0)
    run = Run(settings, config, data, RunLog(folder), torch.device("cpu"), "fp32", ALONE)
    read = []
    begin = loader.BatchLoader.__init__

    def note(self, images, **more):
        read.append(len(images))
        begin(self, images, **more)

    monkeypatch.setattr(loader.BatchLoader, "__init__", note)
    monkeypatch.setattr(timing, "TIMED_IMAGES", 4)
    found = timing.timed_images(run)
    everything, _ = images_of(folder, "test")
    assert read[0] == len(found) == 4
    rows = np.sort(np.random.default_rng(0).permutation(len(everything))[:4])
    assert torch.allclose(found, everything[rows], atol=1e-5)


def test_times_of_the_points_are_their_own(finished):
    """Nobody leaves: the time of a run past all exits, not that of the network without them."""
    folder, done = finished
    exits = read_result(folder / "result.json")["measured"]["exits"]
    (line,) = [row for row in done.out.splitlines() if row.startswith("with exits, nobody leaves")]
    for label, times in exits["ms_per_image_at_exits"].items():
        assert f"{times[-1]:.2f} ms an image ({label})" in line
    assert exits["macs_without_exits"] < exits["macs_per_exit"][-1]

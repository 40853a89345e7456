"""The whole chain on tiny built-in scenes: files, names, record, report, real exits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from command_tools import without
from gfnet_dynn.decide.exit_outputs import ExitLogits
from gfnet_dynn.model_files import load_model
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.pipeline import of_all_stages
from shared_core.datasets import EvalView, ImageSet, Manifest
from shared_core.datasets.reading.loader import BatchLoader
from shared_core.runs import read_metrics, read_result

REPOSITORY = Path(__file__).resolve().parents[2]
BUILTIN = ("--builtin-classes", "--builtin-images")
FIGURES = (
    *("accuracy-cost", "accuracy-time", "exit-rates", "reliability", "samples-per-exit"),
    "training",
)


def weights_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of every model file of a run by its path in the run."""
    found = {}
    for path in sorted((folder / "checkpoint").rglob("*.pth")):
        content = torch.load(path, weights_only=True)
        found[str(path.relative_to(folder))] = content.get("model") or content["state"]
    return found


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights_of(first), weights_of(second)
    assert list(a) == list(b)
    for name, weights in a.items():
        assert list(weights) == list(b[name])
        for key, value in weights.items():
            assert torch.equal(value, b[name][key]), (name, key)


def normalised(paths: list[Path], size: int) -> torch.Tensor:
    """Images as the models see them, computed here: bytes, then ImageNet's mean and deviation."""
    images = ImageSet(paths, [0] * len(paths), [str(path) for path in paths])
    view = EvalView(size, resize_ratio=1.0, method="cubic")
    batch = next(iter(BatchLoader(images, view=view, batch_size=len(paths), threads=0)))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (batch.images / 255.0 - mean) / std
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))


def test_files_carry_the_names_of_the_readme(finished):
    folder, _ = finished
    names = {str(path.relative_to(folder)) for path in (folder / "checkpoint").rglob("*.pth")}
    best = [name for name in names if name.startswith("checkpoint/best/")]
    assert len(best) == 1
    pattern = r"ckpt_built-in-scenes_(\d+)__0\.75__(\d+\.\d+)\.pth"
    found = re.fullmatch(pattern, Path(best[0]).name)
    assert found is not None
    confidence = "checkpoint/checkpoint_built-in-scenes_0.75_confEE/"
    series = sorted(name for name in names if name.startswith(confidence))
    assert confidence + Path(best[0]).name in series
    assert all(re.fullmatch(pattern, Path(name).name) for name in series)
    warm_up = {f"checkpoint/_warmup/built-in-scenes_16_0.75/{block}.pth" for block in (0, 1, 2)}
    models = {f"checkpoint/{name}_built-in-scenes.pth" for name in ("backbone", "student")}
    assert names == {*best, *series, *warm_up, *models}
    # The accuracy in the name is that of the calibration split, in percent.
    _, facts = load_model(folder / best[0], architecture="GFNetDynn")
    assert float(found.group(2)) == round(100 * facts["metrics"]["calibration_gated_accuracy"], 2)
    assert facts["epoch"] == int(found.group(1))
    assert not list((folder / "state").glob("*"))  # nothing left over


def test_first_and_last_line_say_rehearsal(finished):
    _, done = finished
    lines = done.out.strip().splitlines()
    for line in (lines[0], lines[-1]):
        assert line.startswith("REHEARSAL")
        assert "AID was not used" in line and "not a reproduction" in line


def test_record(finished, tiny):
    folder, _ = finished
    record = read_result(folder / "result.json")
    manifest = Manifest.read(folder / "split.json")
    assert record["data"]["kind"] == "built-in" and record["scale"] == "rehearsal"
    assert record["data"]["split_hash"] == manifest.hash
    assert record["data"]["images"] == 120 and record["data"]["pixels"] == 16
    assert sum(record["data"]["splits"].values()) == 120
    assert record["task"] == "gfnet_dynn/aid" and record["seeds"] == [0]
    assert record["command"].startswith("packages/gfnet_dynn/main.py --scale rehearsal")
    assert 0 < record["wall_seconds"] < 600
    measured = record["measured"]
    assert set(measured) == {"floor", "backbone", "student", "exits"}
    assert set(measured["exits"]["points"]) == {"careful", "balanced", "fast"}
    for name in ("backbone", "student"):
        model, _ = load_model(folder / f"checkpoint/{name}_built-in-scenes.pth")
        assert measured[name]["parameters"] == sum(p.numel() for p in model.parameters())
        assert 0 <= measured[name]["accuracy"] <= 1
    for point in measured["exits"]["points"].values():
        assert sum(row["rate"] for row in point["exits"]) == pytest.approx(1)
        cost = sum(row["rate"] * row["macs"] for row in point["exits"])
        assert cost == pytest.approx(point["macs"])
        assert set(point["ms_per_image"]) == {"batch 1", "batch 64"}
        assert all(value > 0 for value in point["ms_per_image"].values())


def test_report_shows_every_figure(finished):
    folder, _ = finished
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f"]({name}.png)" in markdown
        picture = cv2.imread(str(folder / f"{name}.png"))
        assert picture is not None and min(picture.shape[:2]) > 100
        assert picture.std() > 5  # something is drawn
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert "REHEARSAL" in markdown and "REHEARSAL" in page
    accuracy = read_result(folder / "result.json")["measured"]["backbone"]["accuracy"]
    assert f"| teacher | {accuracy:.4g} |" in markdown


def test_metrics_carry_the_names_of_the_original(finished):
    folder, _ = finished
    lines = read_metrics(folder / "metrics.jsonl")
    kinds = [(line["stage"], line["split"], line["step"]) for line in lines]
    assert kinds == [
        (stage, split, step)
        for stage, epochs in (("backbone", 2), ("distil", 2), ("exits", 4))
        for step in range(epochs)
        for split in ("train", "val")
    ]
    by_kind = dict(zip(kinds, lines, strict=True))
    assert {"loss", "lr"} <= by_kind["backbone", "train", 0].keys()
    assert {"kd", "nd", "loss"} <= {key.split("_")[0] for key in by_kind["distil", "train", 0]}
    assert "acc" in by_kind["distil", "val", 1]
    per_exit = {f"{name}{e}" for e in (0, 1, 2) for name in ("acc", "p_max", "entropy", "margins")}
    final = {"acc_final", "final_p_max", "final_entropy", "final_margins"}
    for step in range(4):
        assert per_exit | final <= by_kind["exits", "train", step].keys()
        held = by_kind["exits", "val", step].keys()
        assert per_exit | final | {f"ece{e}" for e in (0, 1, 2)} | {"final_ece"} <= held
        assert {f"percent_exit{e}" for e in (0, 1, 2)} | {"percent_exitfinal"} <= held
        assert {"gated_acc", "gated_ece", "total_cost", "test_acc", "gate_loss"} <= held
    assert {"gate_loss", "classifier_loss", "acc_exit"} <= by_kind["exits", "train", 2].keys()


def test_student_loads_as_a_plain_gfnet(finished):
    folder, _ = finished
    content = torch.load(folder / "checkpoint/student_built-in-scenes.pth", weights_only=True)
    facts = json.loads(content["facts"])
    model = GFNet(**facts["model"])
    model.load_state_dict(content["model"], strict=True)  # no projector, no teacher
    assert model.embed_dim == 12 and model.depth == 4
    assert facts["class_names"] == ["fields_stripes", "roads_cross", "tanks_grid"]
    assert facts["input_size"] == [3, 16, 16] and facts["mean"] == [0.485, 0.456, 0.406]


def test_accuracies_of_plain_networks_are_those_of_the_images(finished):
    """The files' own weights on the files' own images, without the pipeline's loaders."""
    folder, _ = finished
    record = read_result(folder / "result.json")["measured"]
    items = Manifest.read(folder / "split.json").subset("test")
    images = normalised([folder / "data/scenes" / item.path for item in items], 16)
    labels = torch.tensor([item.label for item in items])
    for name in ("backbone", "student"):
        model, _ = load_model(folder / f"checkpoint/{name}_built-in-scenes.pth")
        with torch.no_grad():
            right = (model(images).argmax(dim=1) == labels).double().mean()
        assert record[name]["accuracy"] == pytest.approx(float(right))


def test_measured_exits_are_those_of_the_saved_outputs(finished):
    folder, _ = finished
    exits = read_result(folder / "result.json")["measured"]["exits"]
    outputs = ExitLogits.load(folder / "outputs-test.npz")
    items = Manifest.read(folder / "split.json").subset("test")
    assert outputs.labels.tolist() == [item.label for item in items]
    assert outputs.split_hash == Manifest.read(folder / "split.json").hash
    best = next((folder / "checkpoint/best").glob("*.pth"))
    model, _ = load_model(best, architecture="GFNetDynn")
    assert isinstance(model, GFNetDynn)
    images = normalised([folder / "data/scenes" / item.path for item in items], 16)
    for point in exits["points"].values():
        policy = ExitPolicy(exits["policy"], point["threshold"], temperatures=exits["temperatures"])
        leave = model.early_exit(images, policy)
        right = (leave.logits.argmax(dim=1).numpy() == outputs.labels).mean()
        assert point["accuracy"] == pytest.approx(right)
        chosen = outputs.select(policy)
        assert point["agreement_with_full_pass"] == 1.0
        assert (leave.exit_index.numpy() == chosen).all()
        from_file = outputs.correct[chosen, np.arange(len(chosen))].mean()
        assert point["accuracy"] == pytest.approx(from_file)
        assert point["macs"] == pytest.approx(outputs.costs[chosen].mean())


def test_stages_one_by_one_give_the_same_run(
    tmp_path, finished, tiny, command, without_times, no_figures
):
    folder, _ = finished
    alone = tmp_path / "alone"
    for stage in ("prepare", "backbone", "distil", "exits", "evaluate"):
        done = command(*tiny(alone, "--stage", stage))
        assert done.code == 0, done.err
    assert_same_weights(folder, alone)
    assert (folder / "metrics.jsonl").read_bytes() == (alone / "metrics.jsonl").read_bytes()
    assert (folder / "split.json").read_bytes() == (alone / "split.json").read_bytes()
    records = [read_result(path / "result.json")["measured"] for path in (folder, alone)]
    assert without_times(records[0]) == without_times(records[1])
    again = command(*tiny(alone, "--stage", "backbone"))
    assert again.code == 0 and "backbone: done before" in again.out


def test_eval_alone_changes_no_number(
    tmp_path, copy_of, tiny, command, without_times, digests, no_figures
):
    folder = copy_of(tmp_path / "run")
    before, files = read_result(folder / "result.json"), digests(folder)
    log = (folder / "metrics.jsonl").read_bytes()
    done = command(*tiny(folder, "--eval"))
    assert done.code == 0, done.err
    after = read_result(folder / "result.json")
    assert without_times(before["measured"]) == without_times(after["measured"])
    assert digests(folder) == files and (folder / "metrics.jsonl").read_bytes() == log


def test_eval_of_a_named_model_in_another_folder(
    tmp_path, finished, tiny_on_file, command, without_times
):
    folder, _ = finished
    best = next((folder / "checkpoint/best").glob("*.pth"))
    # As training left it: without thresholds.
    given = next((folder / "checkpoint").glob(f"*_confEE/{best.name}"))
    before = given.read_bytes()
    done = command(*tiny_on_file(tmp_path / "eval", "--eval", "--checkpoint-path", str(given)))
    assert done.code == 0, done.err
    assert given.read_bytes() == before
    judged = load_model(tmp_path / "eval/checkpoint/judged" / best.name)[1]
    assert judged["exit_policies"] == load_model(best)[1]["exit_policies"]
    mine = read_result(tmp_path / "eval/result.json")["measured"]
    theirs = read_result(folder / "result.json")["measured"]
    assert set(mine) == {"floor", "exits"}
    assert without_times(mine["exits"]) == without_times(theirs["exits"])


def test_exits_on_a_named_backbone(tmp_path, finished, tiny_on_file, command, no_figures):
    """--checkpoint-path gives exits to a model; its own weights stay."""
    folder, _ = finished
    source = folder / "checkpoint/backbone_built-in-scenes.pth"
    words = tiny_on_file(tmp_path / "run", "--checkpoint-path", str(source))
    done = command(*words)
    assert done.code == 0, done.err
    assert "--- backbone" not in done.out and "--- distil" not in done.out
    best = next((tmp_path / "run/checkpoint/best").glob("*.pth"))
    given = torch.load(source, weights_only=True)["model"]
    built = torch.load(best, weights_only=True)["model"]
    for name, value in given.items():
        assert torch.equal(built[f"backbone.{name}"], value)
    # Gone on with, the run remembers where it started from.
    again = command(*tiny_on_file(tmp_path / "run", "--resume"))
    assert again.code == 0 and "--- backbone" not in again.out


@pytest.mark.parametrize(
    "words",
    [
        ("--no-distil", "--exits", "all", "--phase2", "joint"),
        ("--gate", "identity", "--phase2", "backbone"),
        ("--policy", "patience", "--early_exit_warmup", "False", "--barely_train"),
        ("--gate", "identity", "--policy", "patience", "--classifier_loss", "single"),
    ],
    ids=lambda words: " ".join(words),
)
def test_variants_run_to_the_end(tmp_path, tiny, command, no_figures, words):
    base = tiny(tmp_path / "run")
    if "--no-distil" in words:  # the words of the tiny run name the student's size
        base = without(base, "--student-dim", "--student-epochs")
    one_phase = {"joint", "identity"} & set(words)  # nothing takes turns
    if one_phase:
        base = without(base, "--bilevel_batch_count")
    done = command(*base, *words)
    assert done.code == 0, done.err
    if "identity" in words:  # no batch went to gates that cannot learn
        log = read_metrics(tmp_path / "run/metrics.jsonl")
        trained = [row for row in log if (row["stage"], row["split"]) == ("exits", "train")]
        assert trained and not any("gate_loss" in row for row in trained)
    measured = read_result(tmp_path / "run/result.json")["measured"]
    assert ("student" in measured) == ("--no-distil" not in words)
    assert len(measured["exits"]["macs_per_exit"]) == 4


def test_script_from_another_folder_with_an_odd_path(tmp_path, tiny):
    folder = tmp_path / "Läufe und 数据"
    folder.mkdir()
    script = REPOSITORY / "packages/gfnet_dynn/main.py"
    done = subprocess.run(
        [sys.executable, script, *tiny(Path("run 1")), "--stage", "prepare"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("REHEARSAL")
    assert done.stdout.splitlines()[-1].startswith("REHEARSAL")
    assert (folder / "run 1/split.json").exists()
    assert [path.name for path in folder.iterdir()] == ["run 1"]


def test_folder_of_images_with_odd_names(tmp_path, tiny, command, folder_of_images):
    """Names with spaces, other scripts and dollars, in the folder and in its classes."""
    root = folder_of_images(tmp_path / "meine Bilder é", ("straße $x^", "b c", "森林"))
    done = command(*without(tiny(tmp_path / "run ü"), *BUILTIN), "--data-path", root)
    assert done.code == 0, done.err
    record = read_result(tmp_path / "run ü/result.json")
    assert record["data"]["kind"] == "real" and record["data"]["name"] == "meine Bilder é"
    assert "REHEARSAL" not in done.out
    assert list((tmp_path / "run ü/checkpoint/best").glob("ckpt_meine-Bilder-é_*.pth"))
    assert record["measured"]["floor"]["plain"] == 1.0  # the colour tells all


EXIT_FLAGS = (
    *("--lr 0.5", "--gate-lr 0.9", "--wd 0.5", "--min-lr 0.0001", "--batch 8", "--seed 3"),
    *("--ce_ic_tradeoff 5", "--bilevel_batch_count 7", "--gate_objective zeroOne"),
    *("--gate_objective prob", "--classifier_loss single", "--classifier_loss legacy"),
    *("--early_exit_warmup false", "--phase2 joint", "--exits 0,2"),
    *("--max_warmup_epoch 1", "--num_epoch 5", "--policy max_prob", "--barely_train"),
)
BACKBONE_FLAGS = (
    *("--smoothing 0.4", "--mixup 0.8", "--cutmix 1.0", "--drop-path 0.5", "--ema 0.9"),
    *("--finetune-wd 0.9", "--clip-grad 0.01", "--amp bf16", "--backbone-lr 0.1", "--aa rand-m9"),
    *("--finetune-batch 8", "--backbone-dim 8", "--backbone-arch gfnet-b --backbone-epochs 3"),
    *("--split_ratio 0.5", "--split-seed 4", "--finetune-warmup 0", "--seed 3"),
)


def trace(folder: Path) -> tuple[bytes, list[str]]:
    """What a stage leaves: its metrics, and the hashes of its models' weights."""
    models = [path for path in sorted(folder.rglob("*.pth")) if "_warmup" not in path.parts]
    hashes = [load_model(path)[1]["sha256"] for path in models]
    return (folder / "metrics.jsonl").read_bytes(), hashes


@pytest.fixture(scope="module")
def bases(tmp_path_factory, finished, tiny, tiny_on_file, command) -> dict[str, tuple]:
    """For each stage: what makes its words, and what it leaves without further flags."""
    student = str(finished[0] / "checkpoint/student_built-in-scenes.pth")

    def exits(folder: Path, *more: str) -> list[str]:
        words = tiny_on_file(folder, "--stage", "exits", "--checkpoint-path", student)
        if "joint" in more:
            words = without(words, "--bilevel_batch_count")
        return [*words, *more]

    def backbone(folder: Path, *more: str) -> list[str]:
        return tiny(folder, "--stage", "backbone", *more)

    found = {}
    for make in (exits, backbone):
        folder = tmp_path_factory.mktemp(make.__name__) / "run"
        assert command(*make(folder)).code == 0
        found[make.__name__] = (make, trace(folder))
    return found


@pytest.mark.parametrize(
    ("stage", "flag"),
    [*(("exits", flag) for flag in EXIT_FLAGS), *(("backbone", flag) for flag in BACKBONE_FLAGS)],
)
def test_every_flag_changes_the_training(tmp_path, command, monkeypatch, bases, stage, flag):
    from gfnet_dynn import pipeline

    nothing = {"plain": 0.0, "engineered": 0.0}
    monkeypatch.setattr(pipeline, "floor_accuracy", lambda *words: nothing)
    words, base = bases[stage]
    more = flag.split()
    if flag == "--barely_train":  # it shows where an epoch has more than 21 batches: 97 images
        more = [*more, "--batch", "4"]
        plain = command(*words(tmp_path / "plain", "--batch", "4"))
        assert plain.code == 0
        base = trace(tmp_path / "plain")
    done = command(*words(tmp_path / "run", *more))
    assert done.code == 0, done.err
    found = trace(tmp_path / "run")
    assert all(found) and found != base


def test_same_flags_and_another_number_of_threads_change_nothing(tmp_path, command, bases):
    words, base = bases["backbone"]
    done = command(*words(tmp_path / "run", "--num_workers", "0"))
    assert done.code == 0
    assert trace(tmp_path / "run") == base


def test_a_resumed_run_computes_with_the_threads_it_began_with(tmp_path, tiny, command):
    """Another number of threads adds in another order: the end would differ in its last bits."""
    import torch

    before = torch.get_num_threads()
    words = tiny(tmp_path / "run", "--stage", "prepare")
    place = words.index("--threads")
    del words[place : place + 2]
    try:
        assert command(*words, "--threads", "3").code == 0
        assert json.loads((tmp_path / "run" / "config.json").read_text())["threads"] == 3
        torch.set_num_threads(1)
        assert command(*words, "--resume").code == 0
        assert torch.get_num_threads() == 3
        done = command(*words, "--resume", "--threads", "2")
        assert done.code == 1 and "started with threads=3, this command says 2" in done.err
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("command", "whole"),
    [
        ("main.py --stage backbone --scale short", "main.py --scale short"),
        ("main.py --scale short --stage=distil", "main.py --scale short"),
        ("main.py --data-path 'a b' --stage all", "main.py --data-path 'a b'"),
        ("main.py --scale short", "main.py --scale short"),
    ],
)
def test_a_record_names_the_command_of_all_its_stages(command, whole):
    assert of_all_stages(command) == whole

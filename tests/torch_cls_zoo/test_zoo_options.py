"""The wiring: every option of the table changes what a run does, or refuses what it did before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from shared_core.datasets.splitting.manifest import Manifest
from shared_core.for_torch.checkpoints import load_checkpoint
from shared_core.runs import UsageError
from torch_cls_zoo.applications import train as training
from torch_cls_zoo.applications.launch import plan_processes
from torch_cls_zoo.config import parse
from torch_cls_zoo.dataloader import loaders
from torch_cls_zoo.dataloader.folders import open_data
from torch_cls_zoo.dataloader.sample_files import write_sample_file
from torch_cls_zoo.options import OPTIONS
from torch_cls_zoo.utils.tensorboard_log import TensorBoardLog

# A training of three steps at one rate; words that follow win.
BASE = (
    "--train --data {data} --arch test_resnet --image_size 16 16 --epochs 1 --lr 0.01 "
    "--lr_ratios 1 --lr_steps 1 -b 8 --threads 1 -j 1 --no-cuda --init none --no-floor"
)
RULE = (
    "--train --data {data} --arch test_resnet --image_size 16 16 --epochs 2 --warmup 1 --lr 0.01 "
    "-b 12 --threads 1 -j 1 --no-cuda --init none --no-floor"
)
USE = "--data {data} --resume {weights} -b 8 --threads 1 -j 1 --no-cuda"

# Of the trained network's weights: what must be said before, and the option.
WEIGHTS = {
    "data": (BASE, "--data {second}"),
    "seed": (BASE, "--seed 7"),
    "image_size": (BASE, "--image_size 20 16"),
    "batch_size": (BASE, "-b 12"),
    "quarantine": (BASE, "--quarantine {quarantine}"),
    "split": (BASE, "--split {split}"),
    "arch": (BASE, "--arch test_efficientnet"),
    "init": (BASE, "--init {weights} --recipe readme"),
    "recipe": (RULE, "--recipe scratch --amp fp32"),
    "head_lr": (BASE, "--head_lr 0.1"),
    "layer_decay": (BASE, "--layer_decay 0.5"),
    "schedule": (RULE, "--schedule cosine"),
    "clip_grad": (BASE + " --opt sgd", "--clip_grad 0.1"),
    "drop_path": (BASE, "--drop_path 0.9"),
    "probe": (BASE, "--probe"),
    "freeze_bn": (BASE, "--freeze_bn"),
    "ema": (BASE, "--ema 0.5"),
    "accumulate": (BASE, "--accumulate 2"),
    "unfreeze": (BASE + " --init {weights} --recipe readme", "--unfreeze 1"),
    "erasing": (BASE, "--erasing 1"),
    "quarter_turns": (BASE, "--quarter_turns"),
    "balanced": (BASE, "--balanced"),
    "label_smoothing": (BASE, "--label_smoothing 0.3"),
    "crop": (BASE, "--crop 0.3"),
    "flip": (BASE, "--flip 1"),
    "advprop": (BASE + " --arch shufflenet_v2_x0_5", "--advprop"),
    "resume": (BASE, "--resume {weights}"),
    "epochs": (RULE, "--epochs 3"),
    "opt": (BASE, "--opt sgd"),
    "lr": (BASE, "--lr 0.02"),
    "lr_ratios": (BASE, "--lr_ratios 0.5"),
    "lr_steps": (BASE + " --epochs 2 --lr_ratios 1 0.1 --lr_steps 1 2", "--lr_steps 2 3"),
    "momentum": (BASE + " --opt sgd", "--momentum 0.5"),
    "wd": (BASE, "--wd 0.1"),
    "warmup": (RULE + " --epochs 4", "--warmup 0"),
    "amp": (BASE + " --image_size 48 48", "--amp bf16"),
    "sparsity": (BASE, "--sparsity"),
    "slim": (BASE + " --sparsity", "--slim 0.1"),
    "bias_prior": (BASE, "--bias_prior 0.5 0.3 0.2"),
    "criterion": (BASE, "--criterion bce"),
    "weighted_loss": (BASE + " --threshold_loss --class_matrices {matrices}", "--weighted_loss"),
    "threshold_loss": (BASE, "--threshold_loss --class_matrices {matrices}"),
    "class_matrices": (BASE + " --threshold_loss", "--class_matrices {matrices}"),
    "ghm_loss": (BASE, "--ghm_loss"),
    "ghm_counts": (BASE + " --ghm_loss", "--ghm_counts original"),
    "ohm_loss": (BASE, "--ohm_loss"),
    "hard_ratio": (BASE + " --ohm_loss", "--hard_ratio 0.2"),
    "aug": (BASE, "--aug"),
    "aug_policy": (BASE, "--aug_policy cifar10"),
    "mixup": (BASE, "--mixup --mixup_ratio 1"),
    "mixup_ratio": (BASE + " --mixup", "--mixup_ratio 1"),
    "mixup_alpha": (BASE + " --mixup --mixup_ratio 1", "--mixup_alpha 0.2"),
    "mix_targets": (BASE + " --mixup --mixup_ratio 1 --ohm_loss", "--mix_targets"),
    "cutmix": (BASE, "--cutmix --mixup_ratio 1"),
    "cutmix_alpha": (BASE + " --cutmix --mixup_ratio 1", "--cutmix_alpha 0.1"),
    "multi_scale": (BASE, "--multi_scale"),
    "distill": (BASE, "--distill --knowledge_dir {knowledge}"),
    "knowledge_dir": (BASE + " --distill --knowledge_dir {knowledge}", "--knowledge_dir {other}"),
    "curriculum_learning": (BASE, "--curriculum_learning --knowledge_dir {knowledge}"),
}  # fmt: skip
# Of what is written and said: the files with their sizes, and the numbers that a mode returns.
LEFT = {
    "train": (USE + " -e", "--train --epochs 1 --warmup 0 --no-floor"),
    "evaluate": (USE + " --knowledge val --knowledge_dir {made}", "-e"),
    "find_lr": (BASE.replace("--train ", "--find_lr 5 ").replace(" --no-floor", ""), "--find_lr 9"),
    "knowledge": (USE + " -e", "--knowledge val --knowledge_dir {made}"),
    "knowledge_name": (USE + " --knowledge val --knowledge_dir {made}",
                       "--knowledge_name distill_b.txt"),
    "make_curriculum": (USE + " -e", "--make_curriculum val --knowledge_dir {made}"),
    "curriculum_thresholds": (USE + " --make_curriculum val --knowledge_dir {made}",
                              "--curriculum_thresholds 0.9 0.4 0.2 0.0"),
    "curriculum_weights": (USE + " --make_curriculum val --knowledge_dir {made}",
                           "--curriculum_weights 4 3 2 1"),
    "visual_data": (USE + " -e", "--visual_data val --visual_number 1 --visual_method grad-cam"),
    "visual_method": (USE + " --visual_data val --visual_number 1 --visual_method grad-cam",
                      "--visual_method grad-cam++"),
    "visual_layer": (USE + " --visual_data val --visual_number 1 --visual_method grad-cam",
                     "--visual_layer layer2"),
    "visual_number": (USE + " --visual_data val --visual_number 1 --visual_method grad-cam",
                      "--visual_number 2"),
    "floor": (BASE, "--floor"),
    "patience": (RULE + " --epochs 6 --lr 1e-9", "--patience 2"),
    "compile": (BASE, "--compile"),
    "export": (USE + " -e", "--export --int8 no"),
    "jit": (USE + " --export --int8 no", "--jit"),
    "int8": (USE + " --export --int8 no", "--int8 yes --max_accuracy_loss 1"),
    "max_accuracy_loss": (USE + " --export --int8 no --int8 yes --max_accuracy_loss 1",
                          "--max_accuracy_loss 0.9"),
    "summary": (USE + " -e", "--summary"),
    "print_freq": (BASE, "--print-freq 1"),
    "save_every": (BASE, "--save_every 1"),
    "histograms": (BASE, "--no-histograms"),
    "logdir": (BASE, "--logdir {made}"),
    "output": (BASE, "--output {made}"),
    "workers": (BASE, "-j 3"),
    "threads": (BASE, "--threads 2"),
}  # fmt: skip
# One of the two is refused.
REFUSED = {
    "num_classes": (BASE, "--num_classes 4"),
    "distill_allow_missing": (BASE + " --distill --knowledge_dir {gaps}",
                              "--distill_allow_missing 2"),
    "go_on": (BASE + " --output {there}", "--continue"),
    "fresh": (BASE + " --output {there}", "--fresh"),
}  # fmt: skip
# Of the processes that are planned on a machine with two GPUs.
PLANS = {
    "device": ("--train", "--device cuda:1"),
    "cuda": ("--train", "--no-cuda"),
    "gpus": ("--train", "--gpus 1"),
    "nodes": ("--train --rank 0", "--nodes 2"),
    "rank": ("--train --nodes 2 --rank 0", "--rank 1"),
    "init_method": ("--train --gpus 1", "--init_method tcp://127.0.0.1:1"),
    "sync_bn": ("--train --gpus 1", "--sync_bn"),
}


def test_every_option_has_a_line_here():
    lines = [*WEIGHTS, *LEFT, *REFUSED, *PLANS]
    assert len(lines) == len(set(lines)) and set(lines) == set(OPTIONS)


@pytest.fixture(scope="module")
def places(tmp_path_factory, zoo_folder) -> dict[str, Path]:
    """What the words name."""
    root = tmp_path_factory.mktemp("wiring")
    data = zoo_folder(root / "data", counts={"train": 8, "val": 3, "test": 3}, size=(18, 20))
    counts = {"train": 8, "val": 3, "test": 3}
    second = zoo_folder(root / "second", counts=counts, size=(18, 20), noise=90)
    open_data(str(data), root / "first")
    entries = Manifest.read(root / "first" / "split.json", root=data)
    swapped = {"train": "train", "calibration": "test", "test": "calibration"}
    moved = [entry.path for entry in entries.entries if entry.split == "train"][:2]
    rows = tuple(
        entry._replace(split="test" if entry.path in moved else swapped[entry.split])
        for entry in entries.entries
    )
    replace(entries, entries=rows).write(root / "split.json")
    names = sorted(path.relative_to(data).as_posix() for path in (data / "train").rglob("*.png"))
    rng = np.random.default_rng(0)
    for name, rows_of in (("knowledge", names), ("other", names), ("gaps", names[2:])):
        soft = rng.dirichlet(np.ones(3), len(rows_of))
        write_sample_file(root / name / "distill.txt", rows_of, soft, about={})
    weights = rng.choice([0.0, 0.5, 1.0], (len(names), 1))
    write_sample_file(root / "knowledge" / "curriculum.txt", names, weights, about={})
    (root / "matrices.yaml").write_text(
        "weights: [[1, 0.2, 0.2], [0.2, 3, 0.2], [0.2, 0.2, 2]]\n"
        "low: {diagonal: -0.1, other: 0.3}\nup: {diagonal: 0.4, other: 1.1}\n"
    )
    (root / "quarantine.txt").write_text(f"{names[0]}\tbad\n")
    return {
        "data": data, "second": second, "split": root / "split.json",
        "quarantine": root / "quarantine.txt",
        "matrices": root / "matrices.yaml", "knowledge": root / "knowledge",
        "other": root / "other", "gaps": root / "gaps", "root": root,
    }  # fmt: skip


@pytest.fixture(scope="module")
def perform(places, zoo_command) -> Callable[[str], dict]:
    """Run words in folders of their own; the same words are run once."""
    known: dict[str, dict] = {}

    def run(words: str) -> dict:
        if words in known:
            return known[words]
        if "weights" not in places:
            first = places["root"] / "weights"
            done = zoo_command(*BASE.format(**places).split(), "--output", first, "--seed", 99)
            assert done.code == 0, done.err
            places["weights"] = next((first / "checkpoints").glob("model_best*"))
            places["there"] = first
        home = places["root"] / f"run{len(known)}"
        filled = words.format(**places, made=home / "made")
        more = [] if "--output" in filled else ["--output", home / "out"]
        seen: dict = {"threads": set(), "saves": 0, "gammas": 0, "graphs": 0}
        with pytest.MonkeyPatch.context() as patch:
            _watch(patch, seen)
            done = zoo_command(*filled.split(), *more)
        seen.update(code=done.code, err=done.err, home=home, out=_plain(done.out, home))
        known[words] = seen
        return seen

    return run


def _watch(patch: pytest.MonkeyPatch, seen: dict) -> None:
    """Note what leaves no trace: threads, saves, histograms."""
    loader, save = loaders.BatchLoader, training.Training._save

    def make(*args, threads, **more):
        seen["threads"].add(("decode", threads))
        seen["threads"].add(("compute", torch.get_num_threads()))
        return loader(*args, threads=threads, **more)

    def counted(self):
        seen["saves"] += 1
        save(self)

    def gammas(self, model, step):
        seen["gammas"] += 1

    def graph(module, inputs):
        seen["graphs"] += 1
        return module.forward

    patch.setattr(loaders, "BatchLoader", make)
    patch.setattr(training.Training, "_save", counted)
    patch.setattr(TensorBoardLog, "gammas", gammas)
    patch.setattr(torch, "compile", partial(torch.compile, backend=graph))


def _plain(text: str, home: Path) -> str:
    """What was said without folders, times and sizes."""
    kept = [line for line in text.splitlines() if " ms " not in line and "bytes" not in line]
    return "\n".join(kept).replace(str(home), "").replace("0:00 left", "")


def weights_of(home: Path) -> str:
    (file,) = (home / "out" / "checkpoints").glob("checkpoint_*.pth")
    weights, facts = load_checkpoint(file)
    digest = hashlib.sha256(facts["architecture"].encode())
    for name, value in weights.items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def left_by(seen: dict) -> tuple:
    home = seen["home"]
    files = sorted(
        (path.relative_to(home).as_posix(), path.read_bytes())
        for path in home.rglob("*")
        if path.suffix in (".txt", ".png", ".json") and path.name not in ("result.json",)
        and path.name != "config.json" and path.parent.name != "model" and path.name[0] != "."
    )  # fmt: skip
    shapes = sorted(path.relative_to(home).as_posix() for path in home.rglob("*.onnx"))
    int8 = [json.loads(path.read_text())["measured"]["int8"] for path in home.rglob("model.json")]
    wished = [one and one["max_accuracy_loss"] for one in int8]
    folders = sorted(path.name for path in home.rglob("*") if path.is_dir())
    notes = (
        sorted(seen["threads"]),
        seen["saves"],
        seen["gammas"],
        seen["graphs"] > 0,
        seen["out"],
    )
    return files, shapes, wished, folders, notes


def ok(seen: dict) -> dict:
    assert seen["code"] == 0, seen["err"]
    return seen


@pytest.mark.parametrize("name", WEIGHTS)
def test_it_changes_the_weights(name, perform):
    base, words = WEIGHTS[name]
    before, after = ok(perform(base)), ok(perform(f"{base} {words}"))
    assert weights_of(before["home"]) != weights_of(after["home"])


def test_the_same_words_change_nothing(perform):
    """Or else every test above would pass."""
    first, second = ok(perform(BASE)), ok(perform(BASE + " "))
    assert first["home"] != second["home"]
    assert weights_of(first["home"]) == weights_of(second["home"])
    assert left_by(first) == left_by(second)


@pytest.mark.parametrize("name", LEFT)
def test_it_changes_what_is_left_or_said(name, perform):
    base, words = LEFT[name]
    assert left_by(ok(perform(base))) != left_by(ok(perform(f"{base} {words}")))


@pytest.mark.parametrize("name", REFUSED)
def test_it_decides_what_is_refused(name, perform):
    base, words = REFUSED[name]
    codes = {perform(base)["code"], perform(f"{base} {words}")["code"]}
    assert codes == {0, 1}


@pytest.mark.parametrize("name", PLANS)
def test_it_changes_the_processes(name):
    base, words = PLANS[name]

    def planned(line: str):
        config = parse(line.split())
        try:
            return plan_processes(config.processes, config.given, gpus=2, env={})
        except UsageError as error:
            return str(error)

    assert planned(base) != planned(f"{base} {words}")

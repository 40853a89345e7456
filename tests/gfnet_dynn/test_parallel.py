"""Two processes under torchrun against one process with the doubled batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared_core.runs import read_metrics, read_result

REPOSITORY = Path(__file__).resolve().parents[2]
# Nothing random but the order and the views, no loss that is not a mean over the batch.
SAME = (
    *("--mixup", "0", "--cutmix", "0", "--aa", "none", "--nd-weight", "0"),
    *("--classifier_loss", "legacy", "--backbone-lr", "1e-4", "--student-lr", "1e-4"),
    *("--deep-supervision", "0.5", "--lr", "0.005"),
)


def torchrun(*words: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--master_addr", "127.0.0.1", "--master_port", str(port)),
            *(str(REPOSITORY / "packages/gfnet_dynn/main.py"), *words),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def with_batch(words: list[str], size: int) -> list[str]:
    for flag in ("--batch", "--finetune-batch"):
        words[words.index(flag) + 1] = str(size)
    return words


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny, server):
    root = tmp_path_factory.mktemp("parallel")
    alone, shared = root / "alone", root / "shared"
    words = with_batch(tiny(alone, *SAME), 16)
    assert server.run(words, out=root / "out.txt", figures=False) == 0, (
        root / "out.txt"
    ).read_text()
    done = torchrun(*with_batch(tiny(shared, *SAME), 8))
    assert done.returncode == 0, done.stderr[-3000:]
    return alone, shared, done


@pytest.mark.slow
def test_two_processes_learn_what_one_does(both):
    alone, shared, _ = both
    for name in ("backbone_built-in-scenes.pth", "student_built-in-scenes.pth"):
        a, b = (
            torch.load(folder / "checkpoint" / name, weights_only=True)["model"]
            for folder in (alone, shared)
        )
        assert list(a) == list(b)
        for key in a:
            assert (a[key] - b[key]).abs().max() < 2e-3 * max(1.0, float(a[key].abs().max())), key
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (alone, shared))
    # One process writes: as many lines, of the same epochs.
    assert [(r["stage"], r["split"], r["step"]) for r in first] == [
        (r["stage"], r["split"], r["step"]) for r in second
    ]
    for a, b in zip(first, second, strict=True):
        if a["split"] == "val" and a["stage"] == "exits":
            assert a["total_cost"] == pytest.approx(b["total_cost"], rel=0.15)
            assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


@pytest.mark.slow
def test_evaluation_is_that_of_the_whole_split(both, tiny_on_file, command, no_figures):
    _, shared, done = both
    record = read_result(shared / "result.json")
    student = record["measured"]["student"]["accuracy"]
    words = ("--eval", "--checkpoint-path", str(best(shared)))
    again = command(*tiny_on_file(shared.parent / "x", *words))
    assert again.code == 0
    alone = read_result(shared.parent / "x/result.json")["measured"]["exits"]
    assert alone["final_accuracy"] == record["measured"]["exits"]["final_accuracy"] == student
    # The gated accuracy of the chosen epoch, gathered from two, is that of the file on one.
    facts = torch.load(best(shared), weights_only=True)["facts"]
    assert "calibration_gated_accuracy" in str(facts)
    assert done.stdout.count("REHEARSAL") == 2  # first and last line, of one process


def best(folder: Path) -> Path:
    return next((folder / "checkpoint/best").glob("*.pth"))


def test_what_two_processes_cannot_do(tmp_path, tiny, command, monkeypatch):
    from gfnet_dynn import pipeline
    from shared_core.for_torch.distributed import World

    monkeypatch.setattr(pipeline, "join", lambda device: World(0, 2, 0, device))
    for words in (("--classifier_loss", "single"), ("--barely_train",)):
        done = command(*tiny(tmp_path / "run", *words))
        assert done.code == 2 and "under torchrun" in done.err


class Wrapped(torch.nn.Module):
    """Stands for DistributedDataParallel: it knows what learned when it was made."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.learns = {name for name, p in inner.named_parameters() if p.requires_grad}

    def forward(self, *inputs):
        self.calls += 1
        return self.inner(*inputs)


def test_the_gradients_of_what_learns_are_averaged_in_every_phase(monkeypatch):
    """A step that goes around the wrapper trains each process on its own share alone."""
    from gfnet_dynn.models.build import build_gfnet
    from gfnet_dynn.models.gfnet_dynn import GFNetDynn
    from gfnet_dynn.train import exit_training
    from gfnet_dynn.train.phases import Phase
    from shared_core.for_torch.distributed import World

    made = []

    def wrap(model, world):
        assert world.world_size == 2
        made.append(Wrapped(model))
        return made[-1]

    monkeypatch.setattr(exit_training, "wrap", wrap)
    model = GFNetDynn(
        build_gfnet("gfnet-ti", img_size=8, patch_size=4, num_classes=3, embed_dim=4, depth=3),
        [0, 1],
    )
    training = exit_training.ExitTraining(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        world=World(0, 2, 0, torch.device("cpu")),
    )
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    steps = {
        Phase.WARMUP: ("exit_heads",),
        Phase.GATE: ("gates",),
        Phase.CLASSIFIER: ("exit_heads",),
        Phase.BACKBONE: ("backbone",),
        Phase.JOINT: ("exit_heads", "gates", "backbone"),
    }
    for _ in range(2):  # back in a phase, its wrapper is used again
        for phase in steps:
            training.step(phase, images, labels)
    assert [one.calls for one in made] == [2] * len(steps)
    for one, parts in zip(made, steps.values(), strict=True):
        assert {name.split(".")[0] for name in one.learns} == set(parts)
    training.frozen_exits = (0,)
    training.step(Phase.WARMUP, images, labels)
    assert {name.split(".")[1] for name in made[-1].learns} == {"1"} and made[-1].calls == 1


def test_fine_tuning_steps_through_the_wrapper(tmp_path, finished, monkeypatch):
    """All of the task is wrapped, whatever learns beside the network with it."""
    import json

    from gfnet_dynn.data_loader_helper import prepare_data
    from gfnet_dynn.run import Run
    from gfnet_dynn.settings import Settings
    from gfnet_dynn.tracking import RunLog
    from gfnet_dynn.train import finetune, networks
    from gfnet_dynn.train.parallel import ALONE

    made = []
    monkeypatch.setattr(finetune, "wrap", lambda task, world: made.append(Wrapped(task)) or made[0])
    config = json.loads((finished[0] / "config.json").read_text())
    settings = Settings.of(config)
    data = prepare_data(settings.source, tmp_path, seed=0)
    run = Run(settings, config, data, RunLog(tmp_path), torch.device("cpu"), "fp32", ALONE)
    networks.train_backbone(run)
    (one,) = made
    assert one.calls == 2 * 6  # epochs, batches of 16 of 96 images
    assert one.learns == {name for name, _ in one.inner.named_parameters()}
    assert isinstance(one.inner, finetune.Task)

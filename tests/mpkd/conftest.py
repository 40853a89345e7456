"""What the tests of mpkd's commands share: tiny runs, a teacher, processes that may be killed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from command_tools import Done, Server, run_main
from mpkd.dataset.sources import load_data
from mpkd.few_bits import learner
from mpkd.quant.finish import Material
from mpkd.run_context import Run
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.utils.config import load_config
from shared_core.for_torch.checkpoints import weights_sha256
from shared_core.runs import StageLog

# Digits at 8 pixels, a student of 1,000 weights, one thread: a stage in a second.
SETTINGS = {
    "dataset.image_size": 8, "dataset.max_images": 160, "dataset.workers": 0,
    "experiment.threads": 1, "experiment.epochs": 2, "experiment.batch_size": 32,
    "experiment.device": "cpu", "model.student_widths": "[8,16]",
    "model.teacher_model": "simple_cnn", "teacher.epochs": 1, "distillation.views": 2,
    "quantization.calib_samples": 64,
}  # fmt: skip

SETUP = """
import matplotlib.backends.backend_agg, matplotlib.figure
from mpkd import main, pipeline
"""


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    started = Server(SETUP, env={"OMP_NUM_THREADS": "1"})
    yield started
    started.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A run sets torch's threads; put them back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def words() -> Callable[..., list[str]]:
    """The words of a tiny run into a folder; ``changes`` are keys of the configuration."""

    def make(output: Path, *more: str, **changes: object) -> list[str]:
        settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
        keys = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
        return ["--scale", "rehearsal", "--output", str(output), *keys, *more]

    return make


@pytest.fixture(scope="session")
def command() -> Callable[..., Done]:
    """Run ``main.py`` (or another entry) in this process as a shell would see it."""
    from mpkd import main

    def call(*argv: object, entry: Callable | None = None) -> Done:
        return run_main(entry or main.main, argv)

    return call


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory, words, command) -> Path:
    """A teacher of the digits, trained by the command."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    more = {"teacher__epochs": 2, "teacher__learning_rate": 1.0e-2, "dataset__max_images": 600}
    for stage in ("prepare", "teacher"):
        resume = ["--resume"] if stage == "teacher" else []
        done = command(*words(folder, "--stage", stage, *resume, **more))
        assert done.code == 0, done.err
    return folder / "checkpoints" / "teacher.pth"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, words, command, teacher_file) -> tuple[Path, Done]:
    """A whole tiny run with every stage, and what it said."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = command(
        *words(
            folder, model__teacher_ckpt=teacher_file, quantization__method="ptq",
            export__tensorrt="true",
        )
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder, done


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """sha256 of every checkpoint of a run."""

    def of(folder: Path) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "checkpoints").glob("*.pth"))
        }

    return of


@pytest.fixture(scope="session")
def image_folder() -> Callable[..., Path]:
    """Write class folders; a class's images share a colour, noise tells them apart."""

    def make(root: Path, classes: Sequence[str] = ("a", "b"), *, images: int = 6, size: int = 12):
        rng = np.random.default_rng(0)
        for label, name in enumerate(classes):
            (root / name).mkdir(parents=True)
            base = np.full((size, size, 3), 60 + 120 * label // max(1, len(classes) - 1))
            for index in range(images):
                noise = rng.integers(-40, 40, base.shape)
                pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
                data = cv2.imencode(".png", pixels)[1].tobytes()
                (root / name / f"{index:03d}.png").write_bytes(data)
        return root

    return make


@dataclass(frozen=True)
class Digits:
    """A small student trained on scikit-learn's digits at 16 pixels, and a run on them."""

    run: Run
    net: torch.nn.Module

    @property
    def accuracy(self) -> float:
        return self.evaluate(self.net)

    @property
    def calibration(self) -> torch.Tensor:
        return torch.cat(self.run.calibration_images(256))

    def evaluate(self, net: torch.nn.Module) -> float:
        """Accuracy on the 360 test images."""
        return self.run.evaluate(net).accuracy

    @property
    def test_images(self) -> tuple[torch.Tensor, np.ndarray]:
        """Normalised, and their labels."""
        loader = self.run.evaluation_loader("test")
        parts = [(batch.images.clone(), batch.labels) for batch in loader]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]).numpy()

    def change(self, folder: Path, **changes: object) -> Digits:
        """The same with other settings and a folder of its own."""
        config = self.run.config | {k.replace("__", "."): v for k, v in changes.items()}
        csv = MetricsLogger(folder / "t.csv", run_id="t")
        return replace(self, run=replace(
            self.run, config=config, folder=folder, log=StageLog(folder), csv=csv
        ))  # fmt: skip

    def material(self, states: list | None = None, *, teaches: bool = True) -> Material:
        """What the quantization stage of this run works with; its teacher is the net."""
        digest = weights_sha256(self.net.state_dict())
        guide = copy.deepcopy(self.net).eval() if teaches else None
        return Material(
            self.calibration,
            self.evaluate,
            learn=learner(self.run, guide, digest, [] if states is None else states),
        )


@pytest.fixture(scope="session")
def mpkd_digits(tmp_path_factory) -> Digits:
    from mpkd.model.student import SimpleCNN

    folder = tmp_path_factory.mktemp("digits")
    keys = {
        "dataset.name": "digits", "dataset.image_size": 16, "dataset.workers": 0,
        "dataset.augment": False, "experiment.batch_size": 64, "experiment.weight_decay": 0.0,
        "distillation.temperature": 2.0, "distillation.cache_teacher_logits": False,
        "quantization.learning_rate": 2.0e-3, "quantization.epochs": 1, "logging.log_interval": 0,
    }  # fmt: skip
    config = load_config(None, (), overrides=keys)
    data = load_data(config, folder, data_root=None)
    csv = MetricsLogger(folder / "t.csv", run_id="t")
    run = Run(config, data, folder, StageLog(folder), csv, torch.device("cpu"), scale="rehearsal")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SimpleCNN(10, widths=(16, 16, 64))
    loader, epochs = run.training_loader("fixture"), 8
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    total = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=total)
    for epoch in range(epochs):
        loader.loader.order.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net.train()(batch.images), batch.labels).backward()
            optimizer.step()
            schedule.step()
    made = Digits(run, net.eval())
    assert made.accuracy > 0.95
    return made

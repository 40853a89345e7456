"""What the tests of mpkd's commands share: tiny runs, a teacher, processes that may be killed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from command_tools import Done, Server, run_main

# Digits at 8 pixels, a student of 1,000 weights, one thread: a stage in a second.
SETTINGS = {
    "dataset.image_size": 8, "dataset.max_images": 160, "dataset.workers": 0,
    "experiment.threads": 1, "experiment.epochs": 2, "experiment.batch_size": 32,
    "experiment.device": "cpu", "model.student_widths": "[8,16]",
    "model.teacher_model": "simple_cnn", "teacher.epochs": 1, "distillation.views": 2,
    "quantization.calib_samples": 64, "export.onnx": "false",
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
            export__onnx="true", export__qdq="true", export__tensorrt="true",
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


@dataclass
class Digits:
    """A small student trained on scikit-learn's digits at 16 pixels, and what it was trained on."""

    net: torch.nn.Module
    accuracy: float  # of the net on val_images, in [0, 1]
    train_images: torch.Tensor
    train_labels: torch.Tensor
    val_images: torch.Tensor
    val_labels: torch.Tensor
    steps: int  # batches of 64 in an epoch

    @property
    def calibration(self) -> torch.Tensor:
        return self.train_images[:256]

    @torch.no_grad()
    def evaluate(self, net: torch.nn.Module) -> float:
        right = net.eval()(self.val_images).argmax(1) == self.val_labels
        return float(right.double().mean())

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Shuffled by epoch; the same epoch gives the same batches."""
        order = torch.randperm(
            len(self.train_images), generator=torch.Generator().manual_seed(epoch)
        )
        for chosen in order.split(64)[: self.steps]:
            yield self.train_images[chosen], self.train_labels[chosen]


@pytest.fixture(scope="session")
def mpkd_digits() -> Digits:
    from sklearn.datasets import load_digits

    from mpkd.model.student import SimpleCNN

    data = load_digits()
    small = torch.from_numpy((data.images / 16).astype(np.float32))
    images = small.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].repeat(1, 3, 1, 1)
    images, labels = (images - 0.3) / 0.37, torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SimpleCNN(10, widths=(16, 16, 64))
    made = Digits(net, 0.0, images[:1297], labels[:1297], images[1297:], labels[1297:], 20)
    epochs, threads = 8, torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=20 * epochs)
    for epoch in range(epochs):
        for batch, truth in made.batches(epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net.train()(batch), truth).backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    made.accuracy = made.evaluate(net)
    assert made.accuracy > 0.95
    return made

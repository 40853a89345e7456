"""What the tests of the deploy half share: a small model whose answers differ, and its pictures."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import paddle

from shared_core.runs import run_command
from visiondistill_gc.models.student_model import build_student
from visiondistill_gc.utils.model_files import save_model

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "packages" / "visiondistill_gc"
CLASSES = ("Harmful", "Kitchen", "Other", "Recyclable")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)  # not ImageNet's: they must come from the file
SIZE = 32


@dataclass
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


def call(module: ModuleType, *words: object) -> Done:
    """A command in this process, as a shell would see it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_command(module.main, [str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def make_pixels(count: int = 9, size: int = 40) -> np.ndarray:
    """Pictures uint8 ``(N, size, size, 3)``, each a coarse pattern of colours of its own."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 5, 5, 3)).astype(np.uint8)
    return np.stack([cv2.resize(c, (size, size), interpolation=cv2.INTER_NEAREST) for c in coarse])


def encode(pixels: np.ndarray, kind: str = ".png") -> bytes:
    """An image file of RGB pixels."""
    return cv2.imencode(kind, np.ascontiguousarray(pixels[..., ::-1]))[1].tobytes()


def views(pixels: np.ndarray) -> np.ndarray:
    """What evaluation sees, by OpenCV alone: the whole image squeezed, normalised in float64."""
    small = np.stack([cv2.resize(p, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR) for p in pixels])
    return ((small / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)


def make_net(seed: int = 0):
    """A narrow student whose logits differ from picture to picture."""
    paddle.seed(seed)
    net = build_student(num_classes=4, scale=0.25, hidden=16, frozen=0, dropout=0.0)
    net.eval()

    def even_out(norm, _, out):
        """Centre each channel, one factor a layer: pictures stay apart, rounding stays small."""
        axes = [0, *range(2, out.ndim)]
        mean = out.mean(axis=axes)
        factor = 1 / (out - out.mean(axis=axes, keepdim=True)).std()
        norm.weight.set_value(norm.weight * factor)
        norm.bias.set_value((norm.bias - mean) * factor)
        return (out - out.mean(axis=axes, keepdim=True)) * factor

    norms = [m for m in net.sublayers() if "BatchNorm" in type(m).__name__]
    hooks = [norm.register_forward_post_hook(even_out) for norm in norms]
    with paddle.no_grad():
        net(paddle.to_tensor(views(make_pixels(32))))
    for hook in hooks:
        hook.remove()
    with paddle.no_grad():
        logits = net(paddle.to_tensor(views(make_pixels(32))))
    last, factor = net.classifier[-1], 1.5 / logits.std(axis=0)
    last.weight.set_value(last.weight * factor)  # every class is the best of some picture
    last.bias.set_value((last.bias - logits.mean(axis=0)) * factor)
    return net


def save(path: Path, net=None) -> Path:
    """A model file."""
    save_model(
        path,
        make_net() if net is None else net,
        class_names=CLASSES,
        architecture="mobilenet_v2",
        input_size=SIZE,
        mean=MEAN,
        std=STD,
        split_hash="a" * 64,
    )
    return path


def true_probabilities(pixels: np.ndarray, net=None) -> np.ndarray:
    """Softmax in float64 of a plain pass, ``(N, 4)``."""
    with paddle.no_grad():
        logits = (make_net() if net is None else net)(paddle.to_tensor(views(pixels)))
    z = logits.numpy().astype(np.float64)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@contextlib.contextmanager
def started(
    words: Sequence[object], alive: str, *, seconds: float = 60
) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a process of its own, and its address; it prints ``... on URL`` first.

    Args:
        words: script and options.
        alive: path that answers when it is up.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        said = ""
        while " on http://" not in said:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"it did not start: {said}")
            said += line
        url = said.rpartition(" on ")[2].split()[0].rstrip("/")
        due = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(url + alive, timeout=5).close()
                break
            except OSError:
                if time.monotonic() > due:
                    raise
                time.sleep(0.05)
        yield process, url
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        process.stdout.close()

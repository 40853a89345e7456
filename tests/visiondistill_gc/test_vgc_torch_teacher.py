"""A teacher in torch: its stored answers, written by another project's command, teach here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
import vgc_tools as tools

from shared_core.knowledge import KnowledgeStore
from shared_core.runs import read_result
from visiondistill_gc.config import parse
from visiondistill_gc.utils.data_utils import prepare

pytestmark = pytest.mark.slow


def zoo(*words):
    script = tools.REPOSITORY / "packages" / "torch_cls_zoo" / "main.py"
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_mobilenet_learns_from_a_teacher_in_torch(tmp_path, tiny, command):
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    for number in range(60):
        folder = root / ("Harmful" if number % 2 else "Kitchen")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 40, 3)) // (2 if number % 2 else 1)
        cv2.imwrite(str(folder / f"{number}.png"), pixels.astype(np.uint8))
    words = ["--data-path", str(root), "--scale", "full", "--n-splits", "1", "--workers", "0"]
    data = prepare(parse([*words, "--test-share", "0.2"], prog="main.py"), tmp_path / "split")
    images = ("--data-path", root, "--split", tmp_path / "split" / "split.json")
    plain = ("--input-size", "48", "--batch-size", "8", "--device", "cpu", "--workers", "0")
    how = ("-a", "resnet18", "--init", "none", "--recipe", "scratch", "--epochs", "2")
    zoo("--train", *images, *plain, *how, "--output", tmp_path / "teacher")
    (weights,) = (tmp_path / "teacher").rglob("model_best*.pth")
    words = (*images, *plain, "-a", "resnet18", "--resume", weights)
    zoo(
        "--knowledge",
        "train",
        *words,
        "--knowledge_dir",
        tmp_path / "k",
        "--output",
        tmp_path / "k",
    )
    (store,) = (tmp_path / "k" / "knowledge").iterdir()
    words = (*map(str, images), "--n-splits", "1", "--knowledge", str(store), "--no-visualdl")
    done = command(*tiny(tmp_path / "student", *words))
    assert done.code == 0, done.err
    learned = [e for e in data.entries if e.split == "train"]
    answers = KnowledgeStore.open(store).get([e.key for e in learned], 0)
    right = float((answers.argmax(axis=1) == [e.label for e in learned]).mean())
    taught = read_result(tmp_path / "student" / "result.json")["measured"]["teacher"]
    assert taught["accuracy_on_fold_images"] == pytest.approx(right)
    assert taught["saw"]["size"] == [48, 48]  # larger images than the student's 32

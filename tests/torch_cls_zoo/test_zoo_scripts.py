"""Every script of z_task_shell: its words are read by the command, and it runs on drawn scenes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from torch_cls_zoo.config import build_parser

FOLDER = Path(__file__).resolve().parents[2] / "packages" / "torch_cls_zoo" / "z_task_shell"
SCRIPTS = sorted(path.name for path in FOLDER.glob("[0-9]_*.sh"))
SMALL = {"ARCH": "test_resnet", "SIZE": "24 24", "EPOCHS": "3", "STEPS": "6"}
FEW = ("--threads", "1", "-j", "1")


def test_all_nine_are_there_and_can_be_run():
    assert [name[0] for name in SCRIPTS] == list("012345678")
    assert all(os.access(FOLDER / name, os.X_OK) for name in SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_of_a_script_is_one_of_the_command(name):
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    known = {word for action in build_parser()._actions for word in action.option_strings}
    commands = [line for line in text.splitlines() if re.match(r"main |.*main\.py\" ", line)]
    assert commands
    for line in commands:
        flags = [word for word in shlex.split(line) if word.startswith("--")]
        assert flags and set(flags) <= known, set(flags) - known


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scripts with a space")


def script(name: str, place: Path, *more: str, python: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, **SMALL, "DATA": str(place / "data"), "OUT": str(place / "out"),
           "PYTHON": str(python), "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.run(
        [str(FOLDER / name), *more], cwd=place, env=env, capture_output=True, text=True, timeout=300
    )


# In this order: 2 draws the scenes and trains what the later ones use.
@pytest.mark.parametrize(
    ("name", "more", "leaves"),
    [
        ("1_model_info.sh", (), ()),
        ("2_train.sh", ("--warmup", "1", "-b", "8", *FEW), ("train/report.html",)),
        ("0_lr_range_test.sh", ("-b", "8", *FEW), ("lr_range/lr_range.png",)),
        pytest.param("3_train_distributed.sh", ("--warmup", "1", "-b", "8", *FEW),
                     ("distributed/result.json",), marks=pytest.mark.slow),
        ("4_evaluate.sh", FEW, ("evaluate/confusion_matrix.png",)),
        ("5_visualize.sh", ("--visual_number", "2", *FEW),
         ("visual/visual_images/contact_sheet.png",)),
        ("6_curriculum.sh", ("--warmup", "1", "-b", "8", *FEW), ("curriculum/result.json",)),
        ("7_knowledge_distill.sh", ("--warmup", "1", "-b", "8", *FEW),
         ("distilled/result.json", "../data/distill.txt")),
        ("8_convert.sh", (*FEW, "--int8", "no"),
         ("deploy/checkpoints/jit_test_resnet.pt", "deploy/model/model.onnx")),
    ],
)  # fmt: skip
def test_it_runs(name, more, leaves, place, zoo_python):
    if name == "3_train_distributed.sh":
        more = (*more, "--init_method", "tcp://127.0.0.1:29417")
    done = script(name, place, *more, python=zoo_python)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in leaves:
        assert (place / "out" / path).stat().st_size > 0
    if name == "1_model_info.sh":
        assert "MACs" in done.stdout


def test_a_script_without_the_training_before_it_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    done = script("4_evaluate.sh", tmp_path, python=Path(sys.executable))
    assert done.returncode == 1 and "run 2_train.sh first" in done.stderr

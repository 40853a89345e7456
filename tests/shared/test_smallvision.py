"""The smallvision command: light, lazy, and each of its words leads where it says."""

import argparse
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny

from shared_core import smallvision
from shared_core.deploy import options
from shared_core.runs import UsageError, run_command
from shared_core.runs.options import CommandParser

ROOT = Path(smallvision.__file__).parents[1]
HEAVY = ("numpy", "cv2", "onnxruntime", "onnx", "scipy", "torch", "paddle", "fastapi")
COMMANDS = ("predict", "evaluate", "serve", "verify", "prepare", "weights")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_whole_and_loads_nothing_heavy(command):
    code = (
        "import sys; from shared_core.smallvision import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print('LOADED', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip().endswith("LOADED []"), done.stdout[-200:]
    for name in COMMANDS if not command else ():
        assert f"  {name} " in done.stdout


def test_every_option_is_a_sentence_with_its_default():
    for build in (options.add_predict_options, options.add_evaluate_options,
                  options.add_serve_options, options.add_exit_options):  # fmt: skip
        parser = CommandParser()
        build(parser)
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if action.dest != "help":
                assert action.help[0].isupper() and action.help.endswith("."), action.dest
            if action.default not in (None, False, "==SUPPRESS==") and action.option_strings:
                default = action.default[0] if action.nargs == "*" else action.default
                assert f"default: {default})" in text.replace("default ", "default: "), action.dest


def test_the_module_runs_and_unknown_words_are_refused():
    words = [sys.executable, "-m", "shared_core.smallvision"]
    start = time.perf_counter()
    done = subprocess.run([*words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "commands:" in done.stdout
    assert time.perf_counter() - start < 3  # a tenth of it on a quiet machine
    done = subprocess.run([*words, "divine"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'divine'" in done.stderr
    assert '"shared_core.smallvision:cli"' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def pictures(tmp_path):
    """Two classes of ten different images."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        images = rng.integers(0, 256, (10, 24, 24, 3)).astype(np.uint8)
        tiny.write_images(tmp_path / "set" / name, images)
    return tmp_path / "set"


def call(*words):
    return run_command(smallvision.main, list(map(str, words)))


def test_verify_checks_a_set(pictures, tmp_path, capsys):
    assert call("verify", pictures, "--workers", "0") == 0
    assert "20 images, 2 classes, usable" in capsys.readouterr().out
    (pictures / "cat" / "bad.png").write_bytes(b"")
    report = tmp_path / "r.json"
    words = ("--workers", "0", "--no-near", "--report", report, "--quarantine", tmp_path / "q.txt")
    assert call("verify", pictures, *words) == 1
    assert "bad.png" in (tmp_path / "q.txt").read_text()
    assert json.loads(report.read_text())["near_checked"] is False
    capsys.readouterr()
    assert call("verify", pictures, "--spec", "nope") == 1
    assert "unknown dataset 'nope'; known: " in capsys.readouterr().err


def test_prepare_makes_a_checked_set_of_an_archive(pictures, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in pictures.rglob("*.png"):
            archive.write(path, path.relative_to(pictures))
    target = tmp_path / "made"
    assert call("prepare", tmp_path / "set.zip", target, "--workers", "0", "--seed", "3") == 0
    assert json.loads((target / "split.json").read_text())["seed"] == 3
    assert "20 images, 2 classes" in capsys.readouterr().out
    assert call("prepare", tmp_path / "none.zip", tmp_path / "x") == 1


def test_weights_hands_its_words_on(monkeypatch):
    pytest.importorskip("shared_core.weights.command")
    import shared_core.weights.command as weights

    seen = []
    monkeypatch.setattr(weights, "main", lambda words: seen.append(words) or 7)
    assert call("weights", "list", "--x") == 7 and seen == [["list", "--x"]]


# -- options that projects build on ---------------------------------------------------------------


def test_first_spellings_are_aliases():
    """visiondistill_gc's: model and images by flags, underscores for hyphens."""
    p = argparse.ArgumentParser()
    options.add_model_options(p, aliases={"model": ("--model_path",)}, runtimes=("paddle",))
    options.add_predict_options(
        p, underscores=True, defaults={"batch-size": 5, "every-class": True},
        aliases={"paths": ("--image_path",), "top": ("--top_k",), "workers": ("--num_workers",)},
        without=("camera", "video"),
    )  # fmt: skip
    words = "--model_path m --image_path a --top_k 4 --show_dir d --num_workers 0 --runtime paddle"
    args = p.parse_args(words.split())
    assert options.model_options(args) == options.ModelOptions(Path("m"), "paddle", 1, "cpu")
    assert options.predict_options(args) == options.PredictOptions(
        ("a",), 5, 0, 4, every_class=True, show_dir=Path("d")
    )
    args = p.parse_args("--model_path m x --image_path a --batch_size 7".split())
    assert options.predict_options(args).paths == ("x", "a")
    assert options.predict_options(args).batch_size == 7
    with pytest.raises(SystemExit):
        p.parse_args(["a"])  # the model is missing
    with pytest.raises(ValueError, match="option 'colour'"):
        options.add_serve_options(p, without=("colour",))


def test_every_parsed_word_reaches_its_field():
    p = argparse.ArgumentParser()
    options.add_model_options(p)
    options.add_predict_options(p)
    words = (
        "m a - --threads 3 --device cuda --batch-size 2 --workers 4 --top 5 --format jsonl "
        "--every-class --video v --camera 1 --every 6 --frames 7 --show --show-dir d"
    )
    args = p.parse_args(words.split())
    assert options.model_options(args) == options.ModelOptions(Path("m"), "auto", 3, "cuda")
    assert options.predict_options(args) == options.PredictOptions(
        ("a", "-"), 2, 4, 5, "jsonl", None, None, True, (Path("v"),), 1, 6, 7, True, Path("d")
    )
    p = argparse.ArgumentParser()
    options.add_evaluate_options(p)
    words = (
        "d --split s --part p --against o --batch-size 2 --workers 3 --latency-batches 4 5 "
        "--report r"
    )
    found = options.evaluate_options(p.parse_args(words.split()))
    assert found == options.EvaluateOptions(
        Path("d"), Path("s"), "p", Path("o"), 2, 3, (4, 5), None, Path("r")
    )
    p = argparse.ArgumentParser()
    options.add_serve_options(p)
    words = (
        "--host h --port 1 --max-batch 2 --max-wait-ms 3 --max-queue 4 --max-mb 5 "
        "--max-megapixels 6 --max-files 7 --max-requests 8"
    )
    assert options.serve_options(p.parse_args(words.split())) == options.ServeOptions(
        "h", 1, 2, 3, 4, 5, 6, 7, 8
    )
    p = argparse.ArgumentParser()
    options.add_exit_options(p)
    args = p.parse_args("--policy margin --threshold 0.1,0.2".split())
    assert options.exit_options(args) == options.ExitOptions(None, "margin", (0.1, 0.2), False)
    with pytest.raises(UsageError, match="expected --policy KIND"):
        options.exit_options(p.parse_args("--threshold 0.1".split()))


def test_a_service_computes_with_all_threads_unless_told():
    p = argparse.ArgumentParser()
    options.add_model_options(p, all_threads=True)
    assert options.model_options(p.parse_args(["m"])).threads is None
    assert options.model_options(p.parse_args(["m", "--threads", "2"])).threads == 2

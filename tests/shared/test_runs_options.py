"""The common options: what they read, what their help says, what they cost to import."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from shared_core.runs import UsageError
from shared_core.runs.options import (
    COMMON,
    CommandParser,
    add_common,
    choose_scale,
    options_given,
    start_of,
    words_of,
)

SHARED = str(Path(__file__).resolve().parents[2] / "shared")


@pytest.fixture
def parser():
    """All common options, some of them as a project would have them."""
    made = CommandParser(prog="main.py")
    add_common(
        made,
        list(COMMON),
        defaults={"epochs": 85, "lr": 1e-4},
        aliases={"batch-size": ["-b", "--batch_size"], "workers": ["-j"]},
        help={"lr": "The rate of this project, 100 %% of it."},
        more={"workers": {"dest": "num_workers"}, "resume": {"action": "store", "nargs": "?"}},
    )
    made.add_argument("--set", action="append", default=[])
    return made


def test_every_option_of_the_vocabulary_is_read(parser):
    words = (
        "--data-path d --split s.json --output o --input-size 96 --epochs 2 --batch-size 8 "
        "--lr 0.5 --seed 3 --device cpu --amp bf16 --workers 0 --threads 2 --continue --fresh "
        "--init none --scale short --resume x"
    ).split()
    assert {word for word in words if word.startswith("--")} == {f"--{name}" for name in COMMON}
    assert vars(parser.parse_args(words)) == {
        "data_path": Path("d"), "split": Path("s.json"), "output": Path("o"), "input_size": 96,
        "epochs": 2, "batch_size": 8, "lr": 0.5, "seed": 3, "device": "cpu", "amp": "bf16",
        "num_workers": 0, "threads": 2, "resume": "x", "go_on": True, "fresh": True,
        "init": "none", "scale": "short", "set": [],
    }  # fmt: skip


def test_aliases_defaults_and_sentences_are_the_projects(parser):
    args = parser.parse_args(["-b", "4", "-j", "3"])
    assert (args.batch_size, args.num_workers, args.epochs, args.lr) == (4, 3, 85, 1e-4)
    text = " ".join(parser.format_help().split())
    assert "The rate of this project, 100 % of it. (default: 0.0001)" in text
    assert "all training images. (default: 85)" in text
    assert "(default: None)" not in text and "(default: False)" not in text
    assert "{auto,full,short,rehearsal}" in text


def test_the_help_of_every_option_is_a_sentence():
    for name, words in COMMON.items():
        assert words["help"][0].isupper() and words["help"].endswith("."), name
        assert len(words["help"].split()) >= 8, name


def test_a_default_that_the_sentence_tells_is_not_said_twice():
    made = CommandParser(prog="x")
    made.add_argument("--a", default=[1, 2], help="Two numbers.")
    made.add_argument("--b", default=3, help="A number (default: the recipe's).")
    made.add_argument("--c", default="50%", help="A share.")
    made.add_argument(
        "--d", action=argparse.BooleanOptionalAction, default=True, help="A switch of it."
    )
    text = " ".join(made.format_help().split())
    assert "Two numbers. (default: 1 2)" in text and "share. (default: 50%)" in text
    assert text.count("default: ") == 4 and "switch of it. (default: on)" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "0"], "--epochs: 0: expected [1, 1e+09]"),
        (["--lr", "0"], "--lr: 0: expected (0, inf)"),
        (["--seed", "4294967296"], "expected [0, 4.29497e+09]"),
        (["--amp", "int4"], "invalid choice: 'int4'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_a_wrong_word_is_one_line_and_code_2(parser, capsys, words, told):
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(words)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and told in said and said.count("\n") == 1
    assert "main.py --help" in said


@pytest.mark.parametrize("how", ["names", "defaults", "aliases", "help", "more"])
def test_an_unknown_name_is_a_fault_of_the_project(how):
    names = ["seed", "sed"] if how == "names" else ["seed"]
    more = {} if how == "names" else {how: {"sed": {}}}
    known = "data-path" if how == "names" else "seed"
    with pytest.raises(ValueError, match=f"option 'sed': expected one of {known}"):
        add_common(CommandParser(), names, **more)


def test_what_is_given_is_told_from_defaults(parser):
    parser.set_defaults(recipe="full")
    assert options_given(parser, []) == set()
    assert options_given(parser, ["--epochs", "85", "--set", "a=1", "--fresh"]) == {
        "epochs", "set", "fresh",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "start"),
    [([], "new"), (["--resume", "x"], "resume"), (["--continue"], "continue"),
     (["--fresh"], "fresh")],
)  # fmt: skip
def test_how_a_run_starts(parser, words, start):
    assert start_of(parser.parse_args(words)) == start
    if start != "new":
        other = ["--fresh"] if start != "fresh" else ["--continue"]
        with pytest.raises(UsageError, match="and --(fresh|continue)?.*: expected one of them"):
            start_of(parser.parse_args(words + other))


def test_the_scale_hangs_on_whether_the_data_are_there():
    assert [choose_scale(s, found=True) for s in (None, "auto", "short")] == ["full", "full",
                                                                              "short"]  # fmt: skip
    assert choose_scale("auto", found=False) == "rehearsal"
    assert words_of(["a"]) == ["a"] and words_of(None) == sys.argv[1:]


def test_options_load_nothing_heavy():
    code = f"import sys; sys.path.insert(0, {SHARED!r}); import shared_core.runs.options as o;"
    code += "import shared_core.trials.trial_options, shared_core.runs.command;"
    code += "print([m for m in ('numpy', 'scipy', 'torch', 'cv2', 'safetensors', 'email')"
    code += " if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

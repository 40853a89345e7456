"""The command line: recipes under explicit flags, aliases, the choice of scale and data set."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import gfnet_dynn
from gfnet_dynn.choices import ALL, ISOTROPIC_ARCHS, PYRAMID_ARCHS
from gfnet_dynn.config import parse
from gfnet_dynn.models.gfnet import ISOTROPIC
from gfnet_dynn.models.gfnet_pyramid import PYRAMIDS
from gfnet_dynn.options import LEARNING, NETWORK, REFUSED, build_parser
from gfnet_dynn.recipes import RECIPES
from shared_core import datasets
from shared_core.runs import UsageError

PACKAGE = Path(gfnet_dynn.__file__).parent
# The original's flags that had an effect, with its defaults.
ORIGINAL = {
    "--lr": ("lr", 1e-3),
    "--wd": ("wd", 5e-4),
    "--min-lr": ("min_lr", 2e-4),
    "--batch": ("batch", 64),
    "--ce_ic_tradeoff": ("ce_ic_tradeoff", 0.75),
    "--num_epoch": ("num_epoch", 200),
    "--max_warmup_epoch": ("max_warmup_epoch", 10),
    "--bilevel_batch_count": ("bilevel_batch_count", 60),
    "--seed": ("seed", 0),
    "--split_ratio": ("split_ratio", 0.8),
    "--color-jitter": ("color_jitter", 0.4),
    "--aa": ("aa", "rand-m9-mstd0.5-inc1"),
    "--smoothing": ("smoothing", 0.1),
    "--train-interpolation": ("train_interpolation", "bicubic"),
    "--reprob": ("reprob", 0.0),
    "--remode": ("remode", "pixel"),
    "--recount": ("recount", 1),
    "--num_workers": ("num_workers", 2),
    "--gate": ("gate", "unc"),
    "--gate_objective": ("gate_objective", "ce"),
    "--classifier_loss": ("classifier_loss", "boosted"),
    "--barely_train": ("barely_train", False),
    "--arch": ("backbone_arch", "gfnet-xs"),
}


@pytest.fixture
def aid(tmp_path) -> Path:
    """A data root in which AID lies."""
    (tmp_path / "root/aid/Airport").mkdir(parents=True)
    return tmp_path / "root"


def asked(*words: object, scale: str | None = "auto"):
    return parse([str(word) for word in words], prog="main.py", scale=scale)


def parsed(*words: object, scale: str | None = "auto") -> SimpleNamespace:
    """The run's configuration, and what is asked of this command alone."""
    command = asked(*words, scale=scale)
    more = ("output", "start", "stage", "judged", "use_mlflow")
    return SimpleNamespace(**command.values, **{name: getattr(command, name) for name in more})


def test_defaults_are_those_of_the_original(aid):
    args = parsed("--data-root", aid, scale=None)
    for name, value in ORIGINAL.values():
        assert getattr(args, name) == value, name
    assert args.scale == "full" and args.data_path == aid / "aid"
    assert args.policy == "gate" and args.exits == (3, 5, 7, 9)
    assert (args.start, args.stage, args.use_mlflow) == ("new", "all", True)
    known = set(build_parser("x").format_help().replace(",", " ").split())
    further = {"--resume", "--use_mlflow", "--eval", "--early_exit_warmup"}
    assert set(ORIGINAL) | further <= known
    assert not set(REFUSED) & known


@pytest.mark.parametrize("scale", sorted(RECIPES))
def test_recipe_sets_defaults_and_flags_win(aid, scale):
    command = asked("--data-root", aid, "--scale", scale)
    plain = SimpleNamespace(**command.values | {"threads": command.threads})
    for name, value in RECIPES[scale].items():
        assert getattr(plain, name) == value, name
    given = parsed(
        *("--data-root", aid, "--scale", scale, "--num_epoch", 33, "--finetune-batch", 17),
        *("--ema", 0.25, "--crop-scale", 0.3, 0.9, "--backbone-lr", 0.5),
    )
    assert (given.num_epoch, given.finetune_batch, given.ema) == (33, 17, 0.25)
    assert list(given.crop_scale) == [0.3, 0.9] and given.backbone_lr == 0.5
    named = {"num_epoch", "finetune_batch", "ema", "crop_scale", "backbone_lr", "threads"}
    for name, value in RECIPES[scale].items():
        if name not in named:
            assert getattr(given, name) == value, name


def test_a_teacher_is_a_file_a_network_or_a_gfnet(aid, tmp_path):
    words = ("--data-root", aid, "--scale", "short")
    assert parsed(*words).teacher == "lite0" and parsed(*words).answers == "stored"
    assert parsed(*words, "--teacher", "torchvision:resnet18").teacher == "torchvision:resnet18"
    # A GFNet that is asked for takes the recipe's teacher's place, with rates of its own.
    for own in (("--teacher", "none"), ("--backbone-dim", 32), ("--no-distil",)):
        args = parsed(*words, *own)
        assert args.teacher is None and args.backbone_lr == args.student_lr
    for wrong, message in (
        (("--teacher", "lite9"), "there is no such file, and network 'lite9'"),
        (("--teacher", "lite0", "--backbone-dim", 32), "--backbone-dim would have no effect"),
        (("--nd-weight", 1), "--nd-weight 1 needs a teacher that is asked live"),
        (("--mixup", 0.2), "--mixup 0.2 needs a teacher that is asked live"),
        (("--kd-weight", 0), "leave the student nothing to learn"),
        (("--resolution-transfer", "spectrum"), "there is no --init or --student-init file"),
    ):
        with pytest.raises(UsageError, match=message):
            asked(*words, *wrong)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        asked(*words, "--teacher", tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match="--student-init"):
        asked(*words, "--student-init", tmp_path / "gone.pth")


def test_names_of_networks_are_those_of_the_networks():
    assert set(ISOTROPIC_ARCHS) == set(ISOTROPIC) and set(PYRAMID_ARCHS) == set(PYRAMIDS)


def test_recipes_name_existing_options():
    known = vars(build_parser("x").parse_args([]))
    for recipe in RECIPES.values():
        assert recipe.keys() <= known.keys()


def test_auto_is_full_when_the_set_is_there_and_rehearsal_otherwise(aid, tmp_path):
    assert parsed("--data-root", aid).scale == "full"
    assert parsed("--data-root", aid).data_path == aid / "aid"
    away = parsed("--data-root", tmp_path / "none")
    assert (away.scale, away.data_path) == ("rehearsal", None)
    assert away.backbone_dim == RECIPES["rehearsal"]["backbone_dim"]
    other = parsed("--data-root", aid, "--data-set", "ucm")
    assert (other.scale, other.data_set) == ("rehearsal", "UCM")
    own = parsed("--data-path", aid / "aid", "--data-set", "mine")
    assert (own.scale, own.data_set) == ("full", "mine")
    assert parsed("--data-root", aid, "--scale", "short").scale == "short"
    # A rehearsal that was asked for stays one.
    assert parsed("--data-root", aid, "--scale", "rehearsal").data_path is None


SPELLINGS = (
    (("--data_set", "nwpu"), "data_set", "NWPU"),
    (("--data-set", "PATTERNNET"), "data_set", "PatternNet"),
    (("--img_size", "48"), "input_size", 48),
    (("--input-size", "48"), "input_size", 48),
    (("--num_classes", "9"), "num_classes", 9),
    (("--split-ratio", "0.5"), "split_ratio", 0.5),
    (("--split_ratio", "0.5"), "split_ratio", 0.5),
    (("--epochs", "33"), "num_epoch", 33),
    (("--batch-size", "7"), "batch", 7),
    (("--workers", "5"), "num_workers", 5),
    (("--init", "none"), "pretrained", None),
    (("-r",), "start", "resume"),
    (("--resume",), "start", "resume"),
    (("--continue",), "start", "continue"),
    (("--fresh",), "start", "fresh"),
    (("--use_mlflow", "False"), "use_mlflow", False),
    (("--use_mlflow",), "use_mlflow", True),
    (("--early_exit_warmup", "false"), "max_warmup_epoch", 0),
    (("--early_exit_warmup", "True"), "max_warmup_epoch", 5),
    (("--exits", "all"), "exits", ALL),
    (("--exits", "[1, 4]"), "exits", (1, 4)),
    (("--gate", "identity"), "policy", "max_prob"),
    (("--gate", "identity", "--policy", "entropy"), "policy", "entropy"),
    (("--policy", "jei"), "policy", "jei"),
    (("--eval",), "stage", "evaluate"),
    (("--eval",), "start", "continue"),
    (("--arch", "GFNet-Dynn"), "backbone_arch", "gfnet-xs"),
    (("--arch", "GFNet-xs-dynn"), "backbone_arch", "gfnet-xs"),
    (("--arch", "gfnet-h-ti", "--backbone-arch", "gfnet-s"), "backbone_arch", "gfnet-s"),
)


def test_spellings():
    for words, name, value in SPELLINGS:
        assert getattr(parsed(*words, "--scale", "rehearsal"), name) == value, words


def test_resume_with_a_file_starts_from_it(tmp_path):
    (tmp_path / "model.pth").write_text("")
    for words in (("--resume",), ("-r",), ("--checkpoint-path",)):
        args = parsed("--scale", "rehearsal", *words, tmp_path / "model.pth")
        assert args.checkpoint == tmp_path / "model.pth" and args.start == "new"
    judged = parsed("--scale", "rehearsal", "--eval", "-r", tmp_path / "model.pth")
    assert judged.judged == tmp_path / "model.pth" and judged.checkpoint is None


def commands_of_the_original() -> list[list[str]]:
    """The words after ``main_dynn.py`` of every command in main_dynn.txt."""
    lines = (PACKAGE / "main_dynn.txt").read_text(encoding="utf-8").splitlines()
    found = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    assert {words[1] for words in found} == {"packages/gfnet_dynn/main_dynn.py"}
    return [words[2:] for words in found]


def test_the_commands_of_the_original_fit_their_data_sets(tmp_path):
    for words in commands_of_the_original():
        args = parsed(*words, "--data-path", tmp_path, scale=None)
        spec = datasets.get(args.data_set)
        assert args.no_distil and args.output == Path(words[-1])
        assert (args.num_classes, args.input_size) == (spec.num_classes, spec.image_size)


def test_the_script_runs_the_first_command_of_a_set(tmp_path):
    first = {words[1]: words for words in reversed(commands_of_the_original())}
    assert set(first) == {"AID", "NaSC", "NWPU", "PatternNet", "UCM"}
    for name, words in first.items():
        done = subprocess.run(
            ["bash", PACKAGE / "main_dynn.bash", name.lower(), "--lr", "0.5"],
            env={**os.environ, "PYTHON": "echo", "DATA_ROOT": "some where"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        said = done.stdout.removesuffix("\n")
        assert said.startswith(f"{PACKAGE / 'main_dynn.py'} {' '.join(words)} --data-root some")
        assert said.endswith(f"/runs/gfnet_dynn/{name.lower()}-dynn --lr 0.5")


def test_output_is_named_after_set_and_scale(tmp_path):
    root = tmp_path / "none"
    assert parsed("--data-root", root).output == Path("runs/gfnet_dynn/aid-rehearsal")
    assert parsed("--data-root", root, "--output", "x").output == Path("x")


IGNORED = (
    ("--builtin-classes", "4", "--data-path", "."),
    ("--no-distil", "--kd-weight", "2"),
    ("--resolution-transfer", "spectrum"),
    ("--color-jitter", "0.3", "--aa", "rand-m9"),
    ("--kd-weight", "0", "--kd-temperature", "2"),
    ("--kd-weight", "0", "--kd-warmup", "3"),
    ("--remode", "const"),
    ("--reprob", "0", "--recount", "2"),
    ("--early_exit_warmup", "false", "--patience", "3"),
    ("--gate", "identity", "--gate-lr", "0.1"),
    ("--gate", "identity", "--bilevel_batch_count", "5"),
    ("--phase2", "joint", "--bilevel_batch_count", "5"),
)


def test_flag_that_would_be_ignored_is_refused(tmp_path):
    (tmp_path / "model.pth").write_text("")
    for words in (*IGNORED, ("--teacher", tmp_path / "model.pth", "--backbone-lr", "1")):
        with pytest.raises(UsageError, match="would have no effect"):
            parsed("--scale", "rehearsal", *words)


@pytest.mark.parametrize("flag", [*NETWORK, *LEARNING])
def test_what_a_model_file_stands_for_is_refused_beside_it(tmp_path, flag):
    (tmp_path / "model.pth").write_text("")
    value = "gfnet-s" if flag.endswith("_arch") else "3"
    value = {"ema": "0.5", "smoothing": "0.5", "drop_path": "0.5", "depth": "11"}.get(flag, value)
    value = {"answers": "live", "compare_labels": "True"}.get(flag, value)
    value = str(tmp_path / "model.pth") if flag in ("teacher", "student_init") else value
    more = ("--deep-supervision", "1") if flag in ("deep_kd", "deep_temperature") else ()
    words = ("--scale", "rehearsal", f"--{flag.replace('_', '-')}", value, *more)
    assert str(getattr(parsed(*words), flag)).removesuffix(".0") == value
    file = ("--checkpoint-path", tmp_path / "model.pth")
    with pytest.raises(UsageError, match="would have no effect"):
        parsed(*words, *file)
    if flag in NETWORK:
        with pytest.raises(UsageError, match="would have no effect"):
            parsed(*words, *file, "--eval")
    else:  # words of the run that made the file
        parsed(*words, *file, "--eval")


def test_the_share_of_a_set_with_parts_of_its_own_is_refused(tmp_path, folder_of_images):
    for part in ("train", "test"):
        folder_of_images(tmp_path / "parts" / part, images=1)
    folder_of_images(tmp_path / "whole", images=1)
    words = ("--scale", "rehearsal", "--split_ratio", "0.5", "--data-path")
    assert parsed(*words, tmp_path / "whole").split_ratio == 0.5
    with pytest.raises(UsageError, match="--split-ratio would have no effect: .* split into"):
        parsed(*words, tmp_path / "parts")
    assert parsed("--drop-leaks", "--data-path", tmp_path / "parts").drop_leaks
    for folder, flag in (("whole", ("--drop-leaks",)), ("parts", ("--group-by", "exact"))):
        with pytest.raises(UsageError, match=f"{flag[0]} would have no effect"):
            parsed(*flag, "--data-path", tmp_path / folder)


def test_checks_do_not_touch_what_recipes_set(tmp_path):
    """A recipe's own values are no words of the user's."""
    args = parsed("--scale", "rehearsal", "--no-distil", "--aa", "rand-m9-mstd0.5-inc1")
    assert args.no_distil and args.student_dim == RECIPES["rehearsal"]["student_dim"]
    assert parsed("--scale", "rehearsal", "--data-path", tmp_path).builtin_classes

"""From a command line to the settings of a run: recipe, data set, and words that must agree."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shared_core.runs import UsageError
from shared_core.runs.options import choose_scale, options_given, start_of
from shared_core.weights.catalogue import ALIASES, entry
from shared_core.weights.efficientnet_lite import block_plan
from shared_core.weights.finding import NONE, TRAINED, installed_file
from visiondistill_gc.options import (
    MOBILENET,
    PADDLECLAS,
    Settings,
    StudentOptions,
    build_parser,
    settings_of,
)
from visiondistill_gc.recipes import FROM_NOTHING, LITE0, LITE2, RECIPES

SOURCES_OF_TEACHING = ("teacher_weights", "teacher_knowledge", "teacher_pretrained")


def parse(argv: Sequence[str] | None, *, prog: str) -> Settings:
    """Parse, choose the recipe, and check what one word says of another.

    Raises:
        UsageError: words that contradict each other, or that would have no effect.
        FileNotFoundError: a file or folder that is not there.
    """
    parser = build_parser(prog)
    first = parser.parse_args(argv)
    given = options_given(parser, argv)
    if first.train_list is not None and first.data_path is None:
        first.data_path = first.train_list.parent
        parser.set_defaults(data_path=first.data_path)
    found = first.data_path or _find(first.data_root, first.data_set)
    scale = choose_scale(first.scale, found=bool(found))
    if first.scale in (None, "auto") and first.data_path:
        scale = "short"  # the published recipe is for the published images
    scratch = FROM_NOTHING if first.init == NONE and scale != "full" else {}
    parser.set_defaults(**{**RECIPES[scale], **scratch})
    args = parser.parse_args(argv)
    args.scale = scale
    args.data_path = _data_path(args)
    if "teacher" not in given and args.teacher == LITE2 and not installed_file(entry(LITE2)):
        args.teacher = LITE0
    if args.data_path is not None and first.data_path and "data_set" not in given:
        args.data_set = args.data_path.resolve().name or "images"
    if args.output is None:
        args.output = Path("runs") / "visiondistill_gc" / f"garbage-{scale}"
    if "cache_size" not in given and not args.decoded_cache:
        args.cache_size = 0
    if "warmup_epochs" not in given:  # a recipe's own
        args.warmup_epochs = min(args.warmup_epochs, args.epochs - 1)
    if "compare_seeds" not in given and args.alpha == 1:
        args.compare_seeds = ()
    args.folds = sorted(set(range(args.n_splits) if args.folds is None else args.folds))
    settings = settings_of(args, start=start_of(args))
    _check_files(settings)
    _check_numbers(settings)
    _check_data(settings, given)
    _check_teacher(settings, given, prog)
    return _from_trained(replace(settings, student=_student(settings.student, given)), given)


def _find(root: Path, name: str) -> Path | None:
    from shared_core import datasets

    return datasets.find(root, datasets.get(name)) if name in datasets.names() else None


def _data_path(args: argparse.Namespace) -> Path | None:
    """The folder of the images; None for built-in ones."""
    from shared_core import datasets

    if args.data_path is not None:
        if not args.data_path.is_dir():
            raise FileNotFoundError(
                f"--data-path {args.data_path} is not a folder: expected class folders in it"
            )
        return args.data_path
    if args.scale == "rehearsal":
        return None
    if args.data_set not in datasets.names():
        known = ", ".join(datasets.names())
        raise UsageError(f"--data-set {args.data_set}: expected one of {known}, or --data-path")
    return datasets.require(args.data_root, datasets.get(args.data_set))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_files(settings: Settings) -> None:
    """What is named must be there."""
    data, teacher = settings.data, settings.teacher
    files = {
        "split": data.split, "quarantine": data.quarantine, "train_list": data.train_list,
        "val_list": data.val_list, "test_list": data.test_list, "label_list": data.label_list,
        "teacher_pretrained": teacher.teacher_pretrained,
        "teacher_weights": teacher.teacher_weights,
    }  # fmt: skip
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{_flag(name)} {path}: there is no such file")
    if teacher.teacher_knowledge is not None and not teacher.teacher_knowledge.is_dir():
        raise FileNotFoundError(f"--teacher-knowledge {teacher.teacher_knowledge}: no such folder")


def _check_numbers(settings: Settings) -> None:
    """Numbers that bound each other."""
    train, data, view = settings.training, settings.data, settings.view
    if settings.run.one_student and len(settings.run.folds) != data.n_splits:
        raise UsageError("--one-student is taught by all folds: expected no --folds with it")
    if settings.run.one_student and data.n_splits == 1:
        raise UsageError("--one-student would have no effect: --n-splits 1 trains one student")
    if data.n_splits == 1 and data.test_share >= 0.5:
        raise UsageError(
            f"--test-share {data.test_share:g}: with --n-splits 1 as many images are validated on, "
            "expected less than 0.5"
        )
    if train.warmup_epochs >= train.epochs:
        raise UsageError(
            f"--warmup-epochs {train.warmup_epochs} of --epochs {train.epochs}: expected fewer"
        )
    if settings.run.folds[-1] >= data.n_splits:
        raise UsageError(
            f"--folds {settings.run.folds[-1]}: expected 0 to {data.n_splits - 1}, there are "
            f"--n-splits {data.n_splits}"
        )
    low, high = view.crop_scale
    if not 0 < low <= high:
        raise UsageError(f"--crop-scale {low:g} {high:g}: expected 0 < low <= high <= 1")
    if view.jitter[3] > 0.5:
        raise UsageError(f"--jitter: the hue is {view.jitter[3]:g}, expected at most 0.5")


def _check_data(settings: Settings, given: set[str]) -> None:
    """Words on data that would have no effect."""
    data = settings.data
    if data.cache_size and not data.decoded_cache:
        raise UsageError("--cache-size would have no effect: expected --decoded-cache with it")
    for name in ("val_list", "test_list", "label_list"):
        if getattr(data, name) is not None and data.train_list is None:
            raise UsageError(f"{_flag(name)} would have no effect: expected --train-list with it")
    for name in ("test_share", "quarantine"):
        if data.split is not None and name in given:
            raise UsageError(f"{_flag(name)} would have no effect: --split says what is held out")


def _student(student: StudentOptions, given: set[str]) -> StudentOptions:
    """The student with what follows from its other words.

    Layers are frozen only above trained weights; a network of paddleclas has its own head.
    """
    student = replace(student, student=ALIASES.get(student.student, student.student))
    if student.student_source == PADDLECLAS:
        student = _of_paddleclas(student, given)
    if student.init == NONE:
        if "frozen" in given and student.frozen:
            raise UsageError(
                f"--frozen {student.frozen} with --init {NONE} would freeze random weights: "
                "expected --init FILE with it, or --frozen 0"
            )
        student = replace(student, frozen=0)
    elif student.init != TRAINED and not entry(student.init) and not Path(student.init).is_file():
        raise FileNotFoundError(f"--init {student.init}: there is no such file")
    if student.student != MOBILENET and student.student_source != PADDLECLAS:
        for name in ("head", "hidden", "student_scale"):
            if name in given:
                raise UsageError(f"{_flag(name)} would have no effect: it is of {MOBILENET}")
    elif student.init == TRAINED and "student_scale" in given and student.student_scale != 1:
        raise UsageError(
            f"--student-scale {student.student_scale:g}: trained weights are of width 1, expected "
            f"--init FILE or --init {NONE} with it"
        )
    most = _units(student.student)
    if student.student_source != PADDLECLAS and student.frozen > most:
        if "frozen" in given:
            raise UsageError(
                f"--frozen {student.frozen}: expected 0 to {most} of {student.student}"
            )
        student = replace(student, frozen=most)
    if "head" in given and student.head == "plain" and "hidden" in given:
        raise UsageError("--hidden would have no effect: --head plain has no hidden layer")
    return student


def _of_paddleclas(student: StudentOptions, given: set[str]) -> StudentOptions:
    """A student that has its own head and width; MobileNetV2 where the words name none."""
    wanted = {"head": "plain", "student_scale": 1.0}
    for name, value in wanted.items():
        if name in given and getattr(student, name) != value:
            raise UsageError(
                f"{_flag(name)} {getattr(student, name)}: expected {value}, a network of "
                "paddleclas has its own head and width"
            )
    name = student.student if "student" in given else MOBILENET
    frozen = student.frozen
    if name not in (MOBILENET, "MobileNetV2") and "frozen" not in given:
        frozen = 0  # how many units it has, only the package tells
    return replace(student, student=name, frozen=frozen, **wanted)


def _units(name: str) -> int:
    """How many parts of a network can be frozen, from the first."""
    if entry(name):
        return sum(map(len, block_plan(name))) + 2
    return 19 if name == MOBILENET else 0


def _from_trained(settings: Settings, given: set[str]) -> Settings:
    """What only a network above trained weights can have: a probe, and frozen units.

    A recipe's teacher that is a probe is trained where there is nothing to probe.
    """
    teacher, training = settings.teacher, settings.training
    name = ALIASES.get(teacher.teacher, teacher.teacher)
    if settings.student.init == NONE and teacher.teacher_pretrained is None:
        for word, value in (("probe", training.probe), ("teacher_frozen", teacher.teacher_frozen)):
            if word in given and value:
                raise UsageError(f"{_flag(word)} needs trained weights, but --init is {NONE}")
        frozen = 0
        training = replace(training, probe=False)
    else:
        frozen = teacher.teacher_frozen
    most = _units(name) if name != MOBILENET else 0
    if teacher.teacher_source == PADDLECLAS:
        frozen = frozen if "teacher_frozen" in given else 0
    elif frozen > most:
        if "teacher_frozen" in given:
            raise UsageError(f"--teacher-frozen {frozen}: expected 0 to {most} of {name}")
        frozen = most
    teacher = replace(teacher, teacher=name, teacher_frozen=frozen)
    return replace(settings, teacher=teacher, training=training)


def _check_teacher(settings: Settings, given: set[str], prog: str) -> None:
    """One source of teaching, and one that is used."""
    teacher, alpha = settings.teacher, settings.training.alpha
    named = [name for name in SOURCES_OF_TEACHING if getattr(teacher, name) is not None]
    if teacher.knowledge_seed and teacher.teacher_knowledge is None and prog == "main.py":
        raise UsageError("--knowledge-seed would have no effect: expected --teacher-knowledge")
    if alpha == 1 and named:
        raise UsageError(f"{_flag(named[0])} would have no effect with --alpha 1")
    if len(named) > 1:
        raise UsageError(f"{' and '.join(map(_flag, named))}: expected one source of teaching")
    probed = settings.training.probe and settings.student.init != NONE
    untrained = not teacher.teacher_epochs and not named and alpha != 1 and not probed
    if untrained and not teacher.allow_untrained_teacher:
        raise UsageError(
            "--teacher-epochs 0 without --teacher-weights or --teacher-knowledge leaves the "
            "teacher's head untrained: expected one of them, --probe above trained weights, or "
            "--allow-untrained-teacher"
        )
    if settings.records.compare_seeds and alpha == 1:
        raise UsageError("--compare-seeds compares teachers: expected --alpha below 1")

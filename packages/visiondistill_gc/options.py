"""The options, once: a field is an option of the command line and a setting of the run.

Every constant of the original is one, with the original's value as default. Nothing heavy is
imported here, because ``--help`` reads this file. ``config.parse`` makes the settings.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shared_core.runs.json_files import as_plain
from shared_core.runs.numbers import COUNT, FRACTION, POSITIVE, SIZE, WEIGHT, number
from shared_core.runs.opening import Start
from shared_core.runs.options import CommandParser, add_common

PADDLECLAS = "paddleclas"
SOURCES = ("paddle.vision", PADDLECLAS)
STAGES = ("prepare", "folds", "one", "evaluate", "compare", "report")
FOLD_KINDS = ("stratified", "plain")
SCHEDULES = ("epoch", "step")
ENGINES = ("auto", "dygraph", "inference")
HEADS = ("improved", "plain")
MOBILENET = "mobilenet_v2"  # the README's student
AMP = ("fp32", "bf16", "fp16", "bf16-O2", "fp16-O2")
AMP_FIRST = {"O0": "fp32", "O1": "fp16", "O2": "fp16-O2"}  # what earlier commands called them

_BELOW_ONE = number(float, 0, 0.99999)


def own(default: Any, kind: Any = None, help: str = "", *aliases: str, **more: Any) -> Any:
    """A field that is an option of this project.

    Args:
        kind: what turns a word into the value; None for a flag.
        aliases: other spellings of the option.
        more: further arguments of argparse.
    """
    if isinstance(default, bool):
        more.setdefault("action", argparse.BooleanOptionalAction)
    elif kind is not None:
        more["type"] = kind
    return field(default=default, metadata={"help": help, "aliases": aliases, **more})


def common(name: str, default: Any, *aliases: str, help: str | None = None, **more: Any) -> Any:
    """A field that is one of the core's common options."""
    about = {"common": name, "aliases": aliases, "help": help, "more": more}
    return field(default=default, metadata=about)


def _amp(word: str) -> str:
    return AMP_FIRST.get(word, word)


# fmt: off
@dataclass(frozen=True)
class RunOptions:
    """what to run"""

    scale: str = common(
        "scale", None,
        help="The recipe. full is the README's, short takes half an hour on a CPU, rehearsal "
        "takes built-in images, auto is short for --data-path, full where the data set is found "
        "in DATA_ROOT and else rehearsal (default: auto). What you say yourself wins over the "
        "recipe.",
    )
    one_student: bool = own(False, None, "After the folds, teach one student on all their images "
                            "what the folds' students say of images that they did not train on. "
                            "It is best_model.pdparams, the file to ship.", action="store_true")
    stage: str = own("all", str, "Run this stage only; what comes before it must be done.",
                     choices=("all", *STAGES))
    folds: tuple[int, ...] = own(None, COUNT, "Train only these of the folds (default: all).",
                                 nargs="+", metavar="FOLD")
    output: Path = common("output", None, help="The folder of the run (default: "
                          "runs/visiondistill_gc/garbage-SCALE).")
    log_dir: Path | None = own(None, Path, "The folder of VisualDL's logs (default: OUTPUT/logs).",
                               metavar="DIR")
    save_dir: Path | None = own(None, Path, "The folder of the finished models (default: "
                                "OUTPUT/models_saved).", metavar="DIR")
    seed: int = common("seed", 42)
    device: str = common("device", "auto", help="Where to compute: cpu, gpu, gpu:1, or auto for a "
                         "GPU where there is one.")
    threads: int | None = common(
        "threads", None,
        help="How many CPU threads compute (default: 1). Another number rounds differently, so a "
        "resumed run keeps the one it began with.",
    )


@dataclass(frozen=True)
class DataOptions:
    """data and folds"""

    data_path: Path | None = common("data-path", None, help="The folder with the images: one "
                                    "folder a class.")
    train_list: Path | None = own(None, Path, "A list of images as PaddleClas has it, instead of "
                                  "class folders: a line is a path below --data-path (default: "
                                  "the list's folder) and the number of a class.", metavar="FILE")
    val_list: Path | None = own(None, Path, "The list of the calibration part.", metavar="FILE")
    test_list: Path | None = own(None, Path, "The list of the held-out part. Parts without a list "
                                 "are taken from the others.", metavar="FILE")
    label_list: Path | None = own(None, Path, "The names of the classes, a line is a number and a "
                                  "name (default: the numbers).", metavar="FILE")
    data_root: Path = own(Path("data"), Path, "The folder that holds data sets, each under its "
                          "name.", metavar="DIR")
    data_set: str = own("garbage-4", str, "The name of the data set, to find it in DATA_ROOT.",
                        metavar="NAME")
    split: Path | None = common("split", None, help="A manifest that says which images are held "
                                "out for the test. Without it their content decides.")
    categories: tuple[str, ...] | None = own(
        None, str, "The names of the class folders. They are checked against the data (default: "
        "take them from the folders).", nargs="+", metavar="NAME")
    num_classes: int | None = own(None, SIZE, "How many classes the data must have (default: any "
                                  "number).", metavar="N")
    input_size: int = common("input-size", 224)
    workers: int = common("workers", 2, "--num-workers")
    test_share: float = own(0.1, number(float, 0, 0.9), "The share of the images that is held out "
                            "for the test; no fold sees them.", metavar="SHARE")
    split_seed: int = own(42, COUNT, "The number that decides the held-out part and the folds.",
                          metavar="N")
    quarantine: Path | None = own(None, Path, "A list of files to leave out.", metavar="FILE")
    decoded_cache: bool = own(False, None, "Decode every image once and keep the pixels on disk.")
    cache_size: int = own(0, COUNT, "The side in pixels of the images in that cache; 0 keeps each "
                          "image's own.", metavar="PIXELS")
    builtin_classes: int = own(4, number(int, 2, 45), "How many classes the built-in scenes have.",
                               metavar="N")
    builtin_images: int = own(60, SIZE, "How many built-in scenes a class has.", metavar="N")
    n_splits: int = own(5, number(int, 1, 100), "How many folds there are. 1 trains one student on "
                        "the training part; it is validated on the calibration part.", metavar="N")
    kfold: str = own("stratified", str, "How the folds are made: stratified spreads every class "
                     "evenly, plain looks at no class and moves no file when another comes.",
                     choices=FOLD_KINDS)
    group_by: str = own("near", str, "Which copies stay in one fold: near for nearly the same "
                        "picture, exact for the same bytes.", choices=("near", "exact"))
    group_pattern: str | None = own(
        None, str, "A regular expression. Files of a class whose names match equally (its first "
        "bracket, or all of it) stay together, in the folds and in the held-out part.",
        metavar="REGEX")


@dataclass(frozen=True)
class ViewOptions:
    """augmentation"""

    hflip: float = own(0.5, FRACTION, "The probability of a mirrored image.", metavar="P")
    vflip: float = own(0.3, FRACTION, "The probability of an image upside down.", metavar="P")
    rotation: float = own(30.0, number(float, 0, 180), "The largest angle in degrees by which an "
                          "image is turned.", metavar="DEGREES")
    crop_padding: int = own(8, COUNT, "How many pixels of black surround an image before it is "
                            "cropped back to its size.", metavar="PIXELS")
    jitter: tuple[float, ...] = own(
        (0.3, 0.3, 0.3, 0.1), WEIGHT, "How much the colours change.", nargs=4,
        metavar=("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"))
    erasing: float = own(0.2, FRACTION, "The probability that a rectangle becomes black.",
                         metavar="P")
    crop_scale: tuple[float, ...] = own(
        (1.0, 1.0), FRACTION, "The smallest and the largest share of the image's area that a "
        "random crop keeps.", nargs=2, metavar=("LOW", "HIGH"))


@dataclass(frozen=True)
class TeacherOptions:
    """teacher"""

    teacher: str = own("resnet50", str, "The network: efficientnet_lite0, 1 or 2, or any of "
                       "paddle.vision's.", metavar="NAME")
    teacher_source: str = own("paddle.vision", str, "The package the network comes from.",
                              choices=SOURCES)
    teacher_pretrained: Path | None = own(
        None, Path, "Weights to start the training of the teacher from; its head is new (default: "
        "as --init says).", metavar="FILE")
    teacher_weights: Path | None = own(None, Path, "A finished teacher. It is not trained.",
                                       metavar="FILE")
    teacher_knowledge: Path | None = own(
        None, Path, "A store of a teacher's answers, written by any project in either framework.",
        "--knowledge", metavar="DIR")
    knowledge_seed: int = own(0, COUNT, "The seed of the views that the stored teacher was shown.",
                              metavar="N")
    teacher_epochs: int = own(10, COUNT, "How many epochs the teacher is trained for; 0 leaves its "
                              "head as the probe of trained features made it, or untrained.",
                              metavar="N")
    teacher_frozen: int = own(0, COUNT, "How many units (stem, blocks, last convolution) of an "
                              "EfficientNet-lite teacher do not learn.", metavar="N")
    teacher_lr: float = own(1e-4, POSITIVE, "The teacher's learning rate after the warm-up.",
                            metavar="RATE")
    teacher_batch_size: int = own(16, SIZE, "How many images a step of the teacher learns from, in "
                                  "all processes together.", metavar="N")
    allow_untrained_teacher: bool = own(
        False, None, "Accept a teacher that knows nothing. The record says UNTRAINED.",
        action="store_true")
    teacher_engine: str = own("auto", str, "What runs the teacher: Paddle itself (dygraph) or "
                              "Paddle Inference; auto takes the second on a CPU.",
                              choices=ENGINES)


@dataclass(frozen=True)
class StudentOptions:
    """student"""

    student: str = own(MOBILENET, str, "The network: mobilenet_v2, or any that can teach.",
                       metavar="NAME")
    student_source: str = own("paddle.vision", str, "The package the student comes from; "
                              "paddleclas has its own names, PPLCNet_x1_0 say.", choices=SOURCES)
    student_scale: float = own(1.0, POSITIVE, "The width of MobileNetV2.", metavar="FACTOR")
    head: str = own("improved", str, "The classifier of MobileNetV2: improved has a hidden layer, "
                    "plain none.", choices=HEADS)
    hidden: int = own(1024, SIZE, "The width of the improved head's hidden layer.", metavar="N")
    dropout: float = own(0.5, _BELOW_ONE, "The probability of dropout before the last layer.",
                         metavar="P")
    init: str | None = common(
        "init", "trained", "--pretrained",
        help="The weights below the heads: trained (default) is an installed weights package for "
        "an EfficientNet-lite and paddle.vision's download for others; a FILE of Paddle, torch or "
        "safetensors is the student's; none trains teacher and student from nothing.")
    frozen: int = own(14, number(int, 0, 200), "How many of MobileNetV2's 19 blocks, or of an "
                      "EfficientNet-lite's or paddleclas network's units (stem, blocks), do not "
                      "learn. With --init none nothing is frozen.", metavar="N")
    freeze_bn: bool = own(True, None, "Keep the statistics of the frozen blocks' batch norms, "
                          "too.")


@dataclass(frozen=True)
class TrainingOptions:
    """training"""

    epochs: int = common("epochs", 50)
    probe: bool = own(False, None, "Start the heads above trained weights from a linear classifier "
                      "of stored features. A head with a hidden layer cannot.")
    batch_size: int = common("batch-size", 16, help="How many images a step learns from, in all "
                             "processes together.")
    lr: float = common("lr", 1e-4, "--base-lr")
    head_rate: float = own(1.0, POSITIVE, "By how much the heads learn faster than what is below "
                           "them.", metavar="FACTOR")
    warmup_epochs: int = own(5, COUNT, "For how many epochs the learning rate rises.", metavar="N")
    schedule: str = own("epoch", str, "When the learning rate changes.", choices=SCHEDULES)
    optimizer: str = own("adam", str, "adam decays through the gradients, adamw decays the "
                         "weights.", choices=("adam", "adamw"))
    weight_decay: float = own(1e-4, WEIGHT, "The weight decay.", metavar="W")
    clip_grad: float = own(0.0, WEIGHT, "The largest norm of the gradient; 0 does not clip.",
                           metavar="NORM")
    patience: int = own(10, COUNT, "Stop after so many epochs without a better validation "
                        "accuracy; 0 never stops early.", metavar="N")
    temperature: float = own(4.0, POSITIVE, "The temperature of the distillation.", metavar="T")
    alpha: float = own(0.5, FRACTION, "The weight of the labels against the teacher; 1 asks no "
                       "teacher.", metavar="WEIGHT")
    class_weights: str = own("balanced", str, "balanced counts images of rare classes more.",
                             choices=("balanced", "none"))
    mixup: float = own(0.2, WEIGHT, "The alpha of Mixup's Beta distribution; 0 mixes nothing.",
                       metavar="ALPHA")
    mixup_start: int = own(5, COUNT, "The first epoch, from 0, whose images are mixed.",
                           metavar="EPOCH")
    label_smoothing: float = own(0.0, _BELOW_ONE, "How much of each label is spread over all "
                                 "classes.", metavar="SHARE")
    ema: float = own(0.0, _BELOW_ONE, "The decay of the moving average of the weights, which is "
                     "what is kept; 0 has none.", metavar="DECAY")
    amp: str = common("amp", "fp32", type=_amp, choices=AMP, help="The precision of the "
                      "computation. All but fp32 need a GPU; -O2 keeps the weights small, too.")
    save_every: int = own(0, COUNT, "After how many steps the state is saved; 0 saves after every "
                          "epoch.", metavar="STEPS")


@dataclass(frozen=True)
class RecordOptions:
    """records"""

    visualdl: bool = own(True, None, "Log curves, images and histograms for VisualDL.")
    floor: bool = own(True, None, "Measure what linear classifiers reach: of plain image "
                      "features, and of a trained network's.")
    compare_seeds: tuple[int, ...] = own(
        (), COUNT, "Seeds of the comparison: distilled or not, Mixup or not, the right teacher or "
        "one with a random head (default: no comparison).", nargs="*", metavar="SEED")
    compare_epochs: int = own(10, SIZE, "How many epochs its students are trained for.",
                              metavar="N")
# fmt: on


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on, by concern."""

    run: RunOptions
    data: DataOptions
    view: ViewOptions
    teacher: TeacherOptions
    student: StudentOptions
    training: TrainingOptions
    records: RecordOptions
    start: Start = "new"

    def plain(self) -> dict[str, Any]:
        """All options under their names, as ``config.json`` holds them."""
        parts = asdict(self)
        del parts["start"]
        return as_plain({name: value for part in parts.values() for name, value in part.items()})


@dataclass(frozen=True)
class ExportOptions:
    """What ``export.py`` writes, and which images check it."""

    model: Path
    output: Path
    run: Path | None  # the run that made the model, if its folder is there
    data_path: Path | None
    unsure: float | None
    unsure_accuracy: float | None
    formats: tuple[str, ...]
    categories: tuple[str, ...] | None
    opset: int
    int8: str  # no, auto, yes
    max_accuracy_loss: float
    int8_method: str
    calibration: Path | None
    accuracy: Path | None


CONCERNS: dict[str, type] = {
    "run": RunOptions, "data": DataOptions, "view": ViewOptions, "teacher": TeacherOptions,
    "student": StudentOptions, "training": TrainingOptions, "records": RecordOptions,
}  # fmt: skip


def settings_of(args: argparse.Namespace, *, start: Start = "new") -> Settings:
    """The parsed words as settings; lists become tuples."""

    def value(name: str) -> Any:
        found = getattr(args, name)
        return tuple(found) if isinstance(found, list) else found

    parts = {
        concern: kind(**{f.name: value(f.name) for f in fields(kind)})
        for concern, kind in CONCERNS.items()
    }
    return Settings(**parts, start=start)


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser: a group of options for each concern."""
    parser = CommandParser(
        prog=prog,
        description="Garbage classification: a trained teacher, K folds, a distilled student.",
        epilog="Results go to --output: report.html, result.json, metrics.jsonl, logs/ for "
        "VisualDL, models_saved/best_model_fold0.pdparams ...",
    )
    for kind in CONCERNS.values():
        group = parser.add_argument_group(str(kind.__doc__))
        for one in fields(kind):
            about = dict(one.metadata)
            name, aliases = about.pop("common", None), about.pop("aliases")
            if name is None:
                words = ("--" + one.name.replace("_", "-"), *aliases)
                group.add_argument(*words, dest=one.name, default=one.default, **about)
                continue
            more = {"dest": one.name, **about["more"]}
            add_common(
                group,
                [name],
                defaults={name: one.default},
                aliases={name: aliases},
                help={name: about["help"]} if about["help"] else None,
                more={name: more},
            )
        if kind is RunOptions:
            add_common(group, ("resume", "continue", "fresh"))
    return parser

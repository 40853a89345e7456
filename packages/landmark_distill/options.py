"""The options of ``main.py``: the original's, those that all projects share, and our own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from landmark_distill import config
from landmark_distill.recipes import RECIPES
from landmark_distill.schedules import COSINES, SCHEDULERS
from shared_core.runs.numbers import COUNT, FRACTION, POSITIVE, SIZE, WEIGHT, number
from shared_core.runs.options import COMMON, CommandParser, add_common

ALIASED = {f"lite{n}": name for n, name in enumerate(config.LITE)}
SHARE = number(float, 0, 0.99)
ALIASES = {  # the spellings of the first README, and those that this package had before
    "data-path": ("--data_path",),
    "split": ("--split_file",),
    "input-size": ("--image_size",),
    "epochs": ("--max_epoch",),
    "batch-size": ("--batch_size",),
    "workers": ("--num_workers",),
    "init": ("--init_weights",),
}


def _resume(text: str) -> str:
    """``True``, ``False`` or ``auto`` as words; the original took any word for true."""
    words = {"true": "always", "always": "always", "false": "never", "never": "never"}
    found = words.get(text.lower(), text.lower())
    if found not in ("always", "never", "auto"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected True, False or auto")
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers such as 2,2,6,2") from None


def _backbone(text: str) -> str:
    """A network of ours, of the core, or of a library; ``timm:NAME`` counts as ``timm/NAME``."""
    name = ALIASED.get(text, text).replace(":", "/", 1)
    library, slash, inside = name.partition("/")
    if name in (*config.BACKBONES, *config.LITE) or (
        slash and library in config.LIBRARIES and inside and "/" not in inside
    ):
        return name
    raise argparse.ArgumentTypeError(
        f"{text!r}: expected one of {', '.join((*config.BACKBONES, *config.LITE))}, timm/NAME or "
        "torchvision/NAME"
    )


# Group: the common options in it, and rows of our own: name, what its value is (bool: none, a
# tuple: one of these), default, sentence, further arguments of argparse.
Row = tuple[Any, ...]
RUN: tuple[Row, ...] = (
    ("recipe", tuple(RECIPES), None, "A published recipe, or lite0: a trained network is tuned; "
     "--data-path alone means it. Options on the command line win over it."),
    ("test_only", bool, False, "Do not train: test the file of --init. It says what network it is "
     "of and what it sees."),
    ("save_dir", Path, Path("runs/landmark_distill"), "The folder below which runs get folders "
     "named by task and settings.", {"metavar": "DIR"}),
    ("suffix", str, "", "Text behind the name of the settings' folder."),
    ("multi_gpu", bool, False, "Use all GPUs of this machine, with a process for each; torchrun "
     "starts processes on several machines."),
)  # fmt: skip
NETWORK: tuple[Row, ...] = (
    ("backbone_class", _backbone, "Resnet12", "The network that learns: "
     f"{', '.join((*config.BACKBONES, *config.LITE))}, timm/NAME or torchvision/NAME. Those of a "
     "library get a new layer that makes the features.", {"metavar": "NAME"}),
    ("feature_dim", SIZE, 1024, "The numbers in a feature, of student and teacher."),
    ("num_classes", SIZE, None, "The rows of a new head. Without it there is one for each class "
     "of the data."),
    ("cos_scale", POSITIVE, 32.0, "What the head multiplies cosines by."),
    ("cos_margin", SHARE, 0.1, "What the label's cosine loses in training."),
    ("window", SIZE, None, "The side of a Swin's windows in tokens. Without it 1/32 of the "
     "image's side in pixels."),
    ("depths", _numbers, None, "The blocks in the stages of a Swin, such as 2,2,6,2."),
    ("heads", _numbers, None, "The attention heads in the stages of a Swin, such as 2,4,8,16."),
    ("drop_path", SHARE, None, "The share of a Swin's branches that is left out in training. "
     "Without it 0.1."),
    ("drop_rate", SHARE, None, "The share of a Resnet12's maps that is dropped in training. "
     "Without it 0.1."),
    ("drop_block", COUNT, None, "The side in pixels of the squares that a Resnet12 drops. Without "
     "it 5."),
    ("drop_block_steps", SIZE, None, "The steps until a Resnet12 drops its whole share. Without "
     "it 40000."),
    ("width", SIZE, None, "The channels of a Resnet20's first stage. Without it 16."),
)  # fmt: skip
DISTILLATION: tuple[Row, ...] = (
    ("is_distill", bool, False, "Learn from a teacher."),
    ("teacher_backbone_class", _backbone, None, "The teacher's network, named as the student's.",
     {"metavar": "NAME"}),
    ("teacher_init_weights", Path, None, "The teacher's file."),
    ("teacher_classes", ("by-name", "by-number"), "by-name", "How a class of the data finds its "
     "row in the teacher's head. by-number takes row i for class i, for a teacher whose file "
     "names no classes."),
    ("teacher_may_know_test", bool, False, "Accept a teacher that has learned classes of the "
     "test. They are not unseen then, and the record says so."),
    ("kd_loss", config.KD_LOSSES, "KD", "What is compared: KD predictions through the head, "
     "global_KD features by their distance, cosine features by their direction."),
    ("kd_weight", WEIGHT, 1.0, "The weight of the teacher's loss."),
    ("ce_weight", WEIGHT, 1.0, "The weight of the labels' loss."),
    ("kd_variant", config.KD_VARIANTS, "canonical", "canonical is T^2 KL at one temperature, "
     "averaged over the batch; in original the temperature divides the student's logits only, "
     "and the batch is summed."),
    ("kd_temperature", POSITIVE, 4.0, "The temperature T of KD."),
    ("head_fixed", bool, False, "Take the teacher's head over, frozen."),
    ("mapped_head", bool, False, "Map the fixed head from its file instead of reading it."),
    ("head_dtype", config.HEAD_DTYPES, "fp32", "The precision that a fixed head is kept in."),
    ("knowledge", Path, None, "The folder of stored teacher outputs; it is made where it is "
     "missing.", {"metavar": "DIR"}),
    ("knowledge_kind", config.KNOWLEDGE, "features", "What is stored of each view: the teacher's "
     "features; the soft label that a fixed head makes of them; or its largest logits, which are "
     "exact at --kd_temperature 1."),
    ("knowledge_top_k", SIZE, 16, "How many logits topk stores."),
    ("fill_knowledge", bool, False, "Store the teacher's outputs for all views, and do not "
     "train."),
)  # fmt: skip
TRAINING: tuple[Row, ...] = (
    ("warmup_epoch", COUNT, 0, "The epochs in which the rate rises."),
    ("min_lr", WEIGHT, 1e-6, "The rate that the cosine falls to."),
    ("body_rate", number(float, 0, 1, open_low=True), 0.1, "The share of the rate that a trained "
     "body learns with. Its new layers learn with all of it."),
    ("layer_decay", number(float, 0, 1, open_low=True), 1.0, "What a layer of a trained body has "
     "of the rate of the layer above it."),
    ("freeze_body", bool, False, "A trained body does not learn, only what is new above it."),
    ("freeze_bn", config.FREEZE_BN, config.AUTO, "Whether batch norms keep their means and "
     "variances. auto is yes for trained ones, which say more than small batches do."),
    ("feature_start", config.FEATURE_START, config.AUTO, "What the new layer above a trained body "
     "starts as. auto makes images of a class alike and puts the head's rows at the classes' "
     "means; a student is turned to its teacher's features."),
    ("choose_by", config.CHOICES, "accuracy", "What chooses the best epoch: accuracy on held-out "
     "images of the learned classes, or recall@1 and verification among the unseen classes of "
     "--validation_share; auto takes these where there are some. What a trained body gives before "
     "any training is a candidate, too."),
    ("optim", config.OPTIMIZERS, "SGD", "The optimizer."),
    ("momentum", number(float, 0, 0.9999), 0.0, "The momentum of SGD."),
    ("weight_decay", WEIGHT, 5e-4, "The weight decay."),
    ("weight_decay_on", config.DECAY, "all", "Which weights decay: all, or matrices and kernels."),
    ("lr_scheduler", SCHEDULERS, "cosine", "How the rate falls."),
    ("cosine", COSINES, "original", "The original's warm-up and cosine, or those that begin and "
     "end where they should."),
    ("step_size", str, "20", "The epochs between two steps, or 10,20,30 for multistep."),
    ("gamma", number(float, 0, 1, open_low=True), 0.5, "What a step multiplies the rate by."),
    ("clip_grad", WEIGHT, 0.0, "The largest norm of a gradient. 0 leaves all as they are."),
    ("grad_checkpointing", bool, False, "Compute blocks twice: less memory, more time."),
    ("channels_last", bool, False, "Keep the channels of a pixel together in memory."),
    ("log_interval", SIZE, 50, "The steps between lines of progress."),
    ("eval_interval", SIZE, 1, "The epochs between validations."),
    ("save_every", COUNT, 0, "Save the run's state every N steps, too. 0 saves it after each "
     "epoch."),
    ("save_all", bool, False, "Let max_acc.pth hold head and teacher, too."),
)  # fmt: skip
DATA: tuple[Row, ...] = (
    ("dataset", str, "TLD", "The name that folders and records bear."),
    ("layout", config.LAYOUTS, "auto", "How deep the classes lie in --data-path."),
    ("calibration_share", number(float, 0.01, 0.5), 0.1, "The share of each learned class that "
     "chooses the best epoch."),
    ("test_share", FRACTION, 0.25, "The share of the classes that is kept for the test, in whole "
     "groups."),
    ("validation_share", FRACTION, 0.0, "The share of the classes that is kept for tuning, "
     "likewise."),
    ("test_groups", _names, (), "The groups of the test, a,b, instead of a share."),
    ("validation_groups", _names, (), "The groups for tuning, a,b, instead of a share."),
    ("split_seed", COUNT, 0, "The number that decides which classes and images are kept."),
    ("test_part", ("test", "validation"), "test", "Which unseen classes of a folder are tested."),
    ("builtin_classes", number(int, 4, 45), 12, "The classes of the drawn scenes."),
    ("builtin_images", SIZE, 40, "The drawn scenes of a class."),
)  # fmt: skip
SEVERAL = {"nargs": "+"}
LISTS: tuple[Row, ...] = (
    ("train_list", Path, [], "Lists to learn from: path, remark, label, tabs between.", SEVERAL),
    ("train_root", Path, [], "The folder of each list's paths.", {**SEVERAL, "metavar": "DIR"}),
    ("remap", Path, None, "A map of labels to final labels, .json or a torch file."),
    ("val_list", Path, None, "The list that chooses the best epoch."),
    ("val_root", Path, None, "The folder of its paths.", {"metavar": "DIR"}),
    ("test_list", Path, None, "The list of the open-set test."),
    ("test_root", Path, None, "The folder of its paths.", {"metavar": "DIR"}),
    ("coarse_mask", Path, None, "The coarse truth of --test_list: pairs or labels, .npy. Without "
     "it the list's labels."),
    ("fine_mask", Path, None, "The fine truth, likewise."),
)  # fmt: skip
VIEWS: tuple[Row, ...] = (
    ("augment", bool, False, "Random crops, flips and lighting noise in training."),
    ("crop_scale", FRACTION, (0.08, 1.0), "The share of the image in a crop.",
     {"nargs": 2, "metavar": ("LOW", "HIGH")}),
    ("hflip", FRACTION, 0.5, "The share of the views that are mirrored."),
    ("lighting", WEIGHT, 0.1, "The deviation of the lighting noise. 0 is none."),
    ("lighting_order", config.LIGHTING_ORDERS, "right", "Whose noise a channel gets; original "
     "adds red's to blue."),
    ("bgr", bool, False, "Put blue first, as the original's networks want it."),
    ("views", COUNT, 0, "The views that an image has. 0 is a new one each epoch."),
    ("view_seed", COUNT, None, "The number that decides the views. Without it that of --seed."),
    ("resize", config.RESIZES, "linear", "How images are made smaller."),
)  # fmt: skip


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser; defaults are the original's wherever it had one that could run."""
    p = CommandParser(
        prog=prog,
        description="Teach a small network through the frozen classifier of a large one, and test "
        "it by verification among classes that it has not seen.",
        epilog="Results go to --output, or to --save_dir/<task>/<settings>: record.txt, "
        "metrics.jsonl, max_acc.pth, checkpoint.pth.tar, opensetFeat.npy, result.json.",
    )
    run = p.add_argument_group("what to run")
    _common_run(run)
    _rows(run, RUN)
    network = p.add_argument_group("network")
    _common_network(network)
    _rows(network, NETWORK)
    _rows(p.add_argument_group("distillation"), DISTILLATION)
    training = p.add_argument_group("training")
    _common_training(training)
    _rows(training, TRAINING)
    data = p.add_argument_group("data")
    _common_data(data)
    _rows(data, DATA)
    _rows(p.add_argument_group("image lists"), LISTS)
    _rows(p.add_argument_group("views"), VIEWS)
    return p


def _common_run(group: argparse._ArgumentGroup) -> None:
    add_common(
        group,
        ("output", "resume", "continue", "fresh", "seed", "device", "threads"),
        help={
            "output": "The folder of the run. Without it --save_dir and the settings name one.",
            "resume": "Go on with the run in the folder, exactly where it stopped. auto goes on "
            "if there is one, or else starts it.",
        },
        more={
            "resume": {
                "action": "store", "nargs": "?", "const": "always", "default": "never",
                "type": _resume, "metavar": "True|False|auto",
            },
            "threads": {"type": COUNT},
        },
    )  # fmt: skip


def _common_network(group: argparse._ArgumentGroup) -> None:
    add_common(
        group,
        ("input-size", "init"),
        defaults={"input-size": 384, "init": config.AUTO},
        aliases={name: ALIASES[name] for name in ("input-size", "init")},
        help={
            "init": "What to start from: a file of weights (with --test_only the file to test), "
            "a name that `smallvision weights` lists, trained (an installed package's weights or "
            "the library's download), none, or auto, which is trained for networks of a library "
            "where such weights can be had, and else none."
        },
        more={
            "input-size": {"type": number(int, 8, 4096)},
        },
    )


def _common_training(group: argparse._ArgumentGroup) -> None:
    add_common(
        group,
        ("epochs", "batch-size", "lr", "amp"),
        defaults={"epochs": 100, "batch-size": 4, "lr": 1e-4},
        aliases={name: ALIASES[name] for name in ("epochs", "batch-size")},
        help={"batch-size": "How many images a step learns from, in all processes together."},
        more={
            "amp": {
                "choices": (*COMMON["amp"]["choices"], config.AUTO),
                "help": "The precision "
                "of the computation. auto is bf16 where the hardware computes it and images "
                "have 64 pixels or more.",
            }
        },
    )


def _common_data(group: argparse._ArgumentGroup) -> None:
    names = ("data-path", "split", "workers")
    add_common(
        group,
        names,
        defaults={"workers": 4},
        aliases={name: ALIASES[name] for name in names},
        help={
            "data-path": "The folder with the images: class/image or coarse/fine/image. Without "
            "it and without lists, scenes are drawn.",
            "split": "A split.json that another run made. Without it the shares below decide.",
        },
    )


def _rows(group: argparse._ArgumentGroup, rows: tuple[Row, ...]) -> None:
    """Add options of our own."""
    for name, kind, default, sentence, *more in rows:
        words: dict[str, Any] = {"default": default, "help": sentence}
        if kind is bool:
            words["action"] = "store_true"
        elif isinstance(kind, tuple):
            words["choices"] = kind
        else:
            words |= {"type": kind, "metavar": "FILE" if kind is Path else "X"}
        group.add_argument(f"--{name}", **(words | (more[0] if more else {})))

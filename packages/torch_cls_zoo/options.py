"""Every option of ``main.py`` as one row of one table: how it is spelled, what it is for, when.

A row says which modes look at the option (elsewhere it would do nothing and is refused), what it
needs beside it, whether a resumed run may say something else, and whether it is written down in
the run's ``config.json`` and beside the weights. Nothing here loads more than argparse.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_core.runs.numbers import COUNT, FRACTION, POSITIVE, SIZE, WEIGHT, number
from shared_core.runs.options import COMMON, CommandParser
from torch_cls_zoo.dataloader import PARTS, POLICIES

DEFAULT_ARCH = "efficientnet_lite0"  # its weights come as a package
NONE, TRAINED = "none", "trained"  # as shared_core.weights.finding, which loads numpy, has them
RESUME_RUN = "run"  # what `--resume` without a value stands for
VISUAL_METHODS = ("cam", "grad-cam", "grad-cam++", "grad-camm++", "all")
ACTIONS = (
    "evaluate",
    "knowledge",
    "make_curriculum",
    "visual_data",
    "export",
    "jit",
)  # with a network
MODES = ("train", "find_lr", *ACTIONS)
SUMMARY = "summary"  # the mode without a mode: print the network
LEARNING = ("train", "find_lr")


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        flags: its spellings, the first is how messages call it.
        dest: its name in the settings.
        words: for argparse: type, default, choices, help ...
        modes: modes that look at it.
        needs: options one of which must be set, or it would do nothing.
        may_differ: a resumed run may say something else, for the result stays the same.
        in_config: it stands in the run's ``config.json``.
        in_facts: it stands beside the weights, for it says what the network is.
    """

    flags: tuple[str, ...]
    dest: str
    words: Mapping[str, Any]
    modes: tuple[str, ...] = MODES
    needs: tuple[str, ...] = ()
    may_differ: bool = False
    in_config: bool = True
    in_facts: bool = True

    @property
    def default(self) -> Any:
        """Its value where the command does not say it."""
        switch = self.words.get("action") == "store_true"
        return self.words.get("default", False if switch else None)

    @property
    def is_path(self) -> bool:
        """Whether its value is a path."""
        return self.words.get("type") is Path


def _row(
    flags: str,
    sentence: str,
    *,
    dest: str | None = None,
    modes: tuple[str, ...] = MODES,
    needs: tuple[str, ...] = (),
    may_differ: bool = False,
    in_config: bool = True,
    in_facts: bool = True,
    **words: Any,
) -> Option:
    spellings = tuple(flags.split())
    named = dest or next(f for f in spellings if f.startswith("--")).lstrip("-").replace("-", "_")
    words = {**(words or {"action": "store_true"}), "help": sentence}
    return Option(spellings, named, words, modes, needs, may_differ, in_config, in_facts)


def _common(name: str, aliases: str = "", help: str | None = None, **words: Any) -> Option:
    """An option that all five projects share: the core's spelling and sentence, our aliases."""
    known = {**COMMON[name], **words}
    sentence = help or known["help"]
    return _row(f"--{name} {aliases}", sentence, **{k: v for k, v in known.items() if k != "help"})


_MIX = ("mixup", "cutmix")
_TRAINS = {"modes": LEARNING}
SCHEDULES = ("steps", "cosine")
FRESH_HEAD_LR = 3e-3  # of finetune where the head does not start from a probe
# Epochs where a recipe says none: as many as show so many pictures, within these bounds.
PICTURES_SHOWN, FEWEST, MOST = 16_000, 5, 20
# What a training's options are where the command does not say them.
RECIPES: dict[str, dict[str, Any]] = {
    "probe": {
        "epochs": 0, "opt": "sgd", "lr": 1.0, "head_lr": None, "layer_decay": 1.0,
        "schedule": "cosine", "wd": 0.0, "warmup": None, "clip_grad": 0.0, "drop_path": 0.0,
        "probe": True, "freeze_bn": True, "ema": 0.0, "amp": "fp32",
        "label_smoothing": 0.0, "crop": 1.0, "flip": 0.0,
        "batch_size": 64,
    },
    "finetune": {
        "epochs": None, "opt": "adamw", "lr": 5e-4, "head_lr": 3e-4, "layer_decay": 0.9,
        "schedule": "cosine", "wd": 0.02, "warmup": None, "clip_grad": 5.0, "drop_path": 0.1,
        "probe": True, "freeze_bn": True, "ema": 0.98, "amp": "auto",
        "label_smoothing": 0.1, "crop": 0.4, "flip": 0.5,
        "batch_size": 64,
    },
    "scratch": {
        "epochs": 85, "opt": "adamw", "lr": 2e-3, "head_lr": None, "layer_decay": 1.0,
        "schedule": "cosine", "wd": 0.05, "warmup": None, "clip_grad": 5.0, "drop_path": 0.0,
        "probe": False, "freeze_bn": False, "ema": 0.0, "amp": "auto",
        "label_smoothing": 0.1, "crop": 0.4, "flip": 0.5,
        "batch_size": 64,
    },
    "readme": {
        "epochs": 85, "opt": "adam", "lr": 1e-4, "head_lr": None, "layer_decay": 1.0,
        "schedule": "steps", "wd": 5e-4, "warmup": 5, "clip_grad": 0.0, "drop_path": 0.0,
        "probe": False, "freeze_bn": False, "ema": 0.0, "amp": "fp32",
        "label_smoothing": 0.0, "crop": 1.0, "flip": 0.0,
        "batch_size": None,
    },
}  # fmt: skip


def _of_recipe(
    flags: str, sentence: str, modes: tuple[str, ...] = LEARNING, **words: Any
) -> Option:
    """An option of learning whose value, where it is not said, is the recipe's."""
    name = next(f for f in flags.split() if f.startswith("--")).lstrip("-")
    told = ", ".join(
        f"{_word(known[name])} in {each}"
        for each, known in RECIPES.items()
        if each != "probe" and (name, known[name]) != ("epochs", None)
    )
    return _row(flags, f"{sentence} Without it that of --recipe: {told}.", modes=modes, **words)


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return str(value) if not isinstance(value, bool) else "on" if value else "off"


_OUTSIDE = {"may_differ": True, "in_facts": False}  # where and how, not what

DATA = (
    _common(
        "data-path", "--data", "The folder with the images: train/, val/ and test/ with one folder "
        "a class in each, or class folders alone. The word builtin draws scenes.",
        dest="data", type=str, default="data",
    ),
    _common("split"),
    _row(
        "--input-size --image_size", "The height and width in pixels of what the network sees, or "
        "one number for both; without it those of the weights, or 224.",
        dest="image_size", type=SIZE, nargs="+", metavar="PIXELS", modes=(*MODES, SUMMARY),
    ),
    _row(
        "--num_classes", "How many class folders there must be (without images, the outputs of the "
        "network that is printed, 6).",
        type=number(int, 2, 10**6), metavar="N", modes=(*MODES, SUMMARY),
    ),
    _common(
        "workers", "-j", "How many threads read and decode images; without it as many as there are "
        "cores, at most 8.", **_OUTSIDE,
    ),
    _common(
        "batch-size", "-b --batch_size", "How many images a step takes, in each process; without "
        "it 64 in the recipes finetune and scratch, else 256 and at most a quarter of the training "
        "images.",
    ),
    _row(
        "--quarantine", "A list of files to leave out; check_images.py writes one.",
        type=Path, metavar="FILE",
    ),
    _common("seed", default=1234),
)  # fmt: skip

NETWORK = (
    _row(
        "-a --arch", "The network: any name of torchvision or timm, or one of models/aliases.py. "
        f"Without it the network of the weights, or {DEFAULT_ARCH}.",
        metavar="NAME", default=None, modes=(*MODES, SUMMARY),
    ),
    _common(
        "init", "--pretrained", "The weights that a training starts from: trained for those of the "
        "network (an installed package's, or the library's), a file, a name that `smallvision "
        "weights` lists, or none. Without it trained where they can be had.",
        dest="init", nargs="?", const=TRAINED, default=TRAINED, **_TRAINS,
    ),
    _row("--advprop", "Scale the pixels to [-1, 1], as networks trained by AdvProp want them."),
    _common(
        "resume", "", "A file of weights to start from or to use. Without a value, or with a run's "
        "folder, go on with that run exactly where it stopped.",
        action="store", nargs="?", const=RESUME_RUN, metavar="FILE", modes=(*MODES, SUMMARY),
    ),
    _row(
        "--summary", "Print the layers with their parameters and multiply-adds first.",
        modes=(*MODES, SUMMARY), **_OUTSIDE,
    ),
)  # fmt: skip

DOING = (
    _row("--train", "Train, then test the best weights."),
    _row("-e --evaluate --evaluation", "Measure on the test part.", **_OUTSIDE),
    _row(
        "--find_lr", "The LR-range test, in that many steps, of the training that the other "
        "options describe (100 where no number follows).",
        type=number(int, 5, 10**6), nargs="?", const=100, metavar="STEPS", in_config=False,
        in_facts=False,
    ),
    _row(
        "--export", "Write the model folder, which every command of the repository opens, checked "
        "against the network on the test images.", **_OUTSIDE,
    ),
    _row(
        "--jit", "Write the model folder and, beside the weights, TorchScript, ONNX and "
        "torch.export files, each checked against the network on the test images.", **_OUTSIDE,
    ),
    _row(
        "--knowledge", "Write what the network says of that part's images, to teach others with.",
        choices=PARTS, **_OUTSIDE,
    ),
    _row(
        "--visual_data", "Draw class activation maps of that part's images.",
        choices=PARTS, **_OUTSIDE,
    ),
    _row(
        "--make_curriculum", "Write a weight for each of that part's images, by how sure the "
        "network is of it.", choices=PARTS, **_OUTSIDE,
    ),
)  # fmt: skip

TRAINING = (
    _row(
        "--recipe", "The options of a training that the command does not say. finetune: above "
        "trained weights; probe: the head alone, a linear classifier, in seconds; scratch: from "
        "nothing, as is done today; readme: the first README's. Without it finetune where --init "
        "brings trained weights, else readme.",
        choices=tuple(RECIPES), **_TRAINS,
    ),
    _of_recipe(
        "--epochs", "How often every training image is seen. In finetune as often as shows about "
        f"{PICTURES_SHOWN:,} pictures, {FEWEST} to {MOST} times.", type=SIZE, metavar="N",
    ),
    _of_recipe(
        "--opt", "The optimizer: any name of optim/build.py or timm.optim.", metavar="NAME"
    ),
    _of_recipe(
        "--lr", "The learning rate, of the body where --head_lr is said.", type=POSITIVE,
        metavar="R",
    ),
    _of_recipe(
        "--head_lr", "The learning rate of the head; biases and norms are not decayed then. In "
        f"finetune {FRESH_HEAD_LR} with --no-probe.",
        type=POSITIVE, metavar="R",
    ),
    _of_recipe(
        "--layer_decay", "What the rate is multiplied by from one block to the one before it.",
        type=number(float, 0, 1, open_low=True), metavar="F",
    ),
    _of_recipe(
        "--schedule", "How the rate goes: steps, the README's rule by epochs, or cosine, rising "
        "and falling with every batch.", choices=SCHEDULES,
    ),
    _row(
        "--lr_ratios", "Factors of the learning rate, each up to its epoch of --lr_steps, in place "
        "of the README's rule.", type=POSITIVE, nargs="+", metavar="F", **_TRAINS,
    ),
    _row(
        "--lr_steps", "The epochs, growing, at which the factors of --lr_ratios end.",
        type=SIZE, nargs="+", metavar="N", **_TRAINS,
    ),
    _row(
        "--momentum", "The momentum of sgd, and of those of timm that have one.",
        type=number(float, 0, 0.999999), default=0.9, metavar="M", **_TRAINS,
    ),
    _of_recipe(
        "--wd --weight_decay --weight-decay", "The weight decay, apart from the gradient and for "
        "all but biases.", type=WEIGHT, metavar="D",
    ),
    _of_recipe(
        "--warmup", "How many epochs come first, at a tenth of the rate, with a cosine at a "
        "rising one.", type=COUNT, metavar="N",
    ),
    _of_recipe(
        "--clip_grad", "The largest norm of the gradient; 0 for any.", type=WEIGHT, metavar="NORM"
    ),
    _of_recipe(
        "--drop_path", "The share of the last block's images that skip it, rising over the blocks.",
        type=number(float, 0, 0.99), metavar="F",
    ),
    _of_recipe(
        "--probe", "Start the head from a linear classifier on the features of the training "
        "images.", action=argparse.BooleanOptionalAction,
    ),
    _of_recipe(
        "--freeze_bn", "Keep the means and variances of batch norms as they are: trained ones say "
        "more than the small batches of a small set.", action=argparse.BooleanOptionalAction,
    ),
    _of_recipe(
        "--ema", "Judge and keep a moving average of the weights, of which a step keeps that "
        "share; 0 keeps the weights themselves.", type=number(float, 0, 0.99999), metavar="F",
        modes=("train",),
    ),
    _row(
        "--accumulate", "How many batches a step learns from: their mean gradient, as of one "
        "large batch that would not fit into memory.", type=SIZE, default=1, metavar="N",
        modes=("train",),
    ),
    _row(
        "--patience", "Stop after that many epochs without a better validation; 0 never does.",
        type=COUNT, default=0, metavar="N", modes=("train",),
    ),
    _row(
        "--unfreeze", "Open the network from the head downwards: in the first epoch only the head "
        "learns, from epoch N on all of it. 0 opens all at once.", type=COUNT, default=0,
        metavar="N", modes=("train",),
    ),
    _row(
        "--compile", "Let torch.compile translate the training step; it needs a C++ compiler and "
        "a minute or more at the start.", modes=("train",),
    ),
    _row(
        "-p --print-freq --print_freq", "How many batches pass between two lines.",
        dest="print_freq", type=SIZE, default=50, metavar="N", modes=("train",), **_OUTSIDE,
    ),
    _of_recipe(
        "--amp", "The precision of the computation; auto is bf16 where the hardware computes it "
        "and images have 64 pixels or more.",
        choices=(*COMMON["amp"]["choices"], "auto"),
    ),
    _row("--sparsity", "Slim the network: push batch-norm scales to 0, for prune.py.", **_TRAINS),
    _row(
        "--slim", "How hard --sparsity pushes: a step moves a scale by the learning rate times it.",
        type=POSITIVE, default=5e-4, metavar="S", needs=("sparsity",), **_TRAINS,
    ),
    _row(
        "--bias_prior", "The first probability of each class, or one for all, or the word data for "
        "the classes' shares.", nargs="+", metavar="P", **_TRAINS,
    ),
    _row(
        "--save_every", "Save the run's state every N batches, too, beside after each epoch.",
        type=COUNT, default=0, metavar="N", modes=("train",), **_OUTSIDE,
    ),
    _common("continue", dest="go_on", modes=("train",), in_config=False, in_facts=False),
    _common("fresh", modes=("train",), in_config=False, in_facts=False),
)  # fmt: skip

LOSS = (
    _row(
        "--criterion", "What the logits mean: softmax, one class of all; bce, a yes or no for each "
        "class. Without it that of the weights, or softmax.", choices=("softmax", "bce"),
    ),
    _of_recipe(
        "--label_smoothing", "The share of each label that is dealt out to all classes.",
        type=number(float, 0, 0.99), metavar="F",
    ),
    _row("--weighted_loss", "Weigh confusions by the matrix of --class_matrices.", **_TRAINS),
    _row("--threshold_loss", "Leave out what is learned already.", **_TRAINS),
    _row("--ghm_loss", "Even out the gradients (GHM-C).", **_TRAINS),
    _row(
        "--ghm_counts", "Which terms --ghm_loss counts with softmax: those that the loss has, or "
        "as the original did all classes' alike, which makes the loss larger by about half the "
        "number of classes.", choices=("loss", "original"), default="loss", needs=("ghm_loss",),
        **_TRAINS,
    ),
    _row("--ohm_loss", "Keep the hardest terms of each batch (OHM).", **_TRAINS),
    _row(
        "--hard_ratio", "The share that --ohm_loss keeps.", type=number(float, 0, 1, open_low=True),
        default=0.7, metavar="SHARE", needs=("ohm_loss",), **_TRAINS,
    ),
    _row(
        "--class_matrices", "A YAML file with the matrices of the weighted and threshold losses.",
        type=Path, metavar="FILE", needs=("weighted_loss", "threshold_loss"), **_TRAINS,
    ),
)  # fmt: skip

AUGMENTATION = (
    _row("--aug", "Augment by MyAugment, which is --aug_policy my.", **_TRAINS),
    _row("--aug_policy", "Augment by this policy.", choices=POLICIES, **_TRAINS),
    _of_recipe(
        "--crop", "Cut a random window of at least that share of each picture; 1 shows all of it.",
        type=number(float, 0, 1, open_low=True), metavar="SHARE",
    ),
    _of_recipe(
        "--flip", "The probability that a picture is mirrored.", type=FRACTION, metavar="P"
    ),
    _row(
        "--quarter_turns", "Turn each picture by a random number of right angles: for scenes from "
        "above, which have no upper side.", **_TRAINS,
    ),
    _row(
        "--erasing", "The probability that noise covers a rectangle of the picture.",
        type=FRACTION, default=0.0, metavar="P", **_TRAINS,
    ),
    _row(
        "--balanced", "Show every class as often as any other, whatever its number of images.",
        **_TRAINS,
    ),
    _row("--mixup", "Mix two images each, and their losses.", **_TRAINS),
    _row(
        "--mixup_ratio", "The share of the batches that are mixed at all.",
        type=FRACTION, default=0.5, metavar="SHARE", needs=_MIX, **_TRAINS,
    ),
    _row(
        "--mixup_alpha", "The shares of mixup come from Beta(A, A).",
        type=POSITIVE, default=1.1, metavar="A", needs=("mixup",), **_TRAINS,
    ),
    _row("--mix_targets", "Let mixup mix targets, not losses.", needs=("mixup",), **_TRAINS),
    _row("--cutmix", "Paste a rectangle of another image into each.", **_TRAINS),
    _row(
        "--cutmix_alpha", "The areas of cutmix come from Beta(A, A).",
        type=POSITIVE, default=1.0, metavar="A", needs=("cutmix",), **_TRAINS,
    ),
    _row("--multi_scale", "Give each batch a size of its own, up to 15 %% off.", **_TRAINS),
)  # fmt: skip

TEACHING = (
    _row(
        "--knowledge_dir", "The folder of knowledge and curriculum files; without it that of the "
        "images.", type=Path, metavar="DIR",
        needs=("knowledge", "distill", "make_curriculum", "curriculum_learning"),
    ),
    _row(
        "--knowledge_name", "The name of the file that --knowledge writes, like distill_b0.txt.",
        default="distill.txt", metavar="NAME", needs=("knowledge",), **_OUTSIDE,
    ),
    _row("--distill", "Learn from the mean of all distill*.txt in place of labels.", **_TRAINS),
    _row(
        "--distill_allow_missing", "How many images may have no teacher; they keep their label.",
        type=COUNT, default=0, metavar="N", needs=("distill",), **_TRAINS,
    ),
    _row(
        "--curriculum_thresholds", "Falling probabilities of the true class: an image gets the "
        "weight of the first that it is above.", type=float, nargs="+", metavar="P",
        default=[0.7, 0.5, 0.3, 0.0], needs=("make_curriculum",), **_OUTSIDE,
    ),
    _row(
        "--curriculum_weights", "The weights, as many; below all thresholds an image is left out.",
        type=float, nargs="+", metavar="W", default=[1.0, 0.7, 0.4, 0.1],
        needs=("make_curriculum",), **_OUTSIDE,
    ),
    _row("--curriculum_learning", "Weigh the images' losses by curriculum.txt.", **_TRAINS),
)  # fmt: skip

PICTURES = (
    _row(
        "--visual_method", "Which maps to draw.", choices=VISUAL_METHODS, default="cam",
        needs=("visual_data",), **_OUTSIDE,
    ),
    _row(
        "--visual_layer", "The layer to look at; without it the last before pooling.",
        metavar="NAME", default=None, needs=("visual_data",), **_OUTSIDE,
    ),
    _row(
        "--visual_number", "How many images to draw, evenly spread; 0 draws all.",
        type=COUNT, default=16, metavar="N", needs=("visual_data",), **_OUTSIDE,
    ),
)  # fmt: skip

PROCESSES = (
    _common("device"),
    _row(
        "--cuda", "The older spelling of --device cuda; --no-cuda that of --device cpu.",
        action=argparse.BooleanOptionalAction, default=None, in_facts=False,
    ),
    _row(
        "-n --nodes", "On how many machines the command is started.",
        type=SIZE, default=1, metavar="N", **_OUTSIDE,
    ),
    _row(
        "-g --gpus", "How many processes this machine starts, a GPU each; without it one for each "
        "GPU. With --no-cuda they share the CPU.", type=COUNT, metavar="N", **_OUTSIDE,
    ),
    _row(
        "--rank", "The number of this machine, from 0.", type=number(int, -1, 10**6), default=-1,
        metavar="N", **_OUTSIDE,
    ),
    _row(
        "--init_method", "Where the processes meet.", default="tcp://127.0.0.1:10006",
        metavar="URL", **_OUTSIDE,
    ),
    _row(
        "--sync_bn", "Let batch norm see the batches of all processes; on GPUs only.", **_TRAINS
    ),
    _common(
        "threads", "", COMMON["threads"]["help"] + " 0 leaves it to torch.", type=COUNT, default=0
    ),
)  # fmt: skip

OUTPUT = (
    _common("output", in_config=False, in_facts=False),
    _row(
        "--floor", "Measure what a linear classifier on trained features reaches, beside the "
        "result. Without it where the images are a folder of at most 50000 to train on.",
        action=argparse.BooleanOptionalAction, modes=("train",), **_OUTSIDE,
    ),
    _row(
        "--int8", "Whether the model folder gets an int8 file: auto keeps it where it is faster on "
        "this machine and accurate enough, yes where it is accurate enough.",
        choices=("no", "auto", "yes"), default="auto", needs=("export", "jit"), **_OUTSIDE,
    ),
    _row(
        "--max_accuracy_loss", "How much accuracy int8 may cost, as a fraction.",
        type=FRACTION, default=0.01, metavar="F", needs=("export", "jit"), **_OUTSIDE,
    ),
    _row(
        "--logdir", "TensorBoard's folder; without it logs/ in the run's.",
        type=Path, metavar="DIR", modes=("train",), **_OUTSIDE,
    ),
    _row(
        "--histograms", "Show TensorBoard the batch-norm scales of each epoch.",
        action=argparse.BooleanOptionalAction, default=True, modes=("train",), **_OUTSIDE,
    ),
)  # fmt: skip

GROUPS = {
    "data": DATA,
    "network": NETWORK,
    "modes, which may be combined": DOING,
    "training": TRAINING,
    "loss": LOSS,
    "augmentation": AUGMENTATION,
    "knowledge and curriculum": TEACHING,
    "pictures": PICTURES,
    "processes": PROCESSES,
    "output": OUTPUT,
}
OPTIONS: dict[str, Option] = {row.dest: row for rows in GROUPS.values() for row in rows}
# What a training by steps looks at, and --recipe probe does not.
STEPS = {row.dest for rows in (TRAINING, LOSS, AUGMENTATION) for row in rows}
STEPS = STEPS - {"recipe", "go_on", "fresh"} | {"find_lr", "distill", "curriculum_learning"}


def build_parser(prog: str = "main.py") -> CommandParser:
    """The command line, made from the table."""
    parser = CommandParser(
        prog=prog,
        description="An image-classification zoo: train, evaluate, distil, look, convert. "
        "Without a mode it prints the network's summary.",
    )
    for title, rows in GROUPS.items():
        group = parser.add_argument_group(title)
        for row in rows:
            group.add_argument(*row.flags, dest=row.dest, **row.words)
    return parser

"""The options, every one of them: read, checked, and refused where they would do nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_core.runs import UsageError
from torch_cls_zoo.dataloader.enhancement.policies import POLICIES
from torch_cls_zoo.dataloader.folders import PARTS

DEFAULT_ARCH = "efficientnet_b0"
RESUME_RUN = "run"  # what `--resume` without a value stands for
VISUAL_METHODS = ("cam", "grad-cam", "grad-cam++", "grad-camm++", "all")
# What only training looks at; given without --train they would be ignored, so they are refused.
TRAIN_ONLY = (
    "epochs", "opt", "lr", "lr_ratios", "lr_steps", "momentum", "wd", "warmup", "print_freq",
    "pretrained", "sync_bn", "mixup", "mixup_ratio", "mixup_alpha", "mix_targets", "cutmix",
    "cutmix_alpha", "aug", "aug_policy", "multi_scale", "sparsity", "slim", "distill",
    "distill_allow_missing", "curriculum_learning", "bias_prior", "amp", "save_every", "fresh",
    "histograms",
)  # fmt: skip
# A flag that needs another one, or else would do nothing.
NEEDS = {
    "mixup_alpha": "mixup",
    "mix_targets": "mixup",
    "cutmix_alpha": "cutmix",
    "slim": "sparsity",
    "distill_allow_missing": "distill",
    "curriculum_thresholds": "make_curriculum",
    "curriculum_weights": "make_curriculum",
    "knowledge_name": "knowledge",
    "visual_method": "visual_data",
    "visual_layer": "visual_data",
    "visual_number": "visual_data",
    "hard_ratio": "ohm_loss",
}
ACTIONS = ("evaluate", "knowledge", "make_curriculum", "visual_data", "jit")


def build_parser(prog: str = "main.py") -> argparse.ArgumentParser:
    """All options with their defaults."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="An image-classification zoo: train, evaluate, distil, look, convert. "
        "Without a mode it prints the network's summary.",
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", default="data", metavar="DIR", help="folder with train/, val/, test/ and one "
        "folder a class in each, or one with class folders; 'builtin' draws scenes")  # fmt: skip
    add("--image_size", type=int, nargs=2, default=None, metavar=("H", "W"),
        help="input of the network, pixels, any two numbers (224 224)")  # fmt: skip
    add("--num_classes", type=int, help="by default as many as there are class folders")
    add(
        "-j", "--workers", type=int, default=None, help="threads that decode (the cores, at most 8)"
    )
    add("-b", "--batch_size", "--batch-size", type=int, default=None,
        help="images a batch of each process (256, at most a quarter of the images)")  # fmt: skip
    add("--quarantine", type=Path, help="list of files to leave out (check_images.py writes one)")
    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", help=f"any name of models/ ({DEFAULT_ARCH}, or the checkpoint's own)")
    add("--pretrained", nargs="?", const="default", metavar="FILE",
        help="start from the library's weights, or from a file")  # fmt: skip
    add("--advprop", action="store_true", help="scale the input to [-1, 1]")
    add("--resume", nargs="?", const=RESUME_RUN, metavar="FILE",
        help="a file of weights to start from or to use; without a value, or with a run's folder, "
        "go on with that run exactly where it stopped")  # fmt: skip
    add("--summary", action="store_true", help="print the layers with parameters and MACs")
    add = parser.add_argument_group("modes, which may be combined").add_argument
    add("--train", action="store_true", help="train, then test the best weights")
    add("-e", "--evaluate", "--evaluation", dest="evaluate", action="store_true",
        help="measure on the test part")  # fmt: skip
    add("--find_lr", type=int, nargs="?", const=100, metavar="STEPS",
        help="LR-range test of the training that the other options describe")  # fmt: skip
    add("--jit", action="store_true", help="write TorchScript, ONNX and torch.export files")
    add("--knowledge", choices=tuple(PARTS), help="write the probabilities of that part")
    add("--visual_data", choices=tuple(PARTS), help="draw class activation maps of that part")
    add("--make_curriculum", choices=tuple(PARTS), help="write the weights of that part's images")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=85)
    add("--opt", default="adam", help="optimizer, any of optim/ (adam)")
    add("--lr", type=float, default=1e-4)
    add("--lr_ratios", type=float, nargs="+", help="factors of --lr, each up to its step")
    add(
        "--lr_steps",
        type=int,
        nargs="+",
        help="epochs, as many and growing, at which the factors end",
    )
    add("--momentum", type=float, default=0.9, help="of sgd")
    add("--wd", "--weight_decay", "--weight-decay", dest="wd", type=float, default=5e-4)
    add("--warmup", type=int, default=5, help="epochs at a tenth of --lr")
    add("-p", "--print-freq", "--print_freq", dest="print_freq", type=int, default=50,
        help="batches between two lines")  # fmt: skip
    add("--amp", default="fp32", choices=("fp32", "bf16", "fp16"), help="precision of training")
    add("--sparsity", action="store_true", help="network slimming: push batch norm scales to 0")
    add("--slim", type=float, default=5e-4, help="how hard")
    add("--bias_prior", nargs="+", metavar="P",
        help="first probability of each class, or one for all; 'data': their shares")  # fmt: skip
    add("--seed", type=int, default=1234)
    add("--save_every", type=int, default=0, metavar="N",
        help="save the run's state every N batches, too (each epoch)")  # fmt: skip
    add("--fresh", action="store_true", help="delete an earlier run in --output")
    add = parser.add_argument_group("loss").add_argument
    add("--criterion", default=None, choices=("softmax", "bce"), help="(softmax)")
    add("--weighted_loss", action="store_true", help="weight by --class_matrices, weights")
    add("--threshold_loss", action="store_true", help="leave out what is learned already")
    add("--ghm_loss", action="store_true", help="GHM-C: even out the gradients")
    add("--ohm_loss", action="store_true", help="keep the hardest")
    add("--hard_ratio", type=float, default=0.7, help="share that --ohm_loss keeps")
    add("--class_matrices", type=Path, metavar="YAML", help="matrices of the two first losses")
    add = parser.add_argument_group("augmentation").add_argument
    add("--aug", action="store_true", help="augment by MyAugment")
    add("--aug_policy", choices=POLICIES, help="augment by this policy")
    add("--mixup", action="store_true")
    add("--mixup_ratio", type=float, default=0.5, help="share of the batches that are mixed")
    add("--mixup_alpha", type=float, default=1.1)
    add("--mix_targets", action="store_true", help="mixup mixes the targets, not the losses")
    add("--cutmix", action="store_true")
    add("--cutmix_alpha", type=float, default=1.0)
    add("--multi_scale", action="store_true", help="each batch of a size up to 15 %% off")
    add = parser.add_argument_group("knowledge and curriculum").add_argument
    add("--knowledge_dir", type=Path, help="where these files lie (the --data folder)")
    add("--knowledge_name", default="distill.txt", help="the teacher's file, distill*.txt")
    add("--distill", action="store_true", help="learn from the mean of all distill*.txt")
    add("--distill_allow_missing", type=int, default=0, metavar="N",
        help="images that may have no teacher; they keep their label")  # fmt: skip
    add("--curriculum_thresholds", type=float, nargs="+", default=[0.7, 0.5, 0.3, 0.0])
    add("--curriculum_weights", type=float, nargs="+", default=[1.0, 0.7, 0.4, 0.1])
    add("--curriculum_learning", action="store_true", help="weight images by curriculum.txt")
    add = parser.add_argument_group("pictures").add_argument
    add("--visual_method", default="cam", choices=VISUAL_METHODS)
    add("--visual_layer", help="the layer to look at (the last before pooling)")
    add("--visual_number", type=int, default=16, help="images to draw, 0 for all")
    add = parser.add_argument_group("several processes").add_argument
    add("--init_method", default="tcp://127.0.0.1:10006", help="where the processes meet")
    add("-n", "--nodes", type=int, default=1, help="machines")
    add("-g", "--gpus", type=int, default=None,
        help="processes here, a GPU each (all GPUs; with --no-cuda: on the CPU)")  # fmt: skip
    add("--rank", type=int, default=-1, help="number of this machine, from 0")
    add("--cuda", action=argparse.BooleanOptionalAction, default=None,
        help="use GPUs (when there are any)")  # fmt: skip
    add("--sync_bn", action="store_true", help="batch norm over all processes; GPUs only")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, help="the run's folder (runs/torch_cls_zoo/<arch>)")
    add("--logdir", type=Path, help="TensorBoard's folder (logs/ in the run's)")
    add("--histograms", action=argparse.BooleanOptionalAction, default=True,
        help="log histograms of the batch norm scales")  # fmt: skip
    add("--threads", type=int, default=0, help="threads that compute, 0: torch decides")
    return parser


def parse(argv: Sequence[str] | None = None, *, prog: str = "main.py") -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UsageError: words that contradict each other or would be ignored.
    """
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if args.visual_method == "grad-camm++":  # as the first README spelled it
        args.visual_method = "grad-cam++"
    args.modes = [name for name in ACTIONS if getattr(args, name)]
    args.given = _given(parser, argv)
    _check_numbers(args)
    _check_modes(args)
    args.arch_given = args.arch is not None
    args.exact = False
    if args.resume is not None:
        _resolve_resume(args)
    if args.output is None:
        name = args.arch or DEFAULT_ARCH
        if not args.train and args.resume is not None:
            name = Path(args.resume).stem + "-use"
        args.output = Path("runs") / "torch_cls_zoo" / name.replace("/", "_")
    if args.bias_prior is not None and args.bias_prior != ["data"]:
        try:
            args.bias_prior = [float(word) for word in args.bias_prior]
        except ValueError:
            raise UsageError(
                f"--bias_prior is {' '.join(args.bias_prior)}, expected probabilities or 'data'"
            ) from None
    if args.aug_policy is None and args.aug:
        args.aug_policy = "my"
    if args.knowledge_dir is None and args.data != "builtin":
        args.knowledge_dir = Path(args.data)
    return args


def _given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """The options that stood on the command line, by destination."""
    silent = argparse.ArgumentParser(prog=parser.prog, add_help=False)
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        words: dict[str, Any] = {"dest": action.dest, "default": argparse.SUPPRESS}
        if isinstance(action, argparse.BooleanOptionalAction):
            silent.add_argument(*action.option_strings[:1], action=type(action), **words)
        elif action.nargs == 0:
            silent.add_argument(*action.option_strings, action="store_true", **words)
        else:
            silent.add_argument(*action.option_strings, nargs=action.nargs, **words)
    return set(vars(silent.parse_args(argv)))


def _check_numbers(args: argparse.Namespace) -> None:
    least = {
        "num_classes": 2, "workers": 0, "batch_size": 1, "epochs": 1, "warmup": 0,
        "print_freq": 1, "save_every": 0, "visual_number": 0, "nodes": 1, "gpus": 0, "threads": 0,
        "distill_allow_missing": 0, "rank": -1, "seed": 0, "find_lr": 5,
    }  # fmt: skip
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UsageError(f"--{name} is {value}, expected at least {low}")
    for name in ("lr", "mixup_alpha", "cutmix_alpha", "slim"):
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name} is {getattr(args, name)}, expected more than 0")
    for name in ("momentum", "wd"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} is {getattr(args, name)}, expected at least 0")
    if not 0 <= args.mixup_ratio <= 1:
        raise UsageError(f"--mixup_ratio is {args.mixup_ratio}, expected 0 to 1")
    if not 0 < args.hard_ratio <= 1:
        raise UsageError(f"--hard_ratio is {args.hard_ratio}, expected above 0, at most 1")
    if args.image_size is not None and min(args.image_size) < 1:
        raise UsageError(f"--image_size is {args.image_size}, expected two numbers of at least 1")
    if args.warmup >= args.epochs and args.train and args.lr_ratios is None:
        raise UsageError(f"--warmup is {args.warmup}, expected less than the {args.epochs} epochs")
    if (args.lr_ratios is None) != (args.lr_steps is None):
        raise UsageError("--lr_ratios and --lr_steps go together, got one of them")


def _check_modes(args: argparse.Namespace) -> None:
    """Refuse what would do nothing."""
    if not args.train and not args.find_lr:
        for name in TRAIN_ONLY:
            if name in args.given:
                raise UsageError(f"--{name} does nothing without --train")
    if args.find_lr is not None and (args.train or args.modes or args.resume == RESUME_RUN):
        raise UsageError("--find_lr stands alone: run it apart from the other modes")
    for name, other in NEEDS.items():
        if name in args.given and not getattr(args, other):
            raise UsageError(f"--{name} does nothing without --{other}")
    if "mixup_ratio" in args.given and not (args.mixup or args.cutmix):
        raise UsageError("--mixup_ratio does nothing without --mixup or --cutmix")
    if args.class_matrices is not None and not (args.weighted_loss or args.threshold_loss):
        raise UsageError("--class_matrices does nothing without --weighted_loss, --threshold_loss")
    if args.aug and args.aug_policy not in (None, "my"):
        raise UsageError(f"--aug means --aug_policy my, got --aug_policy {args.aug_policy} too")
    if not args.train and args.modes and args.resume is None:
        flag = args.modes[0]
        raise UsageError(f"--{flag} needs a trained model: name its weights by --resume FILE")
    if not args.train and not args.modes and args.resume == RESUME_RUN:
        raise UsageError("--resume without a file goes on with a training; add --train")
    if args.distill and args.knowledge == "train":
        raise UsageError("--distill reads the files that --knowledge train writes: run them apart")
    if args.data == "builtin" and args.knowledge_dir is None:
        for name in ("distill", "curriculum_learning"):
            if getattr(args, name):
                raise UsageError(f"--{name} with --data builtin needs --knowledge_dir DIR")
    if args.nodes > 1 and not 0 <= args.rank < args.nodes:
        raise UsageError(f"--rank is {args.rank}, expected 0 to {args.nodes - 1} of --nodes")
    if args.nodes == 1 and args.rank > 0:
        raise UsageError(f"--rank is {args.rank}, expected 0 with one machine (--nodes)")


def _resolve_resume(args: argparse.Namespace) -> None:
    """A run to go on with, or a file of weights."""
    if args.resume == RESUME_RUN and not Path(RESUME_RUN).is_file():
        args.exact = True
        args.resume = None
    else:
        path = Path(args.resume)
        folder = path if path.is_dir() else None
        if path.name == "train.pth" and path.parent.name == "state":
            folder = path.parent.parent
        if folder is not None:
            if args.train:
                if args.output is not None and args.output.resolve() != folder.resolve():
                    raise UsageError(
                        f"--resume {folder} goes on in that folder, --output says {args.output}"
                    )
                args.output, args.exact, args.resume = folder, True, None
            else:
                raise UsageError(f"--resume {path}: expected a file of weights without --train")
        elif not path.is_file():
            raise FileNotFoundError(f"--resume {path}: no such file of weights")
    if args.resume is not None and args.pretrained is not None:
        raise UsageError("--resume FILE and --pretrained both name weights: expected one of them")
    if args.exact and args.fresh:
        raise UsageError("--resume goes on with a run, --fresh deletes it: expected one of them")
    if not args.train and args.exact:
        raise UsageError("--resume without a file goes on with a training; add --train")

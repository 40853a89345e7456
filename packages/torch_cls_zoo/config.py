"""From the command line to settings: read by the table of options.py, checked, then frozen."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from shared_core.runs.command import UsageError
from shared_core.runs.opening import Start
from shared_core.runs.options import options_given, start_of, words_of
from torch_cls_zoo.options import (
    ACTIONS,
    DEFAULT_ARCH,
    FEWEST,
    FRESH_HEAD_LR,
    LEARNING,
    MODES,
    MOST,
    NONE,
    OPTIONS,
    PICTURES_SHOWN,
    RECIPES,
    RESUME_RUN,
    STEPS,
    SUMMARY,
    build_parser,
)

T = TypeVar("T")


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they are cut into batches; None is decided by what is found."""

    data: str
    split: Path | None
    image_size: tuple[int, int] | None  # height, width, pixels
    num_classes: int | None
    workers: int | None
    batch_size: int | None  # of each process
    quarantine: Path | None
    seed: int


@dataclass(frozen=True)
class NetworkSettings:
    """Which network, and its first weights."""

    arch: str | None
    init: str  # trained, none, a name of the core's catalogue, or a file
    drop_path: float
    advprop: bool
    resume: str | None  # a file of weights
    summary: bool


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how fast, from what."""

    recipe: str
    epochs: int | None  # None until the images are counted
    opt: str
    lr: float
    head_lr: float | None  # None: that of the body
    layer_decay: float
    schedule: str
    lr_ratios: list[float] | None
    lr_steps: list[int] | None
    momentum: float
    wd: float
    warmup: int | None  # epochs; None: a tenth of them
    clip_grad: float  # 0: none
    probe: bool
    freeze_bn: bool
    ema: float  # share that a step keeps of the average; 0: none
    accumulate: int  # batches of a step
    patience: int  # epochs; 0: for ever
    unfreeze: int  # epochs until all of it learns; 0: from the start
    compile: bool
    print_freq: int
    amp: str
    sparsity: bool
    slim: float
    bias_prior: list[float] | list[str] | None  # probabilities, or ["data"]
    save_every: int
    sync_bn: bool
    find_lr: int | None


@dataclass(frozen=True)
class LossSettings:
    """The criterion."""

    criterion: str | None
    label_smoothing: float
    weighted_loss: bool
    threshold_loss: bool
    ghm_loss: bool
    ghm_counts: str
    ohm_loss: bool
    hard_ratio: float
    class_matrices: Path | None


@dataclass(frozen=True)
class AugmentSettings:
    """What happens to training images, one by one and in batches."""

    aug_policy: str | None
    crop: float  # least share of the picture; 1: all of it
    flip: float  # probability
    quarter_turns: bool
    erasing: float  # probability
    balanced: bool
    mixup: bool
    mixup_ratio: float
    mixup_alpha: float
    mix_targets: bool
    cutmix: bool
    cutmix_alpha: float
    multi_scale: bool


@dataclass(frozen=True)
class TeachingSettings:
    """Files that say something of each image, written and learned from."""

    knowledge: str | None
    knowledge_dir: Path | None  # None: that of the images
    knowledge_name: str
    distill: bool
    distill_allow_missing: int
    make_curriculum: str | None
    curriculum_thresholds: list[float]
    curriculum_weights: list[float]
    curriculum_learning: bool


@dataclass(frozen=True)
class PictureSettings:
    """Class activation maps."""

    visual_data: str | None
    visual_method: str
    visual_layer: str | None
    visual_number: int


@dataclass(frozen=True)
class ProcessSettings:
    """How many processes, and where they compute."""

    device: str
    nodes: int
    gpus: int | None
    rank: int
    init_method: str
    sync_bn: bool
    threads: int  # 0: torch decides


@dataclass(frozen=True)
class RunSettings:
    """The run's folder and what is done in it."""

    modes: tuple[str, ...]
    start: Start
    command: str
    output: Path
    logdir: Path
    histograms: bool
    floor: bool | None
    int8: str
    max_accuracy_loss: float

    @property
    def trains(self) -> bool:
        """Whether a training is asked for."""
        return "train" in self.modes


@dataclass(frozen=True)
class Config:
    """Everything that was asked for, by concern.

    Attributes:
        values: all options by name as the command line has them, paths as paths.
        given: those that stood on the command line.
    """

    data: DataSettings
    network: NetworkSettings
    training: TrainingSettings
    loss: LossSettings
    augment: AugmentSettings
    teaching: TeachingSettings
    pictures: PictureSettings
    processes: ProcessSettings
    run: RunSettings
    values: Mapping[str, Any]
    given: frozenset[str]

    def stored(self) -> dict[str, Any]:
        """What ``config.json`` gets: None where a run that goes on keeps its first value."""
        return {
            name: self.values[name] if row.may_differ or name in self.given else None
            for name, row in OPTIONS.items()
            if row.in_config
        }

    @property
    def may_do_without(self) -> bool:
        """Whether a training may start from nothing because the command names no weights."""
        learns = set(self.run.modes) & set(LEARNING)
        return bool(learns) and "init" not in self.given and self.network.resume is None

    def from_nothing(self) -> Config:
        """The same command where no trained weights can be had."""
        values = {**self.values, "init": NONE}
        check(values, self.given)
        return configured(values, self.given, start=self.run.start, command=self.run.command)

    def for_images(self, number: int) -> Config:
        """The same with the epochs that suit a number of training images, where none are said.

        Raises:
            UsageError: a warm-up or a patience as long as these.
        """
        if self.training.epochs is not None:
            return self
        epochs = min(MOST, max(FEWEST, round(PICTURES_SHOWN / max(1, number))))
        _check_lengths({**resolved(self.values), "epochs": epochs})
        return replace(self, training=replace(self.training, epochs=epochs))

    def continued(self, stored: Mapping[str, Any]) -> Config:
        """The same command with what it does not say taken from a run's ``config.json``.

        Raises:
            UsageError: words that would do nothing in that run.
        """
        values = dict(self.values)
        for name, row in OPTIONS.items():
            if row.in_config and name in stored and not row.may_differ:
                known = stored[name]
                values[name] = Path(known) if row.is_path and known is not None else known
        check(values, self.given)
        return configured(values, self.given, start=self.run.start, command=self.run.command)


def parse(argv: Sequence[str] | None = None, *, prog: str = "main.py") -> Config:
    """Read and check the command line.

    Raises:
        UsageError: words that contradict each other or would be ignored.
        FileNotFoundError: a file of weights that is not there.
    """
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    given = options_given(parser, argv)
    start = start_of(argparse.Namespace(go_on=args.go_on, fresh=args.fresh))
    values = {name: getattr(args, name) for name in OPTIONS}
    if args.resume is not None and _names_a_run(args.resume):
        if not args.train:
            raise UsageError("--resume without a file goes on with a training; add --train")
        if start != "new":
            raise UsageError("--resume goes on with a run: expected no --continue or --fresh")
        start = "resume"
        values["output"] = _folder_of(args.resume, args.output)
        values["resume"] = None  # the weights that the run began with, if any, are in its config
        given -= {"resume"}
    elif args.resume is not None and not Path(args.resume).is_file():
        raise FileNotFoundError(f"--resume {args.resume}: no such file of weights")
    if start in ("new", "fresh"):  # else what it does not say is not known yet
        check(values, frozenset(given))
    command = shlex.join([f"packages/torch_cls_zoo/{prog}", *map(str, words_of(argv))])
    return configured(values, frozenset(given), start=start, command=command)


def _names_a_run(resume: str) -> bool:
    path = Path(resume)
    if resume == RESUME_RUN and not path.is_file():
        return True
    return path.is_dir() or (path.name == "train.pth" and path.parent.name == "state")


def _folder_of(resume: str, output: Path | None) -> Path | None:
    """The folder of the run that ``--resume`` names; that of ``--output`` for the bare word."""
    path = Path(resume)
    if not path.exists():
        return output
    folder = path if path.is_dir() else path.parent.parent
    if output is not None and output.resolve() != folder.resolve():
        raise UsageError(f"--resume {folder} goes on in that folder, --output says {output}")
    return folder


def modes_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What is to be done, in order; empty: the summary is printed."""
    return tuple(name for name in MODES if values[name])


def check(values: Mapping[str, Any], given: Iterable[str]) -> None:
    """Refuse what would do nothing, and what contradicts itself.

    Raises:
        UsageError: the first such word.
    """
    modes, values = modes_of(values), resolved(values)
    _check_useless(values, given, modes)
    _check_modes(values, given, modes)
    _check_pairs(values)
    _check_weights(values, given)
    nodes, rank = values["nodes"], values["rank"]
    if nodes > 1 and not 0 <= rank < nodes:
        raise UsageError(f"--rank is {rank}, expected 0 to {nodes - 1} of --nodes")
    if nodes == 1 and rank > 0:
        raise UsageError(f"--rank is {rank}, expected 0 with one machine (--nodes)")


def _flag(name: str) -> str:
    return next(flag for flag in OPTIONS[name].flags if flag.startswith("--"))


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with what the command does not say of a training taken from its recipe."""
    trained = values["init"] != NONE and values["resume"] is None
    name = values["recipe"] or ("finetune" if trained else "readme")
    known = dict(RECIPES[name])
    if values["lr_ratios"] is not None:
        known["schedule"] = "steps"
    if values["bias_prior"] is not None:
        known["probe"] = False
    if not (values["train"] or values["find_lr"]):
        known["batch_size"] = None
    said = {name: values[name] for name in known if values[name] is not None}
    if name == "finetune" and not said.get("probe", known["probe"]):
        known["head_lr"] = FRESH_HEAD_LR
    return {**values, "recipe": name, **known, **said}


def _check_useless(values: Mapping[str, Any], given: Iterable[str], modes: tuple[str, ...]) -> None:
    for name, row in OPTIONS.items():
        if name not in given:
            continue
        if not set(modes or (SUMMARY,)) & set(row.modes):
            wanted = " or ".join(_flag(mode) for mode in row.modes if mode != SUMMARY)
            raise UsageError(f"{_flag(name)} does nothing without {wanted}")
        if row.needs and not any(values[other] for other in row.needs):
            wanted = " or ".join(_flag(other) for other in row.needs)
            raise UsageError(f"{_flag(name)} does nothing without {wanted}")
    if "warmup" in given and values["lr_ratios"] is not None:
        raise UsageError("--warmup does nothing with --lr_ratios, which say every rate themselves")
    if values["lr_ratios"] is not None and values["schedule"] != "steps":
        raise UsageError("--lr_ratios does nothing with --schedule cosine: expected one of them")
    if values["probe"] and values["bias_prior"] is not None:
        raise UsageError("--bias_prior does nothing with --probe, which sets the head's biases")
    if values["ghm_counts"] != "loss" and values["criterion"] == "bce":
        raise UsageError("--ghm_counts does nothing with --criterion bce: all its terms count")


def _check_modes(values: Mapping[str, Any], given: Iterable[str], modes: tuple[str, ...]) -> None:
    if values["find_lr"] and len(modes) > 1:
        raise UsageError("--find_lr stands alone: run it apart from the other modes")
    acting = [name for name in modes if name in ACTIONS]
    if acting and "train" not in modes and values["resume"] is None:
        raise UsageError(
            f"{_flag(acting[0])} needs a trained model: name its weights by --resume FILE"
        )
    if values["resume"] is not None and "init" in given and values["init"] != NONE:
        raise UsageError("--resume FILE and --init both name weights: expected one of them")
    if values["distill"] and values["knowledge"] == "train":
        raise UsageError("--distill reads the files that --knowledge train writes: run them apart")
    if values["data"] == "builtin" and values["knowledge_dir"] is None:
        for name in ("distill", "curriculum_learning"):
            if values[name]:
                raise UsageError(f"--{name} with --data builtin needs --knowledge_dir DIR")


def _check_weights(values: Mapping[str, Any], given: Iterable[str]) -> None:
    """Refuse what stands on trained weights where there are none, and steps of a probe."""
    trained = values["init"] != NONE or values["resume"] is not None
    needing = {"recipe": values["recipe"] == "probe", "unfreeze": values["unfreeze"] > 0}
    for name, needs in needing.items():
        if needs and not trained:
            raise UsageError(f"{_flag(name)} {values[name]} needs trained weights: expected --init")
    if values["recipe"] == "probe":
        for name in sorted(given):
            if name in STEPS:
                raise UsageError(f"{_flag(name)} does nothing with --recipe probe: no step is made")


def _check_pairs(values: Mapping[str, Any]) -> None:
    if values["aug"] and values["aug_policy"] not in (None, "my"):
        raise UsageError(f"--aug means --aug_policy my, got --aug_policy {values['aug_policy']}")
    if (values["lr_ratios"] is None) != (values["lr_steps"] is None):
        raise UsageError("--lr_ratios and --lr_steps go together, got one of them")
    if values["train"] and values["epochs"]:
        _check_lengths(values)
    if values["save_every"] % values["accumulate"]:
        raise UsageError(
            f"--save_every is {values['save_every']}, expected a multiple of --accumulate "
            f"{values['accumulate']}: gathered gradients are not saved"
        )
    if values["image_size"] is not None and len(values["image_size"]) > 2:
        raise UsageError("--image_size: expected the height and width, or one number for both")
    said = {True: "cuda", False: "cpu"}.get(values["cuda"])
    if said is not None and values["device"] not in ("auto", said):
        raise UsageError(
            f"--device is {values['device']}, --{'cuda' if values['cuda'] else 'no-cuda'} means "
            f"{said}: expected one of them"
        )


def _check_lengths(values: Mapping[str, Any]) -> None:
    epochs, warmup, patience = (values[name] for name in ("epochs", "warmup", "patience"))
    if (warmup or 0) >= epochs and values["lr_ratios"] is None:
        raise UsageError(f"--warmup is {warmup}, expected less than the {epochs} epochs")
    if patience >= epochs:
        raise UsageError(f"--patience {patience} does nothing in {epochs} epochs")


def configured(
    values: Mapping[str, Any], given: frozenset[str], *, start: Start, command: str
) -> Config:
    """Settings from checked values; what follows from others is filled in."""
    modes = modes_of(values)
    full = {**resolved(values), "modes": modes, "start": start, "command": command}
    full["output"] = values["output"] or _default_output(values)
    full["logdir"] = values["logdir"] or full["output"] / "logs"
    full["aug_policy"] = values["aug_policy"] or ("my" if values["aug"] else None)
    full["bias_prior"] = _priors(values["bias_prior"])
    if values["knowledge_dir"] is None and values["data"] != "builtin":
        full["knowledge_dir"] = Path(values["data"])
    if values["image_size"] is not None:
        sides = [int(side) for side in values["image_size"]]
        full["image_size"] = (sides[0], sides[-1])
    if values["visual_method"] == "grad-camm++":  # as the first README spelled it
        full["visual_method"] = "grad-cam++"
    if values["cuda"] is not None:
        full["device"] = "cuda" if values["cuda"] else "cpu"
    return Config(
        *(
            _made(kind, full)
            for kind in (
                DataSettings, NetworkSettings, TrainingSettings, LossSettings, AugmentSettings,
                TeachingSettings, PictureSettings, ProcessSettings, RunSettings,
            )
        ),
        values=dict(values), given=given,
    )  # fmt: skip


def _made(kind: type[T], values: Mapping[str, Any]) -> T:
    return kind(**{one.name: values[one.name] for one in fields(kind)})  # type: ignore[arg-type]


def _default_output(values: Mapping[str, Any]) -> Path:
    name = values["arch"] or DEFAULT_ARCH
    if not values["train"] and values["resume"] is not None:
        name = Path(values["resume"]).stem + "-use"
    return Path("runs") / "torch_cls_zoo" / name.replace("/", "_")


def _priors(words: list[Any] | None) -> list[Any] | None:
    if words is None or words == ["data"]:
        return words
    try:
        return [float(word) for word in words]
    except ValueError:
        raise UsageError(
            f"--bias_prior is {' '.join(words)}, expected probabilities or 'data'"
        ) from None

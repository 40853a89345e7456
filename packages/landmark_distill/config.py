"""What a run is told: frozen dataclasses, one a concern, and the words that each may hold.

Nothing here loads more than the standard library, because ``--help`` lists these words.
``options.py`` fills the dataclasses from a command line; everything else takes the one it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from landmark_distill.schedules import Schedule

BACKBONES = ("Swin_base", "Swin_tiny", "Resnet20", "Resnet12", "Resnet50")
LIBRARIES = ("timm", "torchvision")  # whose networks are taken by LIBRARY/NAME
LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
# Of --init; auto is trained weights where they can be had, else none.
AUTO, TRAINED, NONE = "auto", "trained", "none"
FREEZE_BN = (AUTO, "yes", "no")
FEATURE_START = (AUTO, "random")
CHOICES = ("accuracy", "unseen", AUTO)  # what the best epoch is chosen by
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in [0, 1]
KD_LOSSES = ("KD", "global_KD", "cosine")
KD_VARIANTS = ("canonical", "original")
KNOWLEDGE = ("features", "soft", "topk")
OPTIMIZERS = ("SGD", "Adam", "AdamW")
DECAY = ("all", "matrices")
LAYOUTS = ("auto", "class", "two-level")
LIGHTING_ORDERS = ("right", "original")
HEAD_DTYPES = ("fp32", "bf16")
RESIZES = ("linear", "area", "cubic", "reduced")
FAR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # of the open-set test
VARIANTS = ("exact", "original")  # of its thresholds
INDEXES = ("exact", "faiss-flat", "faiss-ivf", "faiss-hnsw")


@dataclass(frozen=True)
class NetworkConfig:
    """A network and the settings of the head on it; a model file holds it under ``network``.

    Attributes:
        name: one of ``BACKBONES`` or ``LITE``, or ``LIBRARY/NAME``.
        image_size: side of the images, pixels.
        feature_dim: numbers of a feature.
        scale, margin: of the cosine head.
        options: of this backbone alone, such as ``window`` or ``drop_rate``.
    """

    name: str = "Resnet12"
    image_size: int = 384
    feature_dim: int = 1024
    scale: float = 32.0
    margin: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def of_file(cls, network: Mapping[str, Any]) -> NetworkConfig:
        """From :meth:`as_dict`, which JSON gives back with lists instead of tuples."""
        options = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in network["options"].items()
        }
        return cls(**{**network, "options": options})


@dataclass(frozen=True)
class ViewConfig:
    """What a network sees of an image.

    Attributes:
        size: side of the network's input, pixels.
        augment: random resized crops, flips and lighting noise in training.
        crop_scale: smallest and largest share of the image in a crop.
        hflip: share of the views that are mirrored.
        lighting: deviation of the lighting noise; 0 for none.
        lighting_order: one of ``LIGHTING_ORDERS``.
        bgr: blue first.
        resize: one of ``RESIZES``.
        views: how many views an image has; 0 is a new one each epoch.
        seed: decides the views, with the image's content and the epoch.
        mean, std: RGB in [0, 1], that the network is used to.
    """

    size: int
    augment: bool = False
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    lighting: float = 0.1
    lighting_order: str = "right"
    bgr: bool = False
    resize: str = "linear"
    views: int = 0
    seed: int = 0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True)
class HoldOut:
    """How classes and images are set apart.

    Attributes:
        test: share of the classes, in whole groups, for the test.
        validation: likewise, for tuning; may be 0.
        calibration: share of each training class's images that choose the best epoch.
        test_groups, validation_groups: names of groups, instead of a share.
        seed: of the hashes that decide.
    """

    test: float = 0.25
    validation: float = 0.0
    calibration: float = 0.1
    test_groups: tuple[str, ...] = ()
    validation_groups: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class ListFiles:
    """Image lists, each with the folder that its paths start from.

    Attributes:
        train: lists that are joined; empty for a test alone.
        val: chooses the best epoch.
        test: of the open-set test.
        remap: file that maps labels to final labels.
        coarse, fine: truths of the test's pairs; None for the labels of the list.
    """

    train: tuple[tuple[Path, Path], ...]
    val: tuple[Path, Path] | None
    test: tuple[Path, Path]
    remap: Path | None = None
    coarse: Path | None = None
    fine: Path | None = None


@dataclass(frozen=True)
class DrawnScenes:
    """Scenes that the program draws for a rehearsal: classes, images of each, pixels, seed."""

    num_classes: int
    images_per_class: int
    image_size: int
    seed: int


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and which of them are learned.

    Exactly one of ``lists``, ``path`` and ``drawn`` is set.

    Attributes:
        name: that folders and records bear.
        learns: whether training images are wanted; False for a test alone.
        path: folder of class folders.
        layout: one of ``LAYOUTS``.
        hold_out: how classes are set apart.
        split_file: a split that another run made, instead of ``hold_out``.
        test_part: ``test`` or ``validation``: which of the unseen classes are tested.
        num_classes: rows of a new head; None for as many as there are classes.
        threads: that read files.
    """

    name: str = "TLD"
    learns: bool = True
    lists: ListFiles | None = None
    path: Path | None = None
    drawn: DrawnScenes | None = None
    layout: str = "auto"
    hold_out: HoldOut = field(default_factory=HoldOut)
    split_file: Path | None = None
    test_part: str = "test"
    num_classes: int | None = None
    threads: int = 4


@dataclass(frozen=True)
class DistillConfig:
    """Which teacher is asked, and how the student learns from it.

    Attributes:
        backbone: the teacher's, named as a student's.
        weights: its file.
        loss, weight: one of ``KD_LOSSES``, and its share of the loss.
        variant, temperature: of ``KD``; one of ``KD_VARIANTS``.
        head_fixed: the student takes the teacher's head, frozen.
        mapped_head: the head stays in its file.
        head_dtype: one of ``HEAD_DTYPES``.
        store: folder of stored answers; None asks the teacher each time.
        store_kind: one of ``KNOWLEDGE``.
        top_k: logits kept by ``topk``.
        by_number: row i of the teacher's head is class i, whatever the names say.
        may_know_test: a teacher that has learned classes of the test is accepted.
    """

    backbone: str
    weights: Path
    loss: str = "KD"
    weight: float = 1.0
    variant: str = "canonical"
    temperature: float = 4.0
    head_fixed: bool = False
    mapped_head: bool = False
    head_dtype: str = "fp32"
    store: Path | None = None
    store_kind: str = "features"
    top_k: int = 16
    by_number: bool = False
    may_know_test: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """How the weights learn.

    Attributes:
        schedule: the learning rate of each step, and how many epochs there are.
        batch_size: images of a step, those of all processes together.
        optimizer, momentum, weight_decay, decay_on: see :mod:`landmark_distill.optimizers`.
        ce_weight: share of the labels' loss.
        clip: largest norm of the gradient; 0 for any.
        amp: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 where the hardware computes it.
        seed: decides first weights, order and dropout.
        init: what to start from: ``auto``, ``none``, ``trained``, a name of the catalogue, or a
            file.
        body_rate: share of the learning rate that a trained body has; its new layers have all.
        layer_decay: what a layer of a trained body has of the rate of the one above it.
        freeze_body: a trained body does not learn.
        freeze_bn: one of ``FREEZE_BN``: whether batch norms keep their statistics; ``auto`` where
            they are trained.
        feature_start: one of ``FEATURE_START``, of the new layer above a trained body; ``auto``:
            see :mod:`landmark_distill.feature_layer`.
        choose_by: one of ``CHOICES``: accuracy on held-out images of the learned classes, or
            retrieval and verification among the split's unseen validation classes; ``auto`` where
            there are such.
        checkpointing, channels_last: ways to compute.
        log_interval: steps between lines of progress.
        eval_interval: epochs between validations.
        save_every: steps between saved states; 0 saves after each epoch.
        save_all: model files hold head and teacher, too.
    """

    schedule: Schedule
    batch_size: int = 4
    optimizer: str = "SGD"
    momentum: float = 0.0
    weight_decay: float = 5e-4
    decay_on: str = "all"
    ce_weight: float = 1.0
    clip: float = 0.0
    amp: str = "fp32"
    seed: int = 0
    init: str = AUTO
    body_rate: float = 0.1
    layer_decay: float = 1.0
    freeze_body: bool = False
    freeze_bn: str = AUTO
    feature_start: str = AUTO
    choose_by: str = "accuracy"
    checkpointing: bool = False
    channels_last: bool = False
    log_interval: int = 50
    eval_interval: int = 1
    save_every: int = 0
    save_all: bool = False


@dataclass(frozen=True)
class RunConfig:
    """One run of ``main.py``.

    Attributes:
        folder: the run's.
        start: how the folder is opened, see :func:`shared_core.runs.open_run`.
        test_only: no training; ``train.init`` is tested.
        fill_knowledge: store the teacher's answers, and do nothing else.
        device: as the option says it.
        multi_gpu: start a process for each GPU.
        stored: all options as ``config.json`` holds them; ``threads`` is None where not given.
    """

    folder: Path
    start: Literal["new", "resume", "continue", "fresh"]
    network: NetworkConfig
    views: ViewConfig
    data: DataConfig
    train: TrainConfig
    distill: DistillConfig | None = None
    test_only: bool = False
    fill_knowledge: bool = False
    device: str = "auto"
    multi_gpu: bool = False
    stored: Mapping[str, Any] = field(default_factory=dict)

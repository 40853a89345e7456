"""The rows of each experiment: which options a row adds, what it learns from, what was published.

The published numbers are accuracies on the author's own private images: they stand beside ours
for the reader, and cannot be compared with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_cls_zoo.options import NONE

NO_DATA = "the author's own private images: not comparable"


@dataclass(frozen=True)
class Row:
    """One line of a table, run once for each seed.

    Attributes:
        name: as the table shows it.
        words: options beside those of the recipe.
        published: accuracy in the first README, a fraction; None where it has none.
        learns_from: rows (or ``NAME:labels``, their true labels) whose files this row reads.
        writes: ``knowledge``, ``curriculum`` or nothing: what its best weights write afterwards.
        without: options of the recipe that this row takes out.
        shuffled: its curriculum weights are dealt out to other images, as a control.
        skip: why this row is not run at a scale, by scale.
    """

    name: str
    words: tuple[str, ...] = ()
    published: float | None = None
    learns_from: tuple[str, ...] = ()
    writes: str | None = None
    without: tuple[str, ...] = ()
    shuffled: bool = False
    skip: tuple[tuple[str, str], ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows whose files this one reads."""
        return tuple(dict.fromkeys(source.removesuffix(LABELS) for source in self.learns_from))

    def reason(self, scale: str, init: str) -> str | None:
        """Why it is not run; None when it is."""
        if "--init" in self.without and init == NONE:
            return "no row starts from pretrained weights here, so this is the baseline"
        return dict(self.skip).get(scale)


BCE = ("--criterion", "bce")
GHM = (*BCE, "--ghm_loss")
MATRICES = "MATRICES"  # stands for the file that the run writes
LARGER = "LARGER"  # stands for the recipe's larger network
LABELS = ":labels"  # after a row's name: its images' true labels

CRITERIA = (
    Row("softmax", ("--criterion", "softmax"), 0.892),
    Row("bce loss", BCE, 0.890),
    Row("threshold bce", (*BCE, "--threshold_loss"), 0.8895),
    Row("ghm bce", GHM, 0.893),
    Row("weighted bce", (*BCE, "--weighted_loss", "--class_matrices", MATRICES), 0.891),
    Row("ohm bce", (*BCE, "--ohm_loss"), 0.891),
)

AUGMENT = (
    Row("baseline (bce+aug)", BCE, 0.890),
    Row("-pretrained", (*BCE, "--init", NONE), 0.8597, without=("--init",)),
    Row("-aug", BCE, 0.8776, without=("--aug",)),
    Row("+multi-scale", (*BCE, "--multi_scale"), 0.8902),
    Row("+mixup", (*BCE, "--mixup"), 0.8863),
    Row("+cutmix", (*BCE, "--cutmix")),
    Row("AutoAugment for MyAugment", (*BCE, "--aug_policy", "imagenet"), without=("--aug",)),
    Row("teacher: bce+aug+ghm", GHM, writes="knowledge"),
    Row("+distill from b0+ghm", (*BCE, "--distill"), 0.8855,
        learns_from=("teacher: bce+aug+ghm",)),
)  # fmt: skip

DISTILL = (
    Row("alone", BCE),
    Row("teacher: same net, ghm", GHM, writes="knowledge"),
    Row("teacher: larger net", (*BCE, "--arch", LARGER), writes="knowledge"),
    Row("from the same net, ghm", (*BCE, "--distill"), 0.8855,
        learns_from=("teacher: same net, ghm",)),
    Row("from it, averaged with the labels", (*BCE, "--distill"),
        learns_from=("teacher: same net, ghm", "teacher: same net, ghm:labels")),
    Row("from the larger net", (*BCE, "--distill"), learns_from=("teacher: larger net",)),
    Row("from both, averaged", (*BCE, "--distill"),
        learns_from=("teacher: same net, ghm", "teacher: larger net")),
)  # fmt: skip

CURRICULUM = (
    Row("no curriculum", BCE, writes="curriculum"),
    Row("curriculum of that run", (*BCE, "--curriculum_learning"),
        learns_from=("no curriculum",)),
    Row("its weights dealt out at random", (*BCE, "--curriculum_learning"),
        learns_from=("no curriculum",), shuffled=True),
)  # fmt: skip

_LARGE = (
    ("short", "takes longer than a short run has"),
    ("rehearsal", "takes longer than a rehearsal has"),
)
_REHEARSED = ("resnet18", "shufflenet_v2_x1_0", "mobilenetv3_small")


def _model(arch: str, *, large: bool = False) -> Row:
    skip = _LARGE if large else ()
    if not large and arch not in _REHEARSED:
        skip = (_LARGE[1],)
    return Row(arch, ("--arch", arch), skip=skip)


MODELS = (
    _model("resnet18"),
    _model("resnet50", large=True),
    _model("shufflenet_v2_x1_0"),
    _model("shufflenet_v2_x2_0", large=True),
    _model("mobilenet_v2"),
    _model("mobilenetv3_small"),
    _model("mobilenetv3_large"),
    _model("efficientnet_b0"),
    _model("efficientnet_b4", large=True),
)

EXPERIMENTS: dict[str, tuple[Row, ...]] = {
    "models": MODELS,
    "criteria": CRITERIA,
    "augment": AUGMENT,
    "distill": DISTILL,
    "curriculum": CURRICULUM,
}
TITLES = {
    "models": "Networks compared",
    "criteria": "Losses compared",
    "augment": "Augmentation compared",
    "distill": "Distillation from knowledge files",
    "curriculum": "Curriculum learning",
}

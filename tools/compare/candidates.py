"""What may become the winner: for each kind of candidate who makes it, by which commands.

A maker is a row: the project, what it needs, the words of its commands, and where they leave the
model folder. :func:`propose` says which of them make sense for a set of images, at which sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compare.contract import CANDIDATES, SPLIT_FILE, DataCheck, Planned

REPO = Path(__file__).resolve().parents[2]
LITE0, TEACHER = "efficientnet_lite0", "efficientnet_lite2"
SIDES = (96, 224)  # pixels, of the larger of two input sizes
ENLARGED = 1.5  # networks that were trained at 224 pixels see more in small images made larger
BATCH, PICTURES = 64, 16_000  # images of a step, and of a training that is long enough
PROBE_IMAGES, PROBE_WORK = 20_000, 4_000_000  # images; images times classes
WORK = "work"  # a candidate's folder for its project


@dataclass(frozen=True)
class Place:
    """What a maker's commands are written from."""

    planned: Planned
    check: DataCheck
    folder: Path  # of the whole run
    threads: int

    @property
    def work(self) -> Path:
        """Where the project works."""
        return self.folder / CANDIDATES / self.planned.name / WORK

    @property
    def teacher(self) -> Path:
        """Where the teacher's project worked."""
        return self.folder / CANDIDATES / self.planned.teacher / WORK

    @property
    def answers(self) -> Path:
        """The store of what the teacher said of the training images."""
        stores = self.teacher / "answers" / "knowledge"
        return next(iter(sorted(stores.glob("train-*"))), stores)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the candidate."""
        return self.planned.settings

    def images(self, *, batch: str = "--batch-size") -> list[str]:
        """The words that all projects share."""
        return [
            "--data-path", self.check.root, "--split", str(self.folder / SPLIT_FILE),
            "--input-size", str(self.settings["input_size"]),
            batch, str(self.settings["batch_size"]),
            "--seed", str(self.planned.seed), "--threads", str(self.threads),
            "--output", str(self.work), "--continue",
        ]  # fmt: skip


@dataclass(frozen=True)
class Maker:
    """How one kind of candidate is made.

    Attributes:
        project: that makes it; ``compare`` itself for the probe.
        needs: packages without which it cannot.
        commands: script (below the repository) and words, in order; each may be called again.
        model: the model folder that they leave, below :attr:`Place.work`.
        refuses: its last command ends with 1 where int8 was refused; the float file is there.
    """

    project: str
    needs: tuple[str, ...]
    commands: Callable[[Place], list[list[str]]]
    model: str
    refuses: bool = False

    def lacking(self) -> str:
        """The first package that is not installed, or an empty text."""
        return next((name for name in self.needs if find_spec(name) is None), "")


@dataclass(frozen=True)
class Proposal:
    """A candidate before its epochs are known.

    Attributes:
        step: (network, side in pixels) whose training step says what an epoch costs.
        factor: cost of an image in training, of that step's.
        before: epochs of that step that come first (a teacher of its own).
        least, enough, most: epochs: fewer make no sense, enough are wanted, more gain nothing.
            All 0: nothing is trained.
        fixed: seconds besides: starting and exporting.
    """

    name: str
    maker: str
    title: str
    order: int
    step: tuple[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    before: float = 0.0
    least: int = 0
    enough: int = 0
    most: int = 0
    fixed: float = 25.0
    teacher: str = ""

    @property
    def trains(self) -> bool:
        """Whether epochs mean anything."""
        return self.most > 0


# -- the makers -----------------------------------------------------------------------------------


def _probe(place: Place) -> list[list[str]]:
    words = ["--run", str(place.folder), "--output", str(place.work / "model")]
    return [["tools/compare/probe.py", *words, "--threads", str(place.threads)]]


def _zoo(place: Place, *more: str, init: str = "trained") -> list[list[str]]:
    """Train by the zoo's recipe and leave a model folder."""
    words = [
        "packages/torch_cls_zoo/main.py", "--train", "--export", *place.images(),
        "--arch", place.settings["network"], "--init", init, "--epochs",
        str(place.settings["epochs"]), "--workers", str(max(1, place.threads)),
        "--no-floor", "--no-histograms", *more,
    ]  # fmt: skip
    fits = fits_probe(place.check.images("train"), len(place.check.classes))
    if not fits and init != "none":
        words.append("--no-probe")
    return [words]


def _teacher(place: Place) -> list[list[str]]:
    knowledge = ["--knowledge", "train", "--knowledge_dir", str(place.work / "answers")]
    return _zoo(place, *knowledge)


def _student(place: Place) -> list[list[str]]:
    return _zoo(place, "--distill", "--knowledge_dir", str(place.teacher / "answers"))


def _landmark(place: Place) -> list[list[str]]:
    """A body whose features lie near their class's mean, and the means as the head."""
    split = str(place.folder / SPLIT_FILE)
    train = [
        "packages/landmark_distill/main.py", *place.images(),
        "--epochs", str(place.settings["epochs"]), "--workers", str(max(1, place.threads)),
    ]  # fmt: skip
    export = [
        "packages/landmark_distill/export_model.py", str(place.work / "max_acc.pth"),
        str(place.work / "model"), "--format", "onnx", "--int8", "auto", "--class-means", split,
        "--data-path", place.check.root,
    ]  # fmt: skip
    return [train, export]


def _garbage(place: Place) -> list[list[str]]:
    """One student on Paddle, taught by the same stored answers; its first layers stay."""
    train = [
        "packages/visiondistill_gc/main.py", *place.images(), "--scale", "short",
        "--n-splits", "1", "--epochs", str(place.settings["epochs"]),
        "--workers", str(max(1, place.threads)), "--compare-seeds", "--no-visualdl", "--no-floor",
        "--knowledge", str(place.answers),
    ]  # fmt: skip
    export = [
        "packages/visiondistill_gc/export.py", str(place.work), str(place.work / "model"),
        "--format", "onnx", "--int8", "auto",
    ]  # fmt: skip
    return [train, export]


def _gfnet(place: Place) -> list[list[str]]:
    """A small GFNet with early exits, taught by the answers of a fine-tuned lite0."""
    train = [
        "packages/gfnet_dynn/main.py", *place.images(batch="--finetune-batch"), "--scale", "short",
        "--backbone-epochs", "2", "--student-epochs", str(place.settings["epochs"]),
        "--epochs", "6", "--max_warmup_epoch", "3", "--compare-labels", "false",
        "--vflip", "false", "--workers", str(max(1, place.threads)), "--use_mlflow", "false",
    ]  # fmt: skip
    best = sorted((place.work / "checkpoint" / "best").glob("*.pth"))
    export = [
        "packages/gfnet_dynn/export_model.py",
        str(best[0] if best else place.work / "checkpoint" / "best"), str(place.work / "model"),
        "--int8", "auto", "--data-path", place.check.root,
    ]  # fmt: skip
    return [train, export]


def _mpkd(place: Place) -> list[list[str]]:
    """A student taught without labels, then trained with 8 bits in weights and activations."""
    settings = {
        "model.student_model": "lite0", "model.teacher_model": "lite0", "teacher.epochs": 3,
        "distillation.views": 2, "quantization.method": "qat", "quantization.epochs": 1,
        "quantization.w_bits": 8, "quantization.a_bits": 8, "quantization.compare_uniform": False,
        "export.onnx": True,
    }  # fmt: skip
    words = [
        "packages/mpkd/main.py", *place.images(), "--epochs", str(place.settings["epochs"]),
        "--workers", str(max(1, place.threads)),
    ]  # fmt: skip
    for key, value in settings.items():
        words += ["--set", f"{key}={str(value).lower()}"]
    return [words]


_ZOO_NEEDS = ("torch", "torchvision")
MAKERS: dict[str, Maker] = {
    "probe": Maker("compare", ("torch",), _probe, "model"),
    "lite0": Maker("torch_cls_zoo", _ZOO_NEEDS, _zoo, "model"),
    "teacher": Maker("torch_cls_zoo", _ZOO_NEEDS, _teacher, "model"),
    "student": Maker("torch_cls_zoo", _ZOO_NEEDS, _student, "model"),
    "visiondistill_gc": Maker(
        "visiondistill_gc", ("paddle", "paddle2onnx"), _garbage, "model", refuses=True
    ),
    "mpkd": Maker("mpkd", _ZOO_NEEDS, _mpkd, "export"),
    "gfnet": Maker("gfnet_dynn", ("torch", "timm"), _gfnet, "model", refuses=True),
    "landmark": Maker("landmark_distill", ("torch",), _landmark, "model"),
}


# -- what is worth a try --------------------------------------------------------------------------


def sizes(pixels: int) -> tuple[int, int]:
    """Two input sizes for images of a short side: what shows most, and one that costs half."""
    full = min(max(32 * round(ENLARGED * pixels / 32), SIDES[0]), SIDES[1])
    return full, max(32 * round(0.72 * full / 32), 64)


def wanted_epochs(images: int) -> tuple[int, int, int]:
    """least, enough, most: small sets are seen more often."""
    enough = min(max(round(PICTURES / images), 5), 20)
    return min(3, enough // 2), enough, min(30, 2 * enough)


def fits_probe(images: int, classes: int) -> bool:
    """Whether a logistic regression on stored features takes little time and memory."""
    return images <= PROBE_IMAGES and images * classes <= PROBE_WORK


def batch_size(images: int) -> int:
    """Images of a step: 64, and at least four steps an epoch."""
    return max(2, min(BATCH, images // 4))


def propose(
    check: DataCheck, *, teacher: str | None = None, feature_size: int = 224
) -> list[Proposal]:
    """Every candidate that makes sense for these images, the cheapest useful ones first.

    Args:
        teacher: another network than lite2.
        feature_size: side of the views whose features are stored.
    """
    full, small = sizes(check.pixels)
    train = check.images("train")
    least, enough, most = wanted_epochs(train)
    batch = batch_size(train)

    def tuned(
        name: str, maker: str, title: str, order: int, network: str, size: int, **more: Any
    ) -> Proposal:
        settings = {"network": network, "input_size": size, "batch_size": batch}
        rest = {"least": least, "enough": enough, "most": most, **more}
        return Proposal(name, maker, title, order, (network, size), settings, **rest)

    found = [
        Proposal(
            "probe", "probe", f"trained lite0 with a linear head, {feature_size} px", 0,
            (LITE0, feature_size), {"network": LITE0, "input_size": feature_size},
        ),
        tuned(f"lite0-{full}", "lite0", f"lite0 fine-tuned, {full} px", 2, LITE0, full),
        tuned(f"lite0-{small}", "lite0", f"lite0 fine-tuned, {small} px", 1, LITE0, small),
        tuned(
            "teacher", "teacher", f"{teacher or 'lite2'} fine-tuned, {full} px, the teacher", 9,
            teacher or TEACHER, full, fixed=35.0,
        ),
        tuned(
            f"student-{small}", "student", f"lite0 taught by the teacher, {small} px", 3, LITE0,
            small, teacher="teacher",
        ),
        tuned(
            f"garbage-{small}", "visiondistill_gc", f"lite0 taught on Paddle, {small} px", 5, LITE0,
            small, factor=1.5, least=1, enough=3, most=6, fixed=90.0, teacher="teacher",
        ),
        tuned(
            f"landmark-{full}", "landmark", f"nearest class mean of lite0's features, {full} px", 4,
            LITE0, full, least=1, enough=2, most=3, fixed=40.0,
        ),
        tuned(
            f"mpkd-{small}", "mpkd", f"lite0 taught without labels, trained in 8 bits, {small} px",
            7, LITE0, small, before=7.0, least=2, enough=4, most=10, fixed=60.0,
        ),
        tuned(
            f"gfnet-{full}", "gfnet", f"GFNet with early exits, taught by lite0, {full} px", 6,
            LITE0, full, factor=0.27, before=2.8, least=16, enough=24, most=40, fixed=60.0,
        ),
    ]  # fmt: skip
    return [one for n, one in enumerate(found) if one.name not in {x.name for x in found[:n]}]


def asked_for(proposals: Sequence[Proposal], makers: Sequence[str]) -> dict[str, str]:
    """Name -> why a proposal is left out; a teacher stays where a student of it is asked for."""
    if not makers:
        return {}
    wanted = {one.name for one in proposals if one.maker in makers}
    wanted |= {one.teacher for one in proposals if one.name in wanted and one.teacher}
    return {one.name: "not asked for" for one in proposals if one.name not in wanted}

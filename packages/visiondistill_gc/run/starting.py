"""Where networks start: trained weights below, a probe of stored features as head; and the floor.

Features of a trained network are computed once for all images and kept in the run's folder. The
head of each fold is a linear classifier of them, fitted on the fold's training part alone. The same
classifiers, judged on the images that judge the students, are the floor "trained features, linear".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import nn

from shared_core.checkpoints import atomic_write
from shared_core.datasets import ImageSet
from shared_core.for_paddle.data import Normalizer
from shared_core.for_paddle.export import export_inference
from shared_core.for_paddle.features import feature_function, headless, start_head
from shared_core.for_paddle.inference import paddle_inference
from shared_core.for_paddle.pretrained import start_weights
from shared_core.metrics.intervals import wilson_interval
from shared_core.metrics.probe import LinearProbe, fit_probe
from shared_core.runs import progress
from shared_core.weights.catalogue import CATALOGUE, entry
from shared_core.weights.finding import NONE, TRAINED, installed_file
from visiondistill_gc.models.paddleclas_models import paddleclas_weights
from visiondistill_gc.models.student_model import build_student
from visiondistill_gc.models.teacher_model import build_teacher, normal_of
from visiondistill_gc.options import MOBILENET, PADDLECLAS
from visiondistill_gc.run.context import Run
from visiondistill_gc.utils.data_utils import eval_loader
from visiondistill_gc.utils.model_files import fill_body

STUDENT, TEACHER = "student", "teacher"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Features:
    """What the head of a trained network sees of the run's images, evaluation view.

    Attributes:
        network: whose.
        folds: float32 ``(N, D)``, in the order of ``data.images``.
        test: ``(M, D)`` of the held-out images; M is 0 without such a part.
    """

    network: str
    folds: NDArray[np.float32]
    test: NDArray[np.float32]


def init_of(run: Run, who: str) -> str:
    """``none``, ``trained``, a name of the catalogue, or a file."""
    given = run.settings.teacher.teacher_pretrained
    if who == TEACHER and given is not None:
        return str(given)
    init = str(run.settings.student.init)
    return init if who == STUDENT or init == NONE else TRAINED  # a FILE is the student's


def build(run: Run, who: str) -> nn.Layer:
    """The teacher or the student of the options, with random weights."""
    classes = len(run.data.classes)
    if who == TEACHER:
        how = run.settings.teacher
        return build_teacher(
            how.teacher,
            num_classes=classes,
            source=how.teacher_source,
            frozen=how.teacher_frozen,
            dropout=run.settings.student.dropout,
        )
    options = run.settings.student
    return build_student(
        num_classes=classes,
        name=options.student,
        scale=options.student_scale,
        head=options.head,
        frozen=options.frozen,
        freeze_bn=options.freeze_bn,
        dropout=options.dropout,
        hidden=options.hidden,
        source=options.student_source,
    )


def started(run: Run, who: str) -> tuple[nn.Layer, Facts]:
    """A network with the weights that it starts from, and plain facts of them; empty: none."""
    net, init = build(run, who), init_of(run, who)
    if init == NONE:
        return net, {}
    options = run.settings
    name = options.teacher.teacher if who == TEACHER else options.student.student
    source = options.teacher.teacher_source if who == TEACHER else options.student.student_source
    if source == PADDLECLAS and init == TRAINED:
        arrays, facts = paddleclas_weights(net.built_from["name"])
    else:
        arrays, facts = start_weights(name, init)
    new = fill_body(net, arrays, path=facts["name"])
    return net, {**facts, "head": "new" if new else "the file's"}


def new_net(run: Run, who: str, fold: int | None) -> nn.Layer:
    """Where a fold's teacher or student starts: with ``--probe`` its head knows the classes."""
    net, facts = started(run, who)
    if facts.get("head") == "new" and probes(run, who):
        start_head(net, fold_probe(run, features_of(run, net, facts), fold))
        net.keep_norms = True  # the head was fitted to what their statistics give
    return net


def probes(run: Run, who: str) -> bool:
    """Whether a probe can start the head: above trained weights, and without a hidden layer."""
    student = run.settings.student
    hidden = who == STUDENT and student.student == MOBILENET and student.head == "improved"
    return run.settings.training.probe and init_of(run, who) != NONE and not hidden


def fold_probe(run: Run, features: Features, fold: int | None) -> LinearProbe:
    """Fitted on a fold's training part; None: on the images of all folds."""
    data = run.data
    rows = data.train_rows(fold)
    labels = data.images.labels[rows]
    return fit_probe(features.folds[rows], labels, num_classes=len(data.classes))


def features_of(run: Run, net: nn.Layer, facts: Facts) -> Features:
    """Computed once in a run; kept under the network's name and the hash of its weights."""
    name, data = net.built_from.get("name", MOBILENET), run.data
    path = run.folder / "features" / f"{name}-{facts['sha256'][:12]}.npz"
    if not path.exists():
        parts = {"folds": _compute(run, net, data.images, name)}
        empty = np.zeros((0, parts["folds"].shape[1]), np.float32)
        parts["test"] = empty if data.test is None else _compute(run, net, data.test, name)
        path.parent.mkdir(exist_ok=True)

        def write(scratch: Path) -> None:
            with scratch.open("wb") as file:
                np.savez(file, **parts)

        atomic_write(path, write)
    with np.load(path, allow_pickle=False) as kept:
        return Features(name, kept["folds"], kept["test"])


def _compute(run: Run, net: nn.Layer, images: ImageSet, name: str) -> NDArray[np.float32]:
    classes, size = len(run.data.classes), run.settings.data.input_size
    mean, std = net.normal
    batches = eval_loader(images, size, workers=run.settings.data.workers)
    shown = progress(batches, total=len(batches), label=f"features of {name}")
    if str(paddle.device.get_device()).startswith("gpu"):
        look = feature_function(net, num_classes=classes, mean=mean, std=std)
        return np.concatenate([look(batch.images) for batch in shown])
    normalize = Normalizer(mean, std)
    with headless(net, classes) as body, TemporaryDirectory() as folder:
        export_inference(body, Path(folder) / "body", input_size=(3, size, size))
        fast = paddle_inference(Path(folder) / "body", threads=run.threads)
        found = [fast(normalize(batch.images).numpy()) for batch in shown]
    return np.concatenate(found).reshape(len(images), -1)


# -- the floor ------------------------------------------------------------------------------------


def _floor_net(run: Run) -> tuple[nn.Layer, Facts] | None:
    """The student's trained network; else an installed one; else none."""
    student = run.settings.student
    other = student.student != MOBILENET or student.student_source == PADDLECLAS
    if other and student.init != NONE:
        return started(run, STUDENT)
    if student.init == TRAINED and student.student_source == "paddle.vision":
        name = MOBILENET
    elif installed_file(CATALOGUE[0]):
        name = CATALOGUE[0].name
    else:
        return None
    net = build_teacher(name, num_classes=len(run.data.classes))
    arrays, facts = start_weights(name, TRAINED)
    fill_body(net, arrays, path=facts["name"])
    return net, facts


def trained_floor(run: Run) -> Facts | None:
    """What linear classifiers of trained features reach on the images that judge the students.

    Returns:
        ``network``, ``input_size``, ``start``, and for ``out_of_fold`` (each image by the
        classifier of the fold that lacks it) and ``test`` (one classifier of all folds' images):
        ``accuracy``, its 95 % interval ``low``, ``high`` (Wilson), ``images``. None without
        trained weights at hand.
    """
    found = _floor_net(run)
    if found is None:
        return None
    features, data = features_of(run, *found), run.data
    right = total = 0
    for fold in run.settings.run.folds:
        rows = data.validation_rows(fold)
        said = fold_probe(run, features, fold).logits(features.folds[rows]).argmax(axis=1)
        right, total = right + int((said == data.images.labels[rows]).sum()), total + len(rows)
    judged = {"out_of_fold": _share(right, total)}
    if data.test is not None:
        learned = None if run.settings.data.n_splits > 1 else 0
        said = fold_probe(run, features, learned).logits(features.test).argmax(axis=1)
        judged["test"] = _share(int((said == data.test.labels).sum()), len(data.test))
    size = run.settings.data.input_size
    return {"network": features.network, "input_size": size, "start": found[1], **judged}


def _share(right: int, total: int) -> Facts:
    low, high = wilson_interval(right, total)
    return {"accuracy": right / total, "low": low, "high": high, "images": total}


def normal_of_student(run: Run) -> tuple[Any, Any]:
    """Mean and deviation that the student's images are normalised with."""
    name = run.settings.student.student
    return normal_of(name if entry(name) else MOBILENET)

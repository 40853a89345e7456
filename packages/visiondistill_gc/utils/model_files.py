"""Model files: what rebuilds a network of this project, and weights from elsewhere for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import nn

from shared_core import checkpoints
from shared_core.checkpoints import CheckpointError, check_fit
from shared_core.for_paddle.checkpoints import (
    fit_into,
    from_numpy,
    load_checkpoint,
    save_checkpoint,
    unwrap,
)
from shared_core.for_paddle.data import IMAGENET_MEAN, IMAGENET_STD, Normalizer
from visiondistill_gc.models.student_model import build_student
from visiondistill_gc.models.teacher_model import build_teacher

PROJECT = "visiondistill_gc"
HEADS = ("classifier.", "fc.", "head.", "out.")  # how the names of a head's weights begin


def is_of_head(name: str) -> bool:
    """Whether a weight is one of the head, by its name."""
    return name.startswith(HEADS)


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode and what its file says of it."""

    net: nn.Layer
    class_names: tuple[str, ...]  # in the order of the logits
    input_size: int  # side of the square input, pixels
    mean: tuple[float, ...]  # RGB, fractions of 255
    std: tuple[float, ...]
    facts: dict[str, Any]

    @paddle.no_grad()
    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``(N, C)`` of uint8 views ``(N, H, W, 3)``, as evaluation computes them."""
        pixels = Normalizer(self.mean, self.std)(images)
        return self.net(pixels).astype("float32").numpy()


def save_model(
    path: str | Path,
    net: nn.Layer,
    *,
    class_names: Sequence[str],
    architecture: str,
    input_size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    weights: Mapping[str, Any] | None = None,
    epoch: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    split_hash: str | None = None,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write a network that :mod:`visiondistill_gc.models` built, with all that using it needs.

    Args:
        path: usually ``best_model_fold0.pdparams``; ``.safetensors`` writes that format.
        net: from ``build_student`` or ``build_teacher``, wrapped or not.
        class_names: in the order of the logits.
        architecture: what to call it in messages: ``mobilenet_v2``, ``resnet50``.
        input_size: side of the square input, pixels.
        mean, std: of the normalisation, RGB, fractions of 255.
        weights: instead of the network's own.
        epoch, metrics, split_hash, config, more: further facts.

    Returns:
        The facts as written, with the ``sha256`` of the weights.
    """
    plain = unwrap(net)
    facts = checkpoints.make_facts(
        project=PROJECT,
        architecture=architecture,
        class_names=class_names,
        framework="paddle",
        input_size=(3, input_size, input_size),
        mean=mean,
        std=std,
        epoch=epoch,
        metrics=metrics,
        split_hash=split_hash,
        config=config,
        model=plain.built_from,
        **more,
    )
    return save_checkpoint(path, plain.state_dict() if weights is None else weights, facts)


def load_model(path: str | Path, *, categories: Sequence[str] | None = None) -> LoadedModel:
    """Rebuild the network of a file and fill it, in eval mode.

    Args:
        path: what :func:`save_model` wrote.
        categories: the classes that the caller believes it has, in order; None takes the file's.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: damaged, hostile, of another project, or weights that do not fit.
        ValueError: other categories than the file's.
        ImportError: a network of paddleclas without that package.
    """
    weights, facts = load_checkpoint(path, project=PROJECT)
    class_names = tuple(facts["class_names"])
    check_categories(path, class_names, categories)
    try:
        recipe = dict(facts["model"])
        build = {"student": build_student, "teacher": build_teacher}[recipe.pop("kind")]
        net = build(**recipe)
        size = int(facts["input_size"][1])
        mean, std = tuple(facts["mean"]), tuple(facts["std"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: no network is described there: {reason}") from error
    fit_into(net, weights, path=path)
    net.normal = (mean, std)
    net.eval()
    return LoadedModel(net, class_names, size, mean, std, facts)


def check_categories(
    path: str | Path, known: Sequence[str], categories: Sequence[str] | None
) -> None:
    """Refuse categories that contradict those a model was trained with.

    Raises:
        ValueError: another number, other names, or another order; both lists are named.
    """
    if categories is None or list(categories) == list(known):
        return
    what = "in another order" if sorted(categories) == sorted(known) else "other classes"
    raise ValueError(
        f"categories are {' '.join(categories)}, expected those of {path}: {' '.join(known)} "
        f"({what}); leave them out to take the model's own"
    )


def fill_body(net: nn.Layer, arrays: Mapping[str, NDArray[Any]], *, path: str | Path) -> list[str]:
    """Fill ``net`` with arrays under Paddle's names; only the head may be missing or of others.

    Args:
        path: where they are from, for messages.

    Returns:
        Names of the weights of ``net`` that were not filled: those of a new head, or none.

    Raises:
        CheckpointError: no weights, or a weight below the head that does not fit.
    """
    own = {name: list(value.shape) for name, value in net.state_dict().items()}
    fitting = {k: v for k, v in arrays.items() if k in own and list(v.shape) == own[k]}
    if not fitting:
        raise CheckpointError(
            f"{path}: none of its weights ({', '.join(list(arrays)[:3])}...) is one of the network "
            f"({', '.join(list(own)[:3])}...)"
        )
    new_head = [name for name in own if name.startswith(HEADS)]
    if all(name in fitting for name in new_head):
        new_head = []
    body = {name: shape for name, shape in own.items() if name not in new_head}
    given = {k: list(v.shape) for k, v in arrays.items() if k in body or not k.startswith(HEADS)}
    check_fit(path, model=body, weights=given)
    # With the head as it is: Paddle warns about every weight that it is not given.
    net.set_state_dict(net.state_dict() | from_numpy({name: arrays[name] for name in body}))
    return new_head

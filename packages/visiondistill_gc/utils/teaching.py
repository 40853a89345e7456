"""Where a teacher's answers come from: a network that runs beside the student, or a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor, nn

from shared_core.datasets.views.mixing import Mix
from shared_core.for_paddle.export import export_inference
from shared_core.for_paddle.inference import Network, paddle_inference
from shared_core.knowledge import KnowledgeError, KnowledgeStore
from shared_core.metrics import softmax
from visiondistill_gc.models.teacher_model import freeze, teach
from visiondistill_gc.options import ENGINES

TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit


class Teacher(Protocol):
    """What a training step asks."""

    def __call__(
        self, images: Tensor, *, keys: Sequence[str], view: int, mix: Mix | None
    ) -> Tensor:
        """Logits ``(N, C)`` for the images that the student sees."""


class LiveTeacher:
    """A network that answers for exactly the pixels that the student gets, mixed ones too.

    Args:
        net: is frozen.
        engine: ``dygraph``; or ``inference``, which exports the network to ``folder`` and runs it
            through Paddle Inference with oneDNN, several times faster on a CPU; ``auto`` takes
            ``inference`` on a CPU and ``dygraph`` on a GPU.
        folder: for the exported files.
        input_size: side of the input, pixels.
        threads: of Paddle Inference.

    Raises:
        ValueError: an unknown engine.
    """

    def __init__(
        self,
        net: nn.Layer,
        *,
        engine: str,
        folder: Path,
        input_size: int,
        threads: int = 1,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}")
        self.net = freeze(net)
        on_gpu = str(paddle.device.get_device()).startswith("gpu")
        self.engine = ("dygraph" if on_gpu else "inference") if engine == "auto" else engine
        self._network: Network | None = None
        self._checked = False
        if self.engine == "inference":
            prefix = folder / "teacher"
            folder.mkdir(parents=True, exist_ok=True)
            export_inference(net, prefix, input_size=(3, input_size, input_size))
            self._network = paddle_inference(prefix, threads=threads)

    def __call__(
        self, images: Tensor, *, keys: Sequence[str], view: int, mix: Mix | None
    ) -> Tensor:
        """Logits of the images as they come; ``keys``, ``view`` and ``mix`` are not needed.

        Raises:
            ValueError: the first answer of Paddle Inference is not dygraph's.
        """
        if self._network is None:
            return teach(self.net, images)
        logits = self._network(images.numpy())
        if not self._checked:
            check_same(logits, teach(self.net, images).numpy())
            self._checked = True
        return paddle.to_tensor(logits)


def check_same(found: np.ndarray, expected: np.ndarray, *, tolerance: float = TOLERANCE) -> float:
    """The largest difference relative to the largest expected value.

    Raises:
        ValueError: above ``tolerance``, or not a number.
    """
    scale = max(float(np.abs(expected).max()), 1e-12)
    difference = float(np.abs(found - expected).max()) / scale
    if not difference <= tolerance:
        raise ValueError(
            f"the teacher in Paddle Inference differs from dygraph by {difference:.2g} of its "
            f"largest logit, expected at most {tolerance:g}; take --teacher-engine dygraph"
        )
    return difference


class StoredTeacher:
    """Answers from a store that any framework may have written.

    The store's view says what its teacher saw. When that is the run's own training view, its
    ``view_id`` numbers replay in turn and the answers are for exactly the student's pixels. A store
    of one view, whatever it is, has one answer an image for the whole run: its teacher may have
    seen the images larger, or cropped. Where two images are
    mixed, their answers are mixed at the loss's temperature by the same weight: the teacher did not
    see the mixture, and the record says so.

    Args:
        folder: of the store.
        classes: names in the order of the logits; the store's must be the same.
        train_view: settings of the run's training view.
        temperature: of the loss.

    Raises:
        FileNotFoundError: no store there.
        KnowledgeError: other classes, several views that are not the run's, or features.
    """

    def __init__(
        self,
        folder: Path,
        *,
        classes: Sequence[str],
        train_view: dict[str, Any],
        temperature: float,
    ) -> None:
        self.store = KnowledgeStore.open(folder, classes=list(classes))
        if self.store.about["kind"] == "features":
            raise KnowledgeError(f"{folder}: holds features, expected logits or probs")
        view = self.store.about["view"]
        self.replays = view == train_view
        if not self.replays and len(self.store.views) > 1:
            raise KnowledgeError(
                f"{folder}: its teacher saw {len(self.store.views)} views of an image, {view}: "
                f"expected one view, or the run's training view {train_view}"
            )
        if not self.store.views:
            raise KnowledgeError(f"{folder}: holds no outputs, expected some of every image")
        self.temperature = temperature
        self.views = len(self.store.views) if self.replays else None
        if self.replays and self.store.views != tuple(range(len(self.store.views))):
            raise KnowledgeError(f"{folder}: holds views {self.store.views}, expected 0, 1, ...")

    def logits(self, keys: Sequence[str], view: int) -> np.ndarray:
        """float32 ``(N, C)``; of probabilities their logarithms."""
        values = self.store.get(list(keys), view if self.replays else self.store.views[0])
        if self.store.about["kind"] == "probs":
            values = np.log(np.maximum(values, 1e-12))
        return values.astype(np.float32)

    def __call__(
        self, images: Tensor, *, keys: Sequence[str], view: int, mix: Mix | None
    ) -> Tensor:
        """Logits whose softmax at the temperature is the (mixed) stored answer."""
        logits = self.logits(keys, view)
        if mix is None:
            return paddle.to_tensor(logits)
        soft = softmax(logits / self.temperature)
        mixed = mix.lam * soft + (1 - mix.lam) * soft[mix.permutation]
        return paddle.to_tensor(
            (self.temperature * np.log(np.maximum(mixed, 1e-30))).astype(np.float32)
        )


def with_random_head(net: nn.Layer, *, seed: int) -> str:
    """Give the last weighted layer random values, as one that never learned these classes has.

    It is what the original's teacher was: trained features under an untrained head.

    Returns:
        The name of the layer.
    """
    name, layer = [
        (n, sub) for n, sub in net.named_sublayers() if isinstance(sub, nn.Linear | nn.Conv2D)
    ][-1]
    rng = np.random.default_rng(seed)
    fan_in = (
        int(np.prod(layer.weight.shape))
        // layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0]
    )
    bound = 1.0 / np.sqrt(fan_in)
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            values = rng.uniform(-bound, bound, parameter.shape).astype(np.float32)
            parameter.set_value(values)
    return name

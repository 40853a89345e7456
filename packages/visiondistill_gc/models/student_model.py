"""The student: MobileNetV2 with an improved head, or another network; first blocks frozen."""

from __future__ import annotations

from typing import Any

from paddle import Tensor, nn
from paddle.utils import unique_name
from paddle.vision.models import MobileNetV2

from shared_core.for_paddle.data import IMAGENET_MEAN, IMAGENET_STD
from visiondistill_gc.models.teacher_model import build_teacher
from visiondistill_gc.options import HEADS, MOBILENET, SOURCES

BLOCKS = 19  # children of MobileNetV2's ``features``
FROZEN = 14  # of them, in the original


class Student(nn.Layer):
    """``features`` of MobileNetV2, then ``classifier``.

    The improved head is pool, flatten, linear to ``hidden``, batch norm, ReLU, dropout, linear; the
    plain one pool, flatten, dropout, linear. ``model.features[:frozen]`` does not learn. With
    ``freeze_bn`` the batch norms of these blocks keep their statistics too: in training mode they
    would go on averaging, and the frozen blocks would compute something else after every step.

    Args:
        num_classes: at least 2.
        scale: width of MobileNetV2.
        head: ``improved`` or ``plain``.
        frozen: children of ``features`` that do not learn, 0 to 19.
        freeze_bn: keep the statistics of the frozen blocks as well.
        dropout: probability in [0, 1).
        hidden: width of the improved head.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        scale: float = 1.0,
        head: str = "improved",
        frozen: int = FROZEN,
        freeze_bn: bool = True,
        dropout: float = 0.5,
        hidden: int = 1024,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected at least 2")
        if not scale > 0:
            raise ValueError(f"scale is {scale}, expected more than 0")
        if head not in HEADS:
            raise ValueError(f"head is {head!r}, expected one of {', '.join(HEADS)}")
        if not 0 <= frozen <= BLOCKS:
            raise ValueError(f"frozen is {frozen}, expected 0 to {BLOCKS} blocks")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, expected a probability in [0, 1)")
        if hidden < 1:
            raise ValueError(f"hidden is {hidden}, expected at least 1")
        backbone = MobileNetV2(scale=scale, num_classes=0, with_pool=False)
        self.features = backbone.features
        width = backbone.last_channel
        layers: list[nn.Layer] = [nn.AdaptiveAvgPool2D(1), nn.Flatten()]
        if head == "improved":
            layers += [nn.Linear(width, hidden), nn.BatchNorm1D(hidden), nn.ReLU()]
            width = hidden
        layers += [nn.Dropout(dropout), nn.Linear(width, num_classes)]
        self.classifier = nn.Sequential(*layers)
        self.frozen, self.freeze_bn = frozen, freeze_bn
        for parameter in self.frozen_parameters():
            parameter.stop_gradient = True
            parameter.trainable = False

    def frozen_parameters(self) -> list[Tensor]:
        """Parameters (batch-norm statistics among them) of the blocks that do not learn."""
        return [p for block in list(self.features)[: self.frozen] for p in block.parameters()]

    def train(self) -> None:
        """Training mode, except for the frozen blocks when their statistics are to stay."""
        super().train()
        if self.freeze_bn:
            for block in list(self.features)[: self.frozen]:
                block.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of float32 images ``(N, 3, H, W)``."""
        return self.classifier(self.features(images))


def build_student(
    *,
    num_classes: int,
    name: str = MOBILENET,
    scale: float = 1.0,
    head: str = "improved",
    frozen: int = FROZEN,
    freeze_bn: bool = True,
    dropout: float = 0.5,
    hidden: int = 1024,
    source: str = "paddle.vision",
) -> nn.Layer:
    """A student with random weights; ``built_from`` of it holds what rebuilds it.

    Args:
        name: ``mobilenet_v2``, or any network that can be a teacher: an EfficientNet-lite has
            ``frozen``, ``freeze_bn`` and ``dropout`` of these settings, one of paddleclas the
            first two, others none.
        source: ``paddle.vision``, or ``paddleclas`` for a network of that package with its own
            head (``plain``, without dropout) and width.

    Others as in :class:`Student`.

    Raises:
        ValueError: a value out of range, or one that the source cannot do.
        ImportError: paddleclas is not installed.
    """
    if source == "paddleclas" and (head != "plain" or scale != 1.0):
        raise ValueError(
            f"a paddleclas student with head={head!r}, scale={scale}: expected head plain, "
            "scale 1; its network has its own head and width"
        )
    if name != MOBILENET or source == "paddleclas":
        own = {"frozen": frozen, "freeze_bn": freeze_bn, "dropout": dropout}
        net = build_teacher(name, num_classes=num_classes, source=source, **own)
        net.built_from["kind"] = "student"
        if source == "paddleclas":
            net.built_from |= {"head": head, "scale": scale}
        return net
    if source != "paddle.vision":
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    shape: dict[str, Any] = {
        "scale": scale, "head": head, "frozen": frozen, "freeze_bn": freeze_bn,
        "dropout": dropout, "hidden": hidden,
    }  # fmt: skip
    # Generated names start anew for every network, so that a second one of a process has the same,
    # whatever was built before it.
    with unique_name.guard():
        net = Student(num_classes=num_classes, **shape)
    net.normal = (IMAGENET_MEAN, IMAGENET_STD)
    recipe = {"kind": "student", "source": source, "num_classes": num_classes}
    net.built_from = {**recipe, **shape}
    return net


def count_parameters(net: nn.Layer) -> dict[str, int]:
    """``trainable``: what learns; ``total``: without batch-norm statistics; ``state``: with them.

    Paddle lists the statistics among the parameters.
    """
    learned = total = state = 0
    for name, parameter in net.named_parameters():
        size = int(parameter.size)
        state += size
        if name.rsplit(".", 1)[-1] not in ("_mean", "_variance"):
            total += size
            learned += 0 if parameter.stop_gradient else size
    return {"trainable": learned, "total": total, "state": state}

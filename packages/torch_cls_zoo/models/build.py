"""Build a network by its name, with a head for the user's classes and weights if wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from torch_cls_zoo.models.aliases import Resolved, resolve
from torch_cls_zoo.models.pretrained import library_weights, load_pretrained, pruned_widths
from torch_cls_zoo.pruning.cutting import cut_channels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PRETRAINED_CLASSES = 1000
# Both learned from images scaled to [-1, 1]; with this they take ImageNet-normalised ones. It is
# set with and without weights, so that a checkpoint of either is the same network.
TORCHVISION_SETTINGS = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
}


@dataclass(frozen=True)
class Built:
    """A network that is ready for images ``(N, 3, H, W)`` and gives logits ``(N, num_classes)``."""

    model: nn.Module
    arch: str  # as the user wrote it
    library: str
    name: str  # in that library
    mean: tuple[float, ...] = IMAGENET_MEAN  # per channel, of images in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD
    kept: dict[str, Any] = field(default_factory=dict)  # of a pruned network, for its checkpoints
    notes: tuple[str, ...] = ()  # what the user should be told, one line each

    @property
    def note(self) -> str:
        """All notes as one line; empty when there is nothing to say."""
        return "; ".join(self.notes)


def build_model(
    arch: str,
    *,
    num_classes: int,
    pretrained: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    kept: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> Built:
    """Build the network ``arch``.

    Args:
        arch: see :func:`torch_cls_zoo.models.aliases.resolve`.
        num_classes: outputs of the head, 2 or more.
        pretrained: None starts from random weights; ``"default"`` takes the library's own (from its
            cache, or fetched by the library); anything else is a file: a checkpoint of this
            project, safetensors, or a state dict. A head of another size is left at random and
            that is noted; every other weight must fit.
        image_size: ``(height, width)`` in pixels, for networks that are built for one size.
        kept: channels that a pruned network has left, as its checkpoint says (fact ``pruned``). A
            pruned file as ``pretrained`` needs no telling.

    Returns:
        The network in training mode, with notes.

    Raises:
        ValueError: unknown name, a count below 2, or a size that the network cannot take.
        FileNotFoundError: no such file of weights.
        CheckpointError: weights that do not fit.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected 2 or more")
    found = resolve(arch)
    model = _construct(found, num_classes, image_size)
    config = getattr(model, "pretrained_cfg", None) or {}
    notes: list[str] = []
    if kept is None and pretrained is not None and str(pretrained) != "default":
        kept = pruned_widths(pretrained, arch)
    if kept:
        cut_channels(model, kept)
        notes.append(f"a pruned network: {len(kept)} layers are narrower than {arch} has them")
    if pretrained is not None:
        if str(pretrained) == "default":
            weights, origin = library_weights(found, image_size)
        else:
            weights, origin = None, Path(pretrained)
        notes += load_pretrained(
            model, origin, weights=weights, num_classes=num_classes, image_size=image_size
        )
    return Built(
        model=model,
        arch=arch,
        library=found.library,
        name=found.name,
        mean=tuple(config.get("mean", IMAGENET_MEAN)),
        std=tuple(config.get("std", IMAGENET_STD)),
        kept={name: dict(sides) for name, sides in (kept or {}).items()},
        notes=tuple(notes),
    )


def _construct(found: Resolved, num_classes: int, image_size: tuple[int, int] | None) -> nn.Module:
    settings: dict[str, Any] = {}
    if found.library == "resnest_fast":
        return _resnest_fast(num_classes, **found.settings)
    try:
        if found.library == "torchvision":
            from torchvision import models

            settings.update(TORCHVISION_SETTINGS.get(found.name, {}))
            if image_size is not None and found.name.startswith("vit_"):
                if image_size[0] != image_size[1]:
                    raise ValueError("it takes square images only")
                settings["image_size"] = image_size[0]
            elif image_size is not None and found.name.startswith("maxvit"):
                settings["input_size"] = image_size
            return models.get_model(found.name, weights=None, num_classes=num_classes, **settings)
        import timm

        config = timm.get_pretrained_cfg(found.name)
        if image_size is not None and config is not None and config.fixed_input_size:
            settings["img_size"] = image_size
        return timm.create_model(found.name, num_classes=num_classes, **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if image_size is None:
            raise ValueError(f"--arch {found.arch}: {' '.join(str(error).split())}") from error
        height, width = image_size
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(
            f"--arch {found.arch} with --image_size {height} {width}: {reason}"
        ) from error


def _resnest_fast(num_classes: int, *, radix: int, cardinality: int, base_width: int) -> nn.Module:
    """ResNeSt-50 with its average pooling before the 3 x 3 convolution ("fast")."""
    from timm.models.resnest import ResNestBottleneck
    from timm.models.resnet import ResNet

    return ResNet(
        ResNestBottleneck,
        [3, 4, 6, 3],
        num_classes=num_classes,
        stem_type="deep",
        stem_width=32,
        avg_down=True,
        base_width=base_width,
        cardinality=cardinality,
        block_args={"radix": radix, "avd": True, "avd_first": True},
    )

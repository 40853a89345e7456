"""A network for features with the head on it; the student takes the teacher's head, frozen."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from landmark_distill.backbones import library_encoder
from landmark_distill.config import LIBRARIES, LITE
from landmark_distill.head.cosine_head import MARGIN, SCALE, CosineMarginHead
from landmark_distill.resnet12 import ResNet12
from landmark_distill.resnets import resnet20, resnet50
from landmark_distill.swin_transformer import SwinTransformer

IMAGE_SIZE = 384  # pixels, of the published recipe
FEATURE_DIM = 1024


def _swin(*, feature_dim: int, depths: tuple[int, ...], heads: tuple[int, ...], **options: Any):
    if feature_dim < 8 or feature_dim % 8:
        raise ValueError(f"feature_dim is {feature_dim}, expected a multiple of 8")
    return SwinTransformer(embed_dim=feature_dim // 8, depths=depths, heads=heads, **options)


def _swin_base(feature_dim: int, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), **options: Any):
    return _swin(feature_dim=feature_dim, depths=depths, heads=heads, **options)


def _swin_tiny(feature_dim: int, depths=(2, 2, 6, 2), heads=(2, 4, 8, 16), **options: Any):
    return _swin(feature_dim=feature_dim, depths=depths, heads=heads, **options)


# The names of the command line: how a network is made, and which options it has.
_SWIN = ("image_size", "window", "drop_path", "depths", "heads", "mlp_ratio")
MODELS = {
    "Swin_base": (_swin_base, _SWIN),
    "Swin_tiny": (_swin_tiny, _SWIN),
    "Resnet20": (resnet20, ("width",)),
    "Resnet12": (ResNet12, ("drop_rate", "drop_block", "drop_block_steps")),
    "Resnet50": (resnet50, ()),
}


def is_library(name: str) -> bool:
    """Whether a network is of the core or a library, not of this project."""
    return name in LITE or name.startswith(tuple(f"{one}/" for one in LIBRARIES))


class EmbeddingModel(nn.Module):
    """``encoder``: images to features; ``head``: features to logits, or None.

    The weights' names begin with ``encoder.`` and ``head.``. A student for use needs the encoder
    only: ``model.encoder.state_dict()``.

    Args:
        encoder: has ``feature_dim``, ``checkpointing`` and ``smallest`` (pixels).
        head: the cosine head, or None.
    """

    head: CosineMarginHead | None

    def __init__(self, encoder: nn.Module, head: CosineMarginHead | None) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.feature_dim: int = encoder.feature_dim
        self.still: list[nn.Module] = []  # parts that stay in eval mode; they have a name already

    def embed(self, images: Tensor) -> Tensor:
        """Features ``(N, feature_dim)``, not normalised, of normalised images ``(N, 3, H, W)``.

        Raises:
            ValueError: images that are too small or have no three channels.
        """
        small = self.encoder.smallest
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < small:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (N, 3, H, W) with at least "
                f"{small} pixels a side"
            )
        return self.encoder(images)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, logits: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Features ``(N, D)`` and logits ``(N, C)``; None without a head or with ``logits=False``.

        The margin is taken from the label's logit in training mode, when ``labels`` are given.
        """
        features = self.embed(images)
        if self.head is None or not logits:
            return features, None
        return features, self.head(features, labels)

    @property
    def body(self) -> nn.Module:
        """What trained weights fill: all of the encoder, or what comes before its new layer."""
        return getattr(self.encoder, "body", self.encoder)

    def freeze_body(self) -> None:
        """The body does not learn, and stays in eval mode: its norms keep their statistics."""
        self.still.append(self.body.requires_grad_(False))
        self.train(self.training)

    def freeze_norms(self) -> None:
        """Batch norms keep their means and variances; their weights learn on."""
        kind = nn.modules.batchnorm._BatchNorm
        self.still += [module for module in self.encoder.modules() if isinstance(module, kind)]
        self.train(self.training)

    def train(self, mode: bool = True) -> EmbeddingModel:
        """Training mode for all but what stays as it is."""
        super().train(mode)
        for part in self.still:
            part.eval()
        return self

    def set_checkpointing(self, on: bool) -> None:
        """Keep less for backward: each block is computed again there. The numbers stay the same."""
        self.encoder.checkpointing = on


def build_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] = IMAGE_SIZE,
    feature_dim: int = FEATURE_DIM,
    scale: float = SCALE,
    margin: float = MARGIN,
    **options: Any,
) -> EmbeddingModel:
    """A network by the name that ``--backbone_class`` takes.

    Args:
        name: one of ``MODELS`` or ``LITE``, or ``LIBRARY/NAME``.
        num_classes: rows of a new head; None for no head (see :func:`share_head`).
        image_size: pixels; it sets the windows of a Swin. Every network takes other sizes, too.
        feature_dim: features; the widths of all networks but Resnet20 grow with it.
        scale: of the head.
        margin: of the head.
        options: of this network: ``window``, ``drop_path``, ``depths``, ``heads``, ``mlp_ratio``
            (Swin); ``drop_rate``, ``drop_block``, ``drop_block_steps`` (Resnet12); ``width``
            (Resnet20); ``drop_rate``, ``drop_path`` (a library's). None leaves the default.

    Raises:
        ValueError: an unknown name, an option that this network does not have, a bad value.
    """
    if is_library(name):
        make, known = partial(library_encoder, name), ("image_size", "drop_rate", "drop_path")
    elif name in MODELS:
        make, known = MODELS[name]
    else:
        raise ValueError(
            f"backbone is {name!r}, expected one of {', '.join((*MODELS, *LITE))}, timm/NAME or "
            "torchvision/NAME"
        )
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            raise ValueError(
                f"{name} has no option {key!r}, expected one of: {', '.join(known) or 'none'}"
            )
    if "image_size" in known:
        given["image_size"] = image_size
    encoder = make(feature_dim=feature_dim, **given)
    head = None
    if num_classes is not None:
        head = CosineMarginHead(num_classes, feature_dim, scale=scale, margin=margin)
    return EmbeddingModel(encoder, head)


def share_head(student: EmbeddingModel, teacher: EmbeddingModel | CosineMarginHead) -> None:
    """Give the student the teacher's head, frozen: one weight in memory, maybe a mapped file.

    The two heads are two modules around one weight, so that the student's can be in training mode
    (with margin) while the teacher's is in eval mode (without).

    Args:
        student: its own head, if it has one, is dropped.
        teacher: a model with a head, or a head.

    Raises:
        ValueError: the teacher has no head, or its features have another length.
    """
    head = teacher if isinstance(teacher, CosineMarginHead) else teacher.head
    if head is None:
        raise ValueError("the teacher has no head, expected one to share")
    if head.feature_dim != student.feature_dim:
        raise ValueError(
            f"the teacher's head takes {head.feature_dim} features, the student makes "
            f"{student.feature_dim}; expected the same"
        )
    head.freeze()
    shared = CosineMarginHead.around(head.weight, scale=head.scale, margin=head.margin)
    student.head = shared.train(student.training)


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """``{"trainable": ..., "all": ...}``, each weight counted once."""
    every = list(module.parameters())
    trainable = sum(p.numel() for p in every if p.requires_grad)
    return {"trainable": trainable, "all": sum(p.numel() for p in every)}


def load_weights(module: nn.Module, state: dict[str, Tensor], *, source: str = "weights") -> None:
    """Copy ``state`` into ``module``; every weight must fit.

    Names may carry the prefixes ``module.`` (of parallel wrappers) in any place, and for an
    encoder ``encoder.``. Masks and position indices, which older Swin files hold, are left out.

    Args:
        module: an :class:`EmbeddingModel` or its encoder.
        state: names and tensors.
        source: what to call the weights in an error.

    Raises:
        ValueError: weights are missing, not known, or of another shape; the first are named.
    """
    derived = ("attn_mask", "relative_position_index")
    clean = {
        ".".join(part for part in name.split(".") if part != "module"): value
        for name, value in state.items()
        if not name.endswith(derived)
    }
    own = module.state_dict()
    if not isinstance(module, EmbeddingModel):
        inside = {k.removeprefix("encoder."): v for k, v in clean.items() if k[:8] == "encoder."}
        clean = {k: v for k, v in (inside or clean).items() if not k.startswith("head.")}
    else:  # the published models keep the head inside the encoder
        moved = {"encoder.head.weight": "head.weight"}
        clean = {moved.get(name, name): value for name, value in clean.items()}
    problems = [f"{name} is missing" for name in own if name not in clean]
    problems += [f"{name} is not known" for name in clean if name not in own]
    problems += [
        f"{name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in clean.items()
        if name in own and value.shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{source} do not fit: {'; '.join(problems[:3])}{more}")
    with torch.no_grad():
        for name, value in own.items():
            if value.data_ptr() != clean[name].data_ptr():
                value.copy_(clean[name])

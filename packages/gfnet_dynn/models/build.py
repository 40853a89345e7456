"""The published networks by name, each size open to change."""

from collections.abc import Sequence

from torch import nn

from gfnet_dynn.models.gfnet import ISOTROPIC, GFNet
from gfnet_dynn.models.gfnet_pyramid import PYRAMIDS, GFNetPyramid


def build_gfnet(
    arch: str,
    *,
    img_size: int | Sequence[int],
    num_classes: int,
    patch_size: int | Sequence[int] | None = None,
    embed_dim: int | Sequence[int] | None = None,
    depth: int | Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    filter: str = "auto",
) -> nn.Module:
    """A named network; every argument that is not None takes the place of the named one's.

    Args:
        arch: gfnet-ti, gfnet-xs, gfnet-s, gfnet-b, gfnet-h-ti, gfnet-h-s or gfnet-h-b.
        drop_path_rate: None takes the rate of the published ImageNet recipe.

    Raises:
        ValueError: unknown name, or sizes that do not fit.
    """
    name = arch.lower()
    if name in PYRAMIDS:
        dims, depths, layer_scale, rate = PYRAMIDS[name]
        return GFNetPyramid(
            img_size=img_size,
            patch_size=4 if patch_size is None else patch_size,
            num_classes=num_classes,
            embed_dim=dims if embed_dim is None else embed_dim,
            depth=depths if depth is None else depth,
            layer_scale=layer_scale,
            drop_path_rate=rate if drop_path_rate is None else drop_path_rate,
            filter=filter,
        )
    if name not in ISOTROPIC:
        raise ValueError(f"arch: got {arch!r}, expected one of {[*ISOTROPIC, *PYRAMIDS]}")
    dim, blocks, rate = ISOTROPIC[name]
    return GFNet(
        img_size=img_size,
        patch_size=16 if patch_size is None else patch_size,
        num_classes=num_classes,
        embed_dim=dim if embed_dim is None else embed_dim,
        depth=blocks if depth is None else depth,
        drop_path_rate=rate if drop_path_rate is None else drop_path_rate,
        filter=filter,
    )

"""Weights of one image size for another: position embedding and filters of a new token grid."""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfnet_dynn.choices import TRANSFERS

FILTER = re.compile(r"blocks\.(?:(\d+)\.)?\d+\.filter\.complex_weight")


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embedding ``(1, h w, C)`` on a new grid ``(1, h' w', C)``: bicubic, no class token.

    Source: arXiv:2107.00645, the release's fine-tuning code (align_corners False).
    """
    if pos_embed.dim() != 3 or pos_embed.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"pos_embed: got shape {tuple(pos_embed.shape)}, expected (1, {grid[0] * grid[1]}, C)"
        )
    if tuple(grid) == tuple(new_grid):
        return pos_embed.clone()
    channels = pos_embed.shape[2]
    image = pos_embed.reshape(1, *grid, channels).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], channels)


def resize_filter(
    weight: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], *, method: str = "official"
) -> Tensor:
    """A ``complex_weight (h, w // 2 + 1, C, 2)`` on a new grid.

    Args:
        weight: the filter on ``grid``.
        grid: tokens ``(h, w)``; ``w`` cannot be told from the weight's shape.
        new_grid: tokens ``(h', w')`` wanted.
        method: ``official`` interpolates the stored array as an image: bicubic, align_corners True.
            That is what the release does; rows are in FFT order, so it also mixes the highest
            positive with the highest negative frequencies, and it moves every frequency.
            ``spectrum`` keeps the response at each frequency, in cycles per image: frequencies
            that the old grid could not hold become 0, those that the new one cannot hold go. An
            image without such frequencies is then filtered alike on both grids.
    """
    h, w = grid
    if method not in TRANSFERS:
        raise ValueError(f"transfer: got method {method!r}, expected one of {TRANSFERS}")
    if tuple(weight.shape[:2]) != (h, w // 2 + 1) or weight.dim() != 4 or weight.shape[3] != 2:
        raise ValueError(
            f"complex_weight: got shape {tuple(weight.shape)}, expected ({h}, {w // 2 + 1}, C, 2)"
        )
    if (h, w) == tuple(new_grid):
        return weight.clone()
    if method == "official":
        image = weight.permute(2, 3, 0, 1).reshape(1, -1, h, w // 2 + 1)
        size = (new_grid[0], new_grid[1] // 2 + 1)
        image = F.interpolate(image, size=size, mode="bicubic", align_corners=True)
        return image.reshape(weight.shape[2], 2, *size).permute(2, 3, 0, 1).contiguous()
    spectrum = torch.view_as_complex(weight.contiguous())
    spectrum = resize_columns(spectrum, w, new_grid[1])
    return torch.view_as_real(resize_rows(spectrum, new_grid[0])).contiguous()


def resize_columns(spectrum: Tensor, w: int, new_w: int) -> Tensor:
    """Half spectrum ``(h, w // 2 + 1, C)`` of rows of ``w`` to that of rows of ``new_w``."""
    h, half, channels = spectrum.shape
    if w % 2 == 0 and new_w > w:
        # Nyquist becomes an ordinary frequency. The inverse transform of the old grid only used
        # the part of it that gives real output; an ordinary column has to be that part.
        nyquist = spectrum[:, -1]
        mirrored = nyquist[(-torch.arange(h)) % h].conj()
        spectrum = torch.cat([spectrum[:, :-1], ((nyquist + mirrored) / 2).unsqueeze(1)], dim=1)
    out = spectrum.new_zeros(h, new_w // 2 + 1, channels)
    kept = min(half, new_w // 2 + 1)
    out[:, :kept] = spectrum[:, :kept]
    return out


def resize_rows(spectrum: Tensor, new_h: int) -> Tensor:
    """Full spectrum ``(h, w', C)`` along the rows' axis, in FFT order, to ``new_h`` rows."""
    h = spectrum.shape[0]
    out = spectrum.new_zeros(new_h, *spectrum.shape[1:])
    small = min(h, new_h)
    side = (small - 1) // 2  # frequencies -side..side exist on both grids
    out[: side + 1] = spectrum[: side + 1]
    if side:
        out[-side:] = spectrum[-side:]
    if small % 2 == 0:  # the smaller grid's Nyquist stands for both +small/2 and -small/2
        top = small // 2
        if new_h > h:
            out[top] = out[-top] = spectrum[top]
        else:
            out[top] = (spectrum[top] + spectrum[-top]) / 2 if h > new_h else spectrum[top]
    return out


def filters_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The names of all filters with their stages; an isotropic network is one stage, number 0."""
    found = {name: FILTER.fullmatch(name) for name in state}
    return {name: int(match[1] or 0) for name, match in found.items() if match}


def grid_of(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Token grid ``(h, w)`` that a network's first blocks work on, from its state dict.

    Raises:
        ValueError: no weights of a GFNet, or such of two grids.
    """
    filters = filters_of(state)
    if "pos_embed" not in state or not filters:
        missing = "filters" if "pos_embed" in state else "pos_embed"
        raise ValueError(f"weights: got no {missing}, expected those of a GFNet")
    weight, tokens = state[next(iter(filters))], state["pos_embed"].shape[1]
    h = weight.shape[0]
    w = tokens // h
    if tokens != h * w or weight.shape[1] != w // 2 + 1:
        raise ValueError(
            f"state dict: pos_embed has {tokens} tokens and the filters have shape "
            f"{tuple(weight.shape)}, expected those of one grid"
        )
    return h, w


def transfer_state(
    state: Mapping[str, Tensor], grid: tuple[int, int], *, method: str = "official"
) -> dict[str, Tensor]:
    """A state dict with position embedding and filters on another grid, of a pyramid, too.

    Args:
        grid: tokens ``(h, w)`` of the first blocks; it halves from stage to stage.
        method: how filters are resized, see :func:`resize_filter`.
    """
    old = grid_of(state)
    out = dict(state)
    out["pos_embed"] = resize_pos_embed(state["pos_embed"], old, grid)
    for name, stage in filters_of(state).items():
        sides = [(h >> stage, w >> stage) for h, w in (old, grid)]
        out[name] = resize_filter(state[name], *sides, method=method)
    return out


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]],
    *,
    method: str = "official",
    new_head: bool = False,
) -> nn.Module:
    """Load the weights of a GFNet or pyramid, resized where its grid is another one; all must fit.

    Args:
        model: changed in place and returned.
        state: a state dict, or the official files' ``{"model": state dict}``.
        method: how filters are resized, see :func:`resize_filter`.
        new_head: keep the model's own head instead of the file's (fine-tuning on other classes).

    Raises:
        ValueError: a name or a shape that does not fit.
    """
    if "model" in state and not isinstance(state["model"], Tensor):
        state = state["model"]
    state = transfer_state(state, model.grid, method=method)
    if new_head:
        state |= {f"head.{name}": value for name, value in model.head.state_dict().items()}
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [n for n in own if n in state and own[n].shape != state[n].shape]
    if wrong:
        raise ValueError(
            f"weights: got {len(wrong)} entries that do not fit, first {wrong[0]!r}; "
            f"expected those of a GFNet of width {model.embed_dim} and depth {model.depth}"
        )
    model.load_state_dict(state)
    return model

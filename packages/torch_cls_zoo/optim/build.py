"""Optimisers by the zoo's names: those of torch and timm, and one rule of weight decay for all.

Weight decay is decoupled: before each step ``p <- p - lr * weight_decay * p``, for every parameter
that is no bias (scales of normalisation layers are decayed, as the zoo always did). The optimizers
themselves get a decay of 0.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torch_cls_zoo.optim.ralamb import Ralamb

RANGER_BETAS = (0.95, 0.999)
LOOKAHEAD_STEPS = 6  # k
LOOKAHEAD_SHARE = 0.5  # alpha

# Of the zoo's README. Other names of timm.optim work too, each also with "lookahead_" before it.
OPTIMIZERS = (
    "sgd", "adam", "adamw", "radam", "ranger", "lookaheadadam", "ralamb", "rangerlars", "novograd",
)  # fmt: skip


def build_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    groups: list[dict[str, Any]] | None = None,
) -> Optimizer:
    """Make the optimizer ``name`` for the trainable parameters of ``model``.

    Args:
        name: one of ``OPTIMIZERS``, or a name of ``timm.optim``.
        model: its parameters are grouped into decayed ones and biases.
        lr: base learning rate, above 0.
        weight_decay: decoupled, see the module; 0 or more.
        groups: parameters with rates and decays of their own, in place of one rate for all.
        momentum: of ``sgd`` and those of timm that have one, in [0, 1).

    Raises:
        ValueError: unknown name, a value out of range, nothing to train, or an optimizer that needs
            second derivatives or a package that is not here.
    """
    if not 0 < lr < float("inf"):
        raise ValueError(f"--lr {lr}, expected a number above 0")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"--weight-decay {weight_decay}, expected 0 or more")
    if not 0 <= momentum < 1:
        raise ValueError(f"--momentum {momentum}, expected 0 <= momentum < 1")
    if groups is None:
        groups = _groups(model, weight_decay)
    else:  # the decay is done here, see the module
        groups = [
            {**group, "decoupled_decay": group["weight_decay"], "weight_decay": 0.0}
            for group in groups
        ]
    optimizer = _make(name, groups, lr, momentum)
    base = getattr(optimizer, "_base_optimizer", optimizer)  # inside timm's Lookahead
    base.register_step_pre_hook(_decay)
    return optimizer


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed, biases = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (biases if name.endswith("bias") else decayed).append(parameter)
    groups = [
        {"params": decayed, "decoupled_decay": weight_decay},
        {"params": biases, "decoupled_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameter")
    return groups


@torch.no_grad()
def _decay(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Shrink the decayed parameters; runs before each step that an optimizer really takes."""
    for group in optimizer.param_groups:
        if group.get("decoupled_decay", 0.0):
            for parameter in group["params"]:
                if parameter.grad is not None:  # as the step itself, which leaves others alone
                    parameter.mul_(1.0 - group["lr"] * group["decoupled_decay"])


def _make(name: str, groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    own: dict[str, Callable[[], Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, lr=lr, momentum=momentum),
        "adam": lambda: torch.optim.Adam(groups, lr=lr),
        "adamw": lambda: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0),
        "radam": lambda: torch.optim.RAdam(groups, lr=lr),
        "ranger": lambda: _lookahead(torch.optim.RAdam(groups, lr=lr, betas=RANGER_BETAS)),
        "lookaheadadam": lambda: _lookahead(torch.optim.Adam(groups, lr=lr)),
        "ralamb": lambda: Ralamb(groups, lr=lr),
        "rangerlars": lambda: _lookahead(Ralamb(groups, lr=lr)),
    }
    if name in own:
        return own[name]()
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    plain = name.removeprefix("lookahead_")
    if plain in own:  # "lookahead_adam"
        return _lookahead(_make(plain, groups, lr, momentum))
    if plain not in list_optimizers():
        raise ValueError(
            f"--opt {name!r}, expected one of {', '.join(OPTIMIZERS)} or a name of timm.optim"
        )
    if getattr(get_optimizer_info(plain), "second_order", False) or plain == "adahessian":
        raise ValueError(f"--opt {name}: needs second derivatives, expected a first-order one")
    try:
        optimizer = create_optimizer_v2(
            groups, opt=plain, lr=lr, weight_decay=0.0, momentum=momentum
        )
    except Exception as error:  # each package that timm may ask for fails in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--opt {name}: {reason}") from error
    return _lookahead(optimizer) if plain != name else optimizer


def _lookahead(base: Optimizer) -> Optimizer:
    """Slow weights that follow the fast ones every few steps; timm's.

    It takes the slow weights at the first meeting (after k steps), not at the start as the paper.

    Source: Zhang et al. 2019, arXiv:1907.08610, algorithm 1.
    """
    from timm.optim import Lookahead

    wrapped: Optimizer = Lookahead(base, alpha=LOOKAHEAD_SHARE, k=LOOKAHEAD_STEPS)
    return wrapped

"""Weights from elsewhere for the layers below the head: Paddle's, or torch's as safetensors."""

from __future__ import annotations

from pathlib import Path

from paddle import nn

from shared_core.checkpoints import CheckpointError, check_fit, names
from shared_core.for_paddle.checkpoints import from_numpy, load_foreign_weights, to_numpy

HEADS = ("classifier.", "fc.", "head.", "out.")


def load_pretrained(path: str | Path, net: nn.Layer) -> list[str]:
    """Fill ``net`` with the weights of a file; only the head may be missing or of other classes.

    Takes a ``.pdparams`` file (a bare state dict, or one of this repository) and safetensors under
    Paddle's or torch's names; torch's are renamed and its linear matrices transposed. A ``.pth`` of
    torch must become safetensors first: reading it needs torch.

    Returns:
        Names of the weights of ``net`` that were not filled: those of a new head, or none.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: no weights, or a weight below the head that does not fit.
    """
    arrays = to_numpy(load_foreign_weights(path))
    if any(name.endswith("running_mean") for name in arrays):
        arrays = names.to_paddle(arrays, names.linear_names(arrays))
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

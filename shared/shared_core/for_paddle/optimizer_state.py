"""An optimizer's state under the model's own weight names instead of Paddle's generated ones.

Paddle names a moment after its parameter, and the parameter by a counter of the process: the
second model of a process has ``linear_1.w_0_moment1_0``, and a fresh process that resumes it looks
for ``linear_0.w_0_moment1_0`` and fails. K-fold training makes exactly this. Building every fold
inside ``paddle.utils.unique_name.guard()`` avoids it; the names used here make it unnecessary.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from paddle import nn

from shared_core.checkpoints import CheckpointError

_COUNTED = re.compile(r"_\d+$")


def _weight_names(layers: Mapping[str, nn.Layer]) -> dict[str, str]:
    """Generated name to ``part.weight`` for every parameter of the layers."""
    return {
        parameter.name: f"{part}.{name}"
        for part, layer in layers.items()
        for name, parameter in layer.named_parameters()
    }


def _owner(key: str, generated: Mapping[str, str]) -> str:
    """The parameter that an entry belongs to: the longest name that it starts with."""
    owners = [name for name in generated if key.startswith(f"{name}_")]
    if not owners:
        raise CheckpointError(
            f"optimizer: {key} belongs to no saved model; save the model that it trains beside it"
        )
    return max(owners, key=len)


def optimizer_state(
    optimizer: paddle.optimizer.Optimizer, layers: Mapping[str, nn.Layer]
) -> dict[str, Any]:
    """The optimizer's state as arrays and plain values, independent of generated names.

    Args:
        optimizer: any of Paddle's.
        layers: by name, the models whose parameters it trains.

    Raises:
        CheckpointError: it trains a parameter of another model.
    """
    generated = _weight_names(layers)
    moments, masters = {}, {}
    state = optimizer.state_dict()
    scheduler = state.pop("LR_Scheduler", None)
    for name, value in state.pop("master_weights", {}).items():
        masters[generated[name]] = np.array(value)
    for key, value in state.items():
        owner = _owner(key, generated)
        kind = _COUNTED.sub("", key[len(owner) + 1 :])
        moments[f"{generated[owner]}/{kind}"] = np.array(value)
    return {
        "moments": moments,
        "masters": masters,
        "scheduler": scheduler,
        "learning_rate": None if scheduler is not None else float(optimizer.get_lr()),
    }


def load_optimizer_state(
    optimizer: paddle.optimizer.Optimizer,
    state: Mapping[str, Any],
    layers: Mapping[str, nn.Layer],
) -> None:
    """Put :func:`optimizer_state` back, into an optimizer of this process' names.

    Args:
        optimizer: built like the saved one; may have made steps or not.
        state: what was saved.
        layers: by the same names, the models whose parameters it trains.

    Raises:
        CheckpointError: a moment of a weight that is not there or has another shape.
    """
    parameters = {
        f"{part}.{name}": parameter
        for part, layer in layers.items()
        for name, parameter in layer.named_parameters()
    }
    existing = {
        (owner, kind): variable.name
        for kind, variables in optimizer._accumulators.items()
        for owner, variable in variables.items()
    }
    counters = paddle.base.unique_name.generator.ids
    renamed: dict[str, Any] = {}
    for key, value in state["moments"].items():
        weight, _, kind = key.rpartition("/")
        if weight not in parameters:
            raise CheckpointError(f"optimizer: no weight {weight} for its stored {kind}")
        parameter = parameters[weight]
        if value.size > 1 and list(value.shape) != list(parameter.shape):
            raise CheckpointError(
                f"optimizer: {kind} of {weight} has shape {value.shape}, "
                f"expected {tuple(parameter.shape)}"
            )
        stem = f"{parameter.name}_{kind}"
        name = existing.get((parameter.name, kind), f"{stem}_{counters.get(stem, 0)}")
        renamed[name] = paddle.to_tensor(value)
    if state["masters"]:
        renamed["master_weights"] = {
            parameters[weight].name: paddle.to_tensor(value)
            for weight, value in state["masters"].items()
        }
    if state["scheduler"] is not None:
        renamed["LR_Scheduler"] = dict(state["scheduler"])
    try:
        optimizer.set_state_dict(renamed)
        if state["scheduler"] is None:
            optimizer.set_lr(state["learning_rate"])
    except (AssertionError, RuntimeError) as error:
        raise CheckpointError(
            "optimizer: its stored state is that of another optimizer or scheduler"
        ) from error

"""Checkpoints of Paddle: weights with facts, and the whole state of a run; no code is unpickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from shared_core import checkpoints
from shared_core.checkpoints import CheckpointError, neutral, pickle_arrays
from shared_core.for_paddle.optimizer_state import load_optimizer_state, optimizer_state
from shared_core.for_paddle.seeds import capture_rng, restore_rng

RUN_SCHEMA = "smallvision-run/1"
Arrays = dict[str, checkpoints.Array]
Weights = dict[str, Tensor]


def unwrap(model: nn.Layer) -> nn.Layer:
    """The model inside ``paddle.DataParallel``."""
    return model._layers if isinstance(model, paddle.DataParallel) else model


# -- weights with facts -------------------------------------------------------------------------


def to_numpy(weights: Mapping[str, Any]) -> Arrays:
    """Tensors (or arrays) as NumPy arrays of their own.

    Raises:
        CheckpointError: bfloat16, which NumPy has not (Paddle would give 16-bit integers).
    """
    for name, value in weights.items():
        if "bfloat16" in str(value.dtype):
            raise CheckpointError(f"{name} is bfloat16, which NumPy has not; convert it to float32")
    return {name: np.array(value) for name, value in weights.items()}


def from_numpy(arrays: Mapping[str, checkpoints.Array]) -> Weights:
    """The same weights as tensors."""
    return {name: paddle.to_tensor(array) for name, array in arrays.items()}


def save_checkpoint(
    path: str | Path, model_state: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write weights and facts, all or nothing.

    A path that ends in ``.safetensors`` gets that format; any other gets Paddle's, as
    ``{"model": weights, "facts": JSON text}``, which ``paddle.load(path)["model"]`` opens too.

    Args:
        path: the file.
        model_state: a ``state_dict()``, on any device.
        facts: from :func:`shared_core.checkpoints.make_facts`.

    Returns:
        The facts as written, with the ``sha256`` of the weights.

    Raises:
        CheckpointError: facts of another schema, or a dtype that the format has not.
        OSError: the file cannot be written; an older one is untouched.
    """
    arrays = to_numpy(model_state)
    names = checkpoints.plain_names(list(arrays))
    arrays = {names[name]: array for name, array in arrays.items()}
    written = {**facts, "sha256": checkpoints.weights_sha256(arrays)}
    form = neutral if Path(path).suffix == ".safetensors" else pickle_arrays
    form.write(path, arrays, written)
    return written


def load_checkpoint(
    path: str | Path, *, project: str | None = None, architecture: str | None = None
) -> tuple[Weights, dict[str, Any]]:
    """Weights and facts of a file that :func:`save_checkpoint` wrote.

    Args:
        path: Paddle's format or safetensors; told apart by content.
        project: the project that the file must be of; None takes any.
        architecture: likewise.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: hostile, damaged, of torch, of another schema, project, architecture.
    """
    path = checkpoints.readable_file(path)
    form = neutral if _is_safetensors(path) else pickle_arrays
    arrays, facts = form.read(path, project=project, architecture=architecture)
    if facts["framework"] == "torch":
        raise CheckpointError(
            f"{path}: its weights carry torch's names; convert it with tools/convert.py"
        )
    return from_numpy(arrays), facts


def load_into(
    model: nn.Layer,
    path: str | Path,
    *,
    project: str | None = None,
    architecture: str | None = None,
) -> dict[str, Any]:
    """Load ``path`` into ``model`` (wrapped or not); every weight must fit.

    Returns:
        The facts of the file.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: as :func:`load_checkpoint`, or weights that do not fit; the first of
            them are named and the model is as it was.
    """
    weights, facts = load_checkpoint(path, project=project, architecture=architecture)
    fit_into(model, weights, path=path)
    return facts


def fit_into(model: nn.Layer, weights: Mapping[str, Any], *, path: str | Path) -> None:
    """Put ``weights`` into ``model`` when every one fits; ``path`` is for the message.

    Paddle itself only warns about a weight that does not fit, and keeps what it had. Floating
    weights take the model's precision, as torch has it.

    Raises:
        CheckpointError: missing, unexpected or misshaped weights, or whole numbers for floating
            ones; the model is as it was.
    """
    plain = unwrap(model)
    own = plain.state_dict()
    checkpoints.check_fit(
        path,
        model={name: list(value.shape) for name, value in own.items()},
        weights={name: list(value.shape) for name, value in weights.items()},
    )
    fitting = {}
    for name, value in weights.items():
        tensor = value if isinstance(value, paddle.Tensor) else paddle.to_tensor(value)
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(
                f"{path}: weight {name} is {tensor.dtype}, expected {own[name].dtype}"
            )
        fitting[name] = tensor.astype(own[name].dtype)
    missing, unexpected = plain.set_state_dict(fitting)
    if missing or unexpected:
        raise CheckpointError(f"{path}: Paddle left out {missing or unexpected}")


def load_foreign_weights(path: str | Path) -> Weights:
    """Weights of a file that is not of this repository: what ``paddle.save`` or others wrote.

    Reads safetensors, a bare state dict, or one under ``model`` or ``state_dict``. There are no
    facts, so nothing tells what the weights are.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: hostile, damaged, or no state dict in it.
    """
    path = checkpoints.readable_file(path)
    if _is_safetensors(path):
        arrays = neutral.read_arrays(path)[0]
    else:
        content = pickle_arrays.read_pickle(path)
        if isinstance(content, dict):
            for key in ("model", "state_dict"):
                if isinstance(content.get(key), dict):
                    content = content[key]
                    break
        arrays = pickle_arrays.state_arrays(path, content)
    if not arrays:
        raise CheckpointError(f"{path}: holds no weights, expected named arrays")
    names = checkpoints.plain_names(list(arrays))
    return from_numpy({names[name]: array for name, array in arrays.items()})


def _is_safetensors(path: Path) -> bool:
    """Eight bytes of the header's length, little-endian, then a JSON object.

    A pickle may begin with the same byte as a length, ``\\x80``. But no header is 2**40 bytes long,
    and no pickle of arrays has three zeros and a brace there: protocols 4 and 5 have the upper
    bytes of a frame's length, the older ones the first instructions.
    """
    with path.open("rb") as file:
        return file.read(9)[5:] == b"\0\0\0{"


# -- the whole state of a run -------------------------------------------------------------------


def _layers(parts: Mapping[str, Any]) -> dict[str, nn.Layer]:
    return {name: unwrap(part) for name, part in parts.items() if isinstance(part, nn.Layer)}


def _plain(value: Any) -> Any:
    """Tensors as arrays, all through the containers."""
    if isinstance(value, Tensor):
        return to_numpy({"": value})[""]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_plain(item) for item in value])
    return value


def save_run_state(
    path: str | Path,
    parts: Mapping[str, Any],
    *,
    counters: Mapping[str, Any],
    rng: list[dict[str, Any]] | None = None,
) -> None:
    """Write everything that a run needs to go on exactly where it is.

    Args:
        path: the file.
        parts: by name: models, optimizer (beside the models it trains), scheduler, sampler...
            whatever has ``state_dict`` and ``set_state_dict`` or ``load_state_dict``.
        counters: plain JSON: epoch, step, best metric...
        rng: random states of all processes in order of rank; None takes this process' own.

    Raises:
        CheckpointError: a part whose state holds more than tensors and plain values.
        OSError: the file cannot be written; an older one is untouched.
    """
    layers = _layers(parts)
    states: dict[str, Any] = {}
    for name, part in sorted(parts.items()):
        if isinstance(part, paddle.optimizer.Optimizer):
            states[name] = optimizer_state(part, layers)
        elif isinstance(part, nn.Layer):
            states[name] = to_numpy(layers[name].state_dict())
        else:
            states[name] = _plain(part.state_dict())
    content = {
        "schema": RUN_SCHEMA,
        "parts": states,
        "counters": json.dumps(dict(counters)),
        "rng": [capture_rng()] if rng is None else rng,
    }
    pickle_arrays.write_pickle(path, content)


def load_run_state(path: str | Path, parts: Mapping[str, Any], *, rank: int = 0) -> dict[str, Any]:
    """Put a saved run back into ``parts`` and into the global random generators.

    Args:
        path: what :func:`save_run_state` wrote.
        parts: the same names as were saved.
        rank: whose random state to take.

    Returns:
        The counters.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: damaged, hostile, other parts, weights that do not fit, other world size.
    """
    content = pickle_arrays.read_pickle(path)
    if not isinstance(content, dict) or content.get("schema") != RUN_SCHEMA:
        got = str(content.get("schema"))[:60] if isinstance(content, dict) else "none"
        raise CheckpointError(f"{path}: schema is {got!r}, expected {RUN_SCHEMA!r}")
    states, rng = content.get("parts"), content.get("rng")
    if not isinstance(states, dict) or not isinstance(rng, list):
        raise CheckpointError(f"{path}: holds no run state, expected what save_run_state wrote")
    if set(states) != set(parts):
        raise CheckpointError(
            f"{path}: holds the parts {', '.join(sorted(states))}, "
            f"expected {', '.join(sorted(parts))}"
        )
    if not 0 <= rank < len(rng):
        raise CheckpointError(
            f"{path}: was saved by {len(rng)} processes, this one is number {rank}"
        )
    layers = _layers(parts)
    for name, layer in layers.items():
        fit_into(layer, states[name], path=f"{path} ({name})")
    for name, part in parts.items():
        if name in layers:
            continue
        try:
            if isinstance(part, paddle.optimizer.Optimizer):
                load_optimizer_state(part, states[name], layers)
            elif hasattr(part, "load_state_dict"):
                part.load_state_dict(states[name])
            else:
                part.set_state_dict(states[name])
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{path}: part {name} does not fit: {reason}") from error
    try:
        restore_rng(rng[rank])
        counters: dict[str, Any] = json.loads(content["counters"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: random states or counters are damaged") from error
    return counters

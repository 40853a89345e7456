"""Checkpoints of torch: weights with facts, and the whole state of a run; no code is unpickled."""

import errno
import json
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shared_core import checkpoints
from shared_core.checkpoints import CheckpointError, neutral
from shared_core.for_torch.seeds import capture_rng, restore_rng

RUN_SCHEMA = "smallvision-run/1"
Weights = dict[str, Tensor]


class Stateful(Protocol):
    """What a part of a run must offer: a model, optimizer, scheduler, EMA, sampler, precision..."""

    def state_dict(self) -> Any:
        """Everything that the part needs to go on."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Go on from what ``state_dict`` returned."""
        ...


# -- files --------------------------------------------------------------------------------------


def _write(path: str | Path, content: Any) -> None:
    def save(scratch: Path) -> None:
        with scratch.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # how torch reports a full disk
                raise OSError("the file could not be written whole") from error

    checkpoints.atomic_write(path, save)


def _read(path: str | Path) -> Any:
    path = checkpoints.readable_file(path)
    try:
        with warnings.catch_warnings():  # about pickles of odd versions: they are refused below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # EINVAL is what seeking in a file cut short gives
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "refused, it holds more than tensors and plain values"
        else:
            reason = f"no readable torch file ({type(error).__name__})"
        raise CheckpointError(f"{path}: {reason}") from error


def _tensor_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    values: Any = flat.view(torch.uint8).numpy()
    return memoryview(values)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of weights; equal to that of the same NumPy arrays under the same names."""
    return checkpoints.digest(
        (name, str(t.dtype).removeprefix("torch."), tuple(t.shape), _tensor_bytes(t))
        for name, t in weights.items()
    )


def _own_weights(path: str | Path, weights: Mapping[str, Any]) -> Weights:
    """The weights on the CPU, each in storage of its own, under names without wrapper prefixes."""
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}, expected a tensor"
            )
    names = checkpoints.plain_names(list(weights))
    return {
        names[name]: value.detach().to("cpu", copy=True).contiguous()
        for name, value in weights.items()
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


# -- weights with facts -------------------------------------------------------------------------


def save_checkpoint(
    path: str | Path, model_state: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write weights and facts, all or nothing.

    A path that ends in ``.safetensors`` gets that format; any other gets torch's, as
    ``{"model": weights, "facts": JSON text}``, which ``torch.load(path)["model"]`` opens too.

    Args:
        path: the file.
        model_state: a ``state_dict()``, on any device, wrapped or not.
        facts: from :func:`shared_core.checkpoints.make_facts`.

    Returns:
        The facts as written, with the ``sha256`` of the weights.

    Raises:
        CheckpointError: facts of another schema, or a dtype that the format has not.
        OSError: the file cannot be written; an older one is untouched.
    """
    checkpoints.check_facts(path, dict(facts))
    weights = _own_weights(path, model_state)
    written = {**facts, "sha256": weights_sha256(weights)}
    if Path(path).suffix == ".safetensors":
        neutral.write(path, to_numpy(weights), written)
    else:
        _write(path, {"model": weights, "facts": checkpoints.facts_to_json(written)})
    return written


def load_checkpoint(
    path: str | Path, *, project: str | None = None, architecture: str | None = None
) -> tuple[Weights, dict[str, Any]]:
    """Weights (on the CPU) and facts of a file that :func:`save_checkpoint` wrote.

    Args:
        path: torch's format or safetensors; told apart by content.
        project: the project that the file must be of; None takes any.
        architecture: likewise.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: hostile, damaged, of Paddle, of another schema, project, architecture.
    """
    path = checkpoints.readable_file(path)
    if _is_safetensors(path):
        arrays, facts = neutral.read(path, project=project, architecture=architecture)
        weights = from_numpy(arrays)
    else:
        content = _read(path)
        text = content.get("facts") if isinstance(content, dict) else None
        facts = checkpoints.facts_from_json(path, text)
        checkpoints.check_facts(path, facts, project=project, architecture=architecture)
        weights = _tensors(path, content.get("model"))
        checkpoints.check_sha256(path, facts, weights_sha256(weights))
    if facts["framework"] == "paddle":
        raise CheckpointError(
            f"{path}: its weights carry Paddle's names; convert it with tools/convert.py"
        )
    return weights, facts


def load_into(
    model: nn.Module,
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


def fit_into(model: nn.Module, weights: Mapping[str, Tensor], *, path: str | Path) -> None:
    """Put ``weights`` into ``model`` when every one fits; ``path`` is for the message.

    Raises:
        CheckpointError: missing, unexpected or misshaped weights; the model is as it was.
    """
    plain = unwrap(model)
    checkpoints.check_fit(
        path,
        model={name: value.shape for name, value in plain.state_dict().items()},
        weights={name: value.shape for name, value in weights.items()},
        model_floats={n: v.is_floating_point() for n, v in plain.state_dict().items()},
        weight_floats={n: v.is_floating_point() for n, v in weights.items()},
    )
    plain.load_state_dict(weights)


def load_foreign_weights(path: str | Path) -> Weights:
    """Weights of a file that is not of this repository: what papers publish.

    Reads safetensors, a bare state dict, or one under ``model``, ``state_dict`` or ``model_state``.
    Prefixes of wrappers are taken off. There are no facts, so nothing tells what the weights are.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: hostile, damaged, or no state dict in it.
    """
    path = checkpoints.readable_file(path)
    if _is_safetensors(path):
        return _own_weights(path, from_numpy(neutral.read_arrays(path)[0]))
    content = _read(path)
    if isinstance(content, dict):
        for key in ("model", "state_dict", "model_state"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    return _own_weights(path, _tensors(path, content))


def _is_safetensors(path: Path) -> bool:
    """Eight bytes of length and a JSON object; no torch file starts like that."""
    with path.open("rb") as file:
        return file.read(9)[8:9] == b"{"


def _tensors(path: str | Path, content: object) -> Weights:
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds no weights, expected a dict of named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor"
            )
    return dict(content)


def to_numpy(weights: Mapping[str, Tensor]) -> dict[str, checkpoints.Array]:
    """The same weights as NumPy arrays.

    Raises:
        CheckpointError: a dtype that NumPy has not (bfloat16, float8).
    """
    try:
        return {name: value.detach().cpu().numpy() for name, value in weights.items()}
    except TypeError as error:
        raise CheckpointError(f"weights have a dtype that NumPy has not: {error}") from error


def from_numpy(arrays: Mapping[str, checkpoints.Array]) -> Weights:
    """The same weights as tensors, each with memory of its own."""
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


# -- the whole state of a run -------------------------------------------------------------------


def _plain(value: Any, where: str) -> Any:
    """``value`` as ``weights_only`` can read it back; refuse what it cannot, before it is lost."""
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (bool, int, float, str, bytes, complex):
        return value
    if isinstance(value, float):  # subclasses of float, such as NumPy's
        return float(value)
    if isinstance(value, Counter | OrderedDict):
        return type(value)({k: _plain(v, f"{where}.{k}") for k, v in value.items()})
    if isinstance(value, Mapping):
        return {_plain(k, where): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise CheckpointError(
        f"run state: {where} is a {type(value).__name__}, expected tensors and plain values"
    )


def save_run_state(
    path: str | Path,
    parts: Mapping[str, Stateful],
    *,
    counters: Mapping[str, Any],
    rng: list[dict[str, Any]] | None = None,
) -> None:
    """Write everything that a run needs to go on exactly where it is.

    Args:
        path: the file.
        parts: by name: models, optimizer, scheduler, :class:`Precision`, EMA, sampler... whatever
            has ``state_dict`` and ``load_state_dict``. Wrapped models are unwrapped.
        counters: plain JSON: epoch, step, best metric...
        rng: random states of all processes in order of rank; None takes this process' own.

    Raises:
        CheckpointError: a part whose state holds more than tensors and plain values.
        OSError: the file cannot be written; an older one is untouched.
    """
    states = {
        name: _plain(_stateful(part).state_dict(), name) for name, part in sorted(parts.items())
    }
    _write(
        path,
        {
            "schema": RUN_SCHEMA,
            "parts": states,
            "counters": json.dumps(dict(counters)),
            "rng": [capture_rng()] if rng is None else rng,
        },
    )


def load_run_state(
    path: str | Path, parts: Mapping[str, Stateful], *, rank: int = 0
) -> dict[str, Any]:
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
    content = _read(path)
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
    for name, part in parts.items():  # look at all models before anything changes
        if isinstance(part, nn.Module):
            checkpoints.check_fit(
                f"{path} ({name})",
                model={k: v.shape for k, v in unwrap(part).state_dict().items()},
                weights={k: v.shape for k, v in states[name].items()},
            )
    for name, part in parts.items():
        try:
            _stateful(part).load_state_dict(states[name])
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{path}: part {name} does not fit: {reason}") from error
    try:
        restore_rng(rng[rank])
        counters: dict[str, Any] = json.loads(content["counters"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: random states or counters are damaged") from error
    return counters


def _stateful(part: Stateful) -> Stateful:
    return unwrap(part) if isinstance(part, nn.Module) else part

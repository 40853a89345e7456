"""What has to be known beside a network's file: ``model.json``, the same for every project."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from shared_core.datasets.views.augment import EvalView
    from shared_core.datasets.views.evaluation import LetterboxView

SCHEMA = "smallvision.model/1"
FACTS_FILE = "model.json"
METADATA_KEY = "smallvision.facts"  # of the same facts inside an ONNX file
TASKS = {"classify": ("softmax", "sigmoid"), "embed": ("unit", "none")}  # their activations
ONNX, INT8 = "onnx", "onnx-int8"  # names of the core's own runtimes in ``files``

Triple = tuple[float, float, float]


class ModelError(ValueError):
    """A model folder or file that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Exits:
    """The early exits of a network: where they are, what they cost, who leaves.

    Attributes:
        after: the blocks, counted from 0, that an exit follows; G of them, increasing.
        costs: multiply-accumulates of an image that leaves at each exit, the final head last: G+1.
        plain_cost: the same when no exit is looked at.
        learned_gates: whether the gates were trained, so that the rules ``gate`` and ``jei`` mean
            something.
        policy: state of the exit policy to use when none is asked for (see
            ``deploy.exit_policy.ExitPolicy.state_dict``); None if nothing is known.
        points: states by wish: ``careful``, ``balanced``, ``fast``.
        rules: the balanced state of each kind of rule.
    """

    after: tuple[int, ...]
    costs: tuple[float, ...]
    plain_cost: float
    learned_gates: bool = False
    policy: Mapping[str, Any] | None = None
    points: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from shared_core.deploy.exit_policy import ExitPolicy

        _set(self, "after", tuple(_whole("exits.after", v, 0) for v in _list(self, "after")))
        _set(self, "costs", tuple(_number("exits.costs", v) for v in _list(self, "costs")))
        _number("exits.plain_cost", self.plain_cost)
        if not isinstance(self.learned_gates, bool):
            raise ModelError(f"exits.learned_gates is {self.learned_gates!r}, expected true, false")
        if list(self.after) != sorted(set(self.after)) or len(self.costs) != len(self.after) + 1:
            raise ModelError(
                f"exits.after is {list(self.after)} with {len(self.costs)} costs, expected "
                "increasing blocks and one cost more than there are exits"
            )
        states = {"policy": self.policy} if self.policy is not None else {}
        states |= {f"points.{k}": v for k, v in _mapping("exits.points", self.points).items()}
        states |= {f"rules.{k}": v for k, v in _mapping("exits.rules", self.rules).items()}
        for name, state in states.items():
            try:
                ExitPolicy.from_state(state).check(len(self.after))
            except (ValueError, TypeError, KeyError) as error:
                raise ModelError(f"exits.{name}: {error}") from None


@dataclass(frozen=True)
class ModelFacts:
    """Everything that a predictor, a service and a reader must know of a finished network.

    Attributes:
        project: the package that made it.
        architecture: the name under which that package builds the network.
        class_names: in the order of the outputs; empty for the task ``embed``.
        input_size: height and width in pixels of what the network sees.
        view: settings of the evaluation view (``view.settings()``), so that a predictor resizes
            exactly as evaluation did; :meth:`make_view` makes it again.
        mean, std: of the normalisation, RGB, fractions of 255.
        task: ``classify`` (probabilities) or ``embed`` (features).
        activation: what turns the network's outputs into answers: ``softmax`` or ``sigmoid``; for
            ``embed`` ``unit`` (features of length 1) or ``none``.
        temperature: divides the logits before the activation; above 0.
        bgr: whether the network wants its channels blue, green, red. Images are RGB everywhere;
            mean and std are in RGB order.
        files: file names in the folder by runtime: one file, or a segment for each exit and the
            final head. ``onnx`` and ``onnx-int8`` are the core's, others the project's.
        default: which runtime of ``files`` is taken when none is asked for.
        sha256: of each file, hex, so that a damaged or swapped one is noticed.
        exits: of a network with early exits.
        unknown_threshold: an image whose largest probability is below is "none of these"; None if
            nobody set one.
        costs: ``macs``, ``parameters``, and ``bytes`` by file name, counted on disk.
        measured: accuracy with its interval, latency, agreement, and the hardware.
        provenance: data and its split hash, teacher, initial weights with licence, command,
            versions, sha256 of the checkpoint.
        more: what only the project reads.

    Raises:
        ModelError: a value that makes no sense; the message names it, what it is and what was
            expected.
    """

    project: str
    architecture: str
    class_names: tuple[str, ...]
    input_size: tuple[int, int]
    view: Mapping[str, Any]
    mean: Triple
    std: Triple
    task: str = "classify"
    activation: str = "softmax"
    temperature: float = 1.0
    bgr: bool = False
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    default: str = ONNX
    sha256: Mapping[str, str] = field(default_factory=dict)
    exits: Exits | None = None
    unknown_threshold: float | None = None
    costs: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("project", "architecture"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ModelError(f"{name} is {getattr(self, name)!r}, expected a name")
        self._check_classes()
        self._check_input()
        self._check_answers()
        self._check_files()
        for name in ("costs", "measured", "provenance", "more"):
            _mapping(name, getattr(self, name))

    def _check_classes(self) -> None:
        if self.task not in TASKS:
            raise ModelError(f"task is {self.task!r}, expected one of {', '.join(TASKS)}")
        names = tuple(_list(self, "class_names"))
        _set(self, "class_names", names)
        if not all(isinstance(name, str) and name for name in names):
            raise ModelError("class_names holds something that is no name")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ModelError(f"class_names holds {twice!r} twice")
        if bool(names) != (self.task == "classify"):
            expected = "at least one" if self.task == "classify" else "none"
            raise ModelError(f"class_names: {len(names)} for task {self.task}, expected {expected}")

    def _check_input(self) -> None:
        from shared_core.datasets.views.evaluation import rebuild_view

        size = tuple(_whole("input_size", side, 1) for side in _list(self, "input_size"))
        mean = tuple(_number("mean", v) for v in _list(self, "mean"))
        std = tuple(_number("std", v) for v in _list(self, "std"))
        if len(size) != 2:
            raise ModelError(f"input_size is {list(size)}, expected height and width in pixels")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ModelError(f"mean {mean}, std {std}: expected three of each and std above 0")
        for name, value in (("input_size", size), ("mean", mean), ("std", std)):
            _set(self, name, value)
        if not isinstance(self.bgr, bool):
            raise ModelError(f"bgr is {self.bgr!r}, expected true or false")
        try:
            view = rebuild_view(_mapping("view", self.view))
        except ValueError as error:
            raise ModelError(f"view: {error}") from None
        if view.size != size:
            raise ModelError(f"view makes {view.size}, expected input_size {size}")
        _set(self, "view", view.settings())

    def _check_answers(self) -> None:
        if self.activation not in TASKS[self.task]:
            raise ModelError(
                f"activation is {self.activation!r}, expected {' or '.join(TASKS[self.task])} "
                f"for task {self.task}"
            )
        if _number("temperature", self.temperature) <= 0:
            raise ModelError(f"temperature is {self.temperature}, expected more than 0")
        if self.unknown_threshold is not None:
            limit = _number("unknown_threshold", self.unknown_threshold)
            if not 0 <= limit <= 1:
                raise ModelError(f"unknown_threshold is {limit}, expected 0 to 1")
        if self.exits is not None and not isinstance(self.exits, Exits):
            raise ModelError("exits is not described, expected Exits")

    def _check_files(self) -> None:
        files = {
            k: tuple(_list_of("files." + k, v)) for k, v in _mapping("files", self.files).items()
        }
        for runtime, names in files.items():
            for name in names:
                # Names alone: a description must not reach outside its folder.
                if not isinstance(name, str) or not _is_file_name(name):
                    raise ModelError(f"files.{runtime} holds {name!r}, expected a file's name")
            parts = len(self.exits.costs) if self.exits is not None else 1
            if not names or (runtime in (ONNX, INT8) and len(names) != parts):
                raise ModelError(f"files.{runtime} names {len(names)} files, expected {parts}")
        if files and self.default not in files:
            raise ModelError(f"default is {self.default!r}, expected one of {', '.join(files)}")
        for name, digest in _mapping("sha256", self.sha256).items():
            if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
                raise ModelError(f"sha256.{name} is {digest!r}, expected 64 hexadecimal digits")
        _set(self, "files", files)

    def make_view(self) -> EvalView | LetterboxView:
        """The view that evaluation takes of an image."""
        from shared_core.datasets.views.evaluation import rebuild_view

        return rebuild_view(self.view)

    def normalise(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 RGB ``(N, H, W, 3)`` to what the network takes: float32 ``(N, 3, H, W)``."""
        scale, shift = self.scale_and_shift()
        normal = images * scale + shift
        if self.bgr:
            normal = normal[..., ::-1]
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))

    def scale_and_shift(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """``(x / 255 - mean) / std`` as ``x * scale + shift``, each float32 ``(3,)``, RGB."""
        spread = np.asarray(self.std, np.float64)
        scale = (1 / (255 * spread)).astype(np.float32)
        return scale, (-np.asarray(self.mean, np.float64) / spread).astype(np.float32)

    def check_class_names(self, expected: Sequence[str], *, who: str) -> None:
        """Refuse other classes than ``expected``, by name and in order.

        Args:
            who: has the expected ones, for the message.

        Raises:
            ModelError: they differ; the first difference is named.
        """
        got, wanted = self.class_names, tuple(expected)
        if got == wanted:
            return
        if len(got) != len(wanted):
            what = f"{len(got)} classes against {len(wanted)}"
            odd = sorted(set(got) ^ set(wanted))
            what += f", {odd[0]!r} is in one alone" if odd else ""
        else:
            k = next(k for k, pair in enumerate(zip(got, wanted, strict=True)) if len({*pair}) > 1)
            what = f"class {k} is {got[k]!r} against {wanted[k]!r}"
        raise ModelError(f"the model has other classes than {who}: {what}")

    def replaced(self, **changes: Any) -> ModelFacts:
        """A copy with some entries changed, checked again."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON that :meth:`from_dict` reads.

        Raises:
            ModelError: a value that JSON cannot hold, NaN and infinities among them.
        """
        try:
            text = json.dumps({"schema": SCHEMA, **asdict(self)}, allow_nan=False, default=_plain)
        except (TypeError, ValueError) as error:
            raise ModelError(f"facts that JSON cannot hold: {error}") from None
        values: dict[str, Any] = json.loads(text)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str | Path = FACTS_FILE) -> ModelFacts:
        """What :meth:`as_dict` wrote.

        Args:
            where: the file, for messages.

        Raises:
            ModelError: another schema, a missing or unknown entry, or a value that makes no sense.
        """
        if not isinstance(values, Mapping) or values.get("schema") != SCHEMA:
            got = values.get("schema") if isinstance(values, Mapping) else type(values).__name__
            raise ModelError(f"{where} has the schema {got!r}, expected {SCHEMA!r}")
        try:
            kept = {name: value for name, value in values.items() if name != "schema"}
            _check_names(cls, kept, "")
            if kept.get("exits") is not None:
                exits = dict(_mapping("exits", kept["exits"]))
                _check_names(Exits, exits, "exits.")
                kept["exits"] = Exits(**exits)
            return cls(**kept)
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from None


def read_facts(path: str | Path) -> ModelFacts:
    """The facts of a model folder, or of a ``model.json``.

    Raises:
        FileNotFoundError: no such file.
        ModelError: it describes no model.
    """
    file = Path(path)
    file = file / FACTS_FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: expected a folder that an export wrote")
    return facts_from_text(file.read_bytes(), where=file)


def facts_from_text(text: str | bytes, *, where: str | Path) -> ModelFacts:
    """The facts of a ``model.json``'s content, or of an ONNX file's metadata.

    Raises:
        ModelError: it describes no model.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ModelError(f"{where} is no JSON: {error}") from None
    return ModelFacts.from_dict(values, where=where)


def write_facts(folder: str | Path, facts: ModelFacts) -> Path:
    """Write ``model.json`` so that a crash leaves the old one or the new one; returns its path.

    Raises:
        OSError: it cannot be written.
    """
    from shared_core.checkpoints.atomic import atomic_write

    path = Path(folder) / FACTS_FILE
    text = json.dumps(facts.as_dict(), indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    return path


def _check_names(cls: type, values: Mapping[str, Any], prefix: str) -> None:
    known = {one.name for one in fields(cls)}
    if missing := known - values.keys():
        raise ModelError(f"lacks {prefix}{sorted(missing)[0]}")
    if unknown := values.keys() - known:
        raise ModelError(f"holds {prefix}{sorted(unknown)[0]}, which this version does not know")


def _set(owner: object, name: str, value: object) -> None:
    object.__setattr__(owner, name, value)


def _is_file_name(name: str) -> bool:
    both = {PurePosixPath(name).name, PureWindowsPath(name).name}
    return both == {name} and name not in ("", "..")


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, and paths, as JSON holds them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{value!r} is {type(value).__name__}")


def _list(owner: object, name: str) -> Sequence[Any]:
    return _list_of(name, getattr(owner, name))


def _list_of(name: str, value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ModelError(f"{name} is {value!r}, expected a list")
    return value


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ModelError(f"{name} is {type(value).__name__}, expected an object with names")
    return value


def _whole(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ModelError(f"{name} holds {value!r}, expected a whole number of at least {low}")
    return int(value)


def _number(name: str, value: object) -> float:
    kinds = int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise ModelError(f"{name} holds {value!r}, expected a finite number")
    return float(value)

"""What the parts of the journey hand to one another, as frozen dataclasses and as JSON files.

The folder of a run: ``data/check.json`` (:class:`DataCheck`) with ``data/split.json`` and
``data/features.npy``; ``plan.json`` (:class:`Plan`); ``candidates/<name>/job.json`` (:class:`Job`),
``log.txt`` and ``model/``; ``floors.json`` (:class:`Floors`); ``judged.json`` (:class:`Judged`
rows); ``choice.json`` (:class:`Choice`); ``winner/``, ``report.html``, ``result.json``.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from shared_core.runs.json_files import read_object, write_json

T = TypeVar("T")

CHECK_FILE, SPLIT_FILE = Path("data", "check.json"), Path("data", "split.json")
FEATURES_FILE = Path("data", "features.npy")
PLAN_FILE, FLOORS_FILE = Path("plan.json"), Path("floors.json")
JUDGED_FILE, CHOICE_FILE = Path("judged.json"), Path("choice.json")
CANDIDATES, JOB_FILE, LOG_FILE = Path("candidates"), "job.json", "log.txt"
WINNER = Path("winner")
FLOAT, INT8 = "onnx", "onnx-int8"  # the forms, by the names of model.json's ``files``
FORMS = {FLOAT: "float", INT8: "int8", "openvino": "float OpenVINO",
         "openvino-int8": "int8 OpenVINO", "paddle": "float Paddle"}  # fmt: skip


TINY = 25  # images of a class; fewer say little about it
FINDINGS = {
    "left_out": "files left out",
    "copy_exact": "groups of exact copies",
    "copy_near": "groups of near copies",
    "leak": "files of training with a copy in another part",
    "tiny_class": f"classes of fewer than {TINY} images",
    "label": "suspicious labels",
}


@dataclass(frozen=True)
class Finding:
    """One thing that the data check found: files, what is the matter, one sentence.

    Attributes:
        kind: a key of ``FINDINGS``.
        paths: below the data's root; at most a few.
        text: for people.
    """

    kind: str
    paths: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class DataCheck:
    """What was read of the folder, and how it was split (``data/check.json``).

    Attributes:
        name, kind, root: as of the core's ``PreparedData``; kind is real, subset or built-in.
        classes: names in the order of the outputs.
        counts: part -> images of each class, in that order.
        split_hash: of ``data/split.json``.
        given: whether the folder (or ``--split``) said itself who learns and who judges.
        pixels: short side of the images, pixels (the median of a sample).
        found: number of each kind of finding; ``findings`` holds the first ones of each kind.
        notes: sentences for the terminal and the page.
        pictures: contact sheets beside check.json: (file name, caption).
        seconds: what the check took.
        files: number of files by what became of them (used, duplicate, unreadable ...).
        ignored: number of files that are not named like images, by ending.
        sizes: images of each "height x width", the most frequent first.
        imbalance: images of the largest class over those of the smallest.
        labels: what the neighbours in trained features say: ``agree`` (a fraction), ``asked``
            neighbours, ``network``, ``input_size``, ``seconds``; empty where nothing was asked.
    """

    name: str
    kind: str
    root: str
    classes: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    split_hash: str
    given: bool
    pixels: int
    found: dict[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    files: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    imbalance: float = 1.0
    labels: dict[str, Any] = field(default_factory=dict)

    def images(self, part: str) -> int:
        """How many images a part has."""
        return sum(self.counts.get(part, ()))


@dataclass(frozen=True)
class Limit:
    """One wish of a budget: ``ms<=5``. ``what`` is ms, mb, accuracy, macs or memory."""

    what: str
    value: float

    @property
    def least(self) -> bool:
        """Whether more is better."""
        return self.what == "accuracy"

    @property
    def text(self) -> str:
        """As it is typed."""
        return f"{self.what}{'>=' if self.least else '<='}{self.value:g}"


@dataclass(frozen=True)
class Planned:
    """A candidate in the plan.

    Attributes:
        name: of its folder; ``-s1`` and on behind it are repetitions with other seeds.
        base: the name without the seed.
        maker: key of the recipe that makes it.
        project: package that makes it.
        title: for people.
        settings: plain values of the recipe: network, input_size, epochs, batch_size ...
        seed: of this repetition.
        minutes: expected.
        included: whether it is made; else ``reason`` says why not.
        order: the simpler, the smaller; ties are decided by it.
        teacher: name of the candidate whose stored answers teach it, or "".
    """

    name: str
    base: str
    maker: str
    project: str
    title: str
    settings: dict[str, Any]
    seed: int
    minutes: float
    included: bool
    reason: str
    order: int
    teacher: str = ""


@dataclass(frozen=True)
class Plan:
    """What is made inside the minutes (``plan.json``).

    Attributes:
        minutes: that were given, and ``expected`` of what is included, checks and judging too.
        budget: the wishes that decide the winner.
        batch: images at once that the budget's ms means.
        shape: ``cpu`` or ``cuda``: where the winner will run.
        threads: that compute.
        steps: what was measured here: name -> seconds an image.
        candidates: in the order in which they are made.
        seed: the run's.
    """

    minutes: float
    expected: float
    budget: tuple[Limit, ...]
    batch: int
    shape: str
    threads: int
    steps: dict[str, float]
    candidates: tuple[Planned, ...]
    seed: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What became of a candidate (``candidates/<name>/job.json``).

    Attributes:
        state: ``done``, ``failed`` or ``skipped``; no file while it is being made.
        reason: of a failure or a skip, one line; else "".
        seconds: of wall time, of the try that ended.
        commands: as they were typed.
        notes: what the projects' own last lines say (below the floor, distillation helped ...).
    """

    name: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Floors:
    """Test accuracies, fractions, that a network must beat (``floors.json``).

    Attributes:
        majority: always the most frequent class of training.
        plain, engineered: image features and a line; None where not computed, ``note`` says why.
    """

    majority: float
    plain: float | None = None
    engineered: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Value:
    """A measured number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassRow:
    """One class on the test split: support in images, the rest fractions (None: undefined)."""

    name: str
    support: int
    recall: float | None
    precision: float | None
    f1: float | None


@dataclass(frozen=True)
class Mistake:
    """An image that was answered wrongly: names of the classes, probability of the answer."""

    path: str
    true: str
    given: str
    probability: float


@dataclass(frozen=True)
class Judged:
    """One shipped file (candidate, form), measured alike (``judged.json``, a list ``rows``).

    Attributes:
        candidate, form: whose file; ``files`` are its names in the candidate's ``model/``.
        base, seed, project, title, order: as planned.
        calibration_accuracy: what choices are made by.
        accuracy: on the test split.
        difference: accuracy minus that of the best row on the same images, paired; None of itself.
        macro_f1, ece: fractions.
        agreement: share of test images that get the class of the network that was trained.
        bytes: on disk, of the network's files.
        memory_mb: peak resident memory of a process that answers, beyond an empty one.
        latency: batch size (as text) -> ``p50``, ``p95`` in ms an image.
        throughput: images a second at batch 16.
        macs: multiply-accumulates an image, None if the facts do not say.
        front: whether it lies on the Pareto front; set by choose.
        unknown: ``threshold``, ``false_accepts``, ``kept`` and ``source`` of "none of these".
        confusions: the most frequent (true, given, images).
        mistakes: the surest wrong answers.
        right: which calibration images it answered rightly, in the split's order: their number, a
            colon, hexadecimal bits (``np.packbits``). Paired choices are made by it.
        int8: whether the file computes in 8 bits.
        notes: one line each.
    """

    candidate: str
    form: str
    base: str
    seed: int
    project: str
    title: str
    order: int
    files: tuple[str, ...]
    input_size: tuple[int, ...]
    calibration_accuracy: float
    accuracy: Value
    difference: Value | None
    macro_f1: float
    ece: float
    agreement: float | None
    bytes: int
    memory_mb: float | None
    latency: dict[str, dict[str, float]]
    throughput: float
    macs: float | None
    per_class: tuple[ClassRow, ...] = ()
    confusions: tuple[tuple[str, str, int], ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    unknown: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    front: bool = False
    right: str = ""
    int8: bool = False

    @property
    def name(self) -> str:
        """``lite0-160 int8``; ``trained int8`` where the first file computes in 8 bits already."""
        form = FORMS.get(self.form, self.form)
        return f"{self.candidate} {form.replace('float', 'trained int8') if self.int8 else form}"


@dataclass(frozen=True)
class Choice:
    """The winner and why (``choice.json``).

    Attributes:
        candidate, form: of the winner; of the nearest one where ``meets`` is False.
        meets: whether it keeps to the whole budget.
        sentence: the reason.
        front: (candidate, form) of the Pareto front, the most accurate first.
        missed: what of the budget the nearest one misses, by wish.
        at_least: "at least this accuracy with confidence 95 %", exact binomial, on the test split.
        lines: to type: predict, serve ...; filled by ship.
    """

    candidate: str
    form: str
    meets: bool
    sentence: str
    front: tuple[tuple[str, str], ...] = ()
    missed: tuple[str, ...] = ()
    at_least: float | None = None
    lines: tuple[str, ...] = ()


def write(path: str | Path, value: object) -> None:
    """Write a dataclass, or several as ``{"rows": [...]}``; the old file stays until it is done."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, Sequence):
        write_json(path, {"rows": [asdict(one) for one in value]})
    else:
        write_json(path, asdict(value))  # type: ignore[call-overload]


def read(path: str | Path, kind: type[T]) -> T:
    """Read what :func:`write` wrote.

    Raises:
        FileNotFoundError, ValueError: there is none, or it does not fit.
    """
    return _made(kind, read_object(path), where=str(path))


def read_rows(path: str | Path, kind: type[T]) -> list[T]:
    """Read several."""
    return [_made(kind, row, where=str(path)) for row in read_object(path)["rows"]]


def _made(kind: type[T], value: Mapping[str, Any], where: str) -> T:
    hints = typing.get_type_hints(kind)
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if set(value) - known:
        raise ValueError(f"{where}: unknown {', '.join(sorted(set(value) - known))}, run again "
                         "with --fresh")  # fmt: skip
    try:
        return kind(**{name: _value(hints[name], one, where) for name, one in value.items()})
    except TypeError as error:
        raise ValueError(f"{where} is damaged or of another version: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` of JSON as the annotation says: tuples, dataclasses, dictionaries of them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if value is None or hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _value(next(one for one in inner if one is not type(None)), value, where)
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_value(one, item, where) for one, item in zip(kinds, value, strict=True))
    if origin is dict:
        return {key: _value(inner[1], item, where) for key, item in value.items()}
    return _made(hint, value, where) if is_dataclass(hint) else value

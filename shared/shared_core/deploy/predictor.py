"""A finished model, ready to be asked: uint8 views in, probabilities (or features) out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from shared_core.datasets.reading.loader import usable_cores
from shared_core.deploy.exit_chain import ExitChain
from shared_core.deploy.exit_policy import NEVER, ExitPolicy, softmax
from shared_core.deploy.facts import (
    FACTS_FILE,
    INT8,
    ONNX,
    ModelError,
    ModelFacts,
    read_facts,
)
from shared_core.deploy.openvino_file import openvino_run
from shared_core.deploy.options import RUNTIMES, ExitOptions, ModelOptions
from shared_core.deploy.session import facts_in, open_session
from shared_core.runs.command import UsageError

OPENVINO = "openvino"

Images = npt.NDArray[np.uint8]  # (N, H, W, 3), RGB, of the view's size
Values = npt.NDArray[np.floating[Any]]
Run = Callable[[Images], Values]  # to probabilities (N, K), or features (N, D)
Classify = Callable[[Images, ExitPolicy], tuple[Values, npt.NDArray[np.int64]]]


class Outputs(NamedTuple):
    """What a network says of N images."""

    values: Values  # probabilities (N, K), or features (N, D)
    exits: npt.NDArray[np.int64] | None  # (N,) in 0..G; None of a network without exits


class Predictor:
    """A network with its facts; :class:`NetworkPredictor` and :class:`ExitPredictor` run it.

    Attributes:
        facts: classes, sizes, exits, costs.
        view: what evaluation takes of an image.
        runtime: what computes, for people.
        name: what to call the model in messages, usually its path.
        threads: of the CPU that :func:`open_model` gave it; None if nobody said.
    """

    threads: int | None = None

    def __init__(self, facts: ModelFacts, *, runtime: str, name: str) -> None:
        self.facts, self.view = facts, facts.make_view()
        self.runtime, self.name = runtime, name

    def outputs(self, images: Images) -> Outputs:
        """Ask the network.

        Args:
            images: uint8 RGB ``(N, H, W, 3)`` of the view's size, N at least 1.

        Raises:
            ValueError: other pixels.
        """
        raise NotImplementedError

    def probabilities(self, images: Images) -> Values:
        """``(N, K)``, rows sum to 1 under softmax; of the task ``embed`` features ``(N, D)``."""
        return self.outputs(images).values

    def with_exits(self, options: ExitOptions) -> Predictor:
        """The same network under the exit policy that the options ask for.

        Raises:
            UsageError: options that do not fit the model.
        """
        if options.asked:
            raise UsageError(f"{self.name} has no exits: expected no exit policy")
        return self

    def exit_name(self, index: int | None) -> str | None:
        """Exit 0..G for people; None of a network without exits."""
        if index is None or self.facts.exits is None:
            return None
        after = self.facts.exits.after
        return f"block {after[index]}" if index < len(after) else "final"

    def macs(self, index: int | None) -> float | None:
        """Multiply-accumulates of an image that leaves at exit ``index``; None: a full run."""
        if self.facts.exits is not None:
            return self.facts.exits.costs[-1 if index is None else index]
        macs = self.facts.costs.get("macs")
        return float(macs) if isinstance(macs, int | float) else None

    def policy_state(self) -> dict[str, Any] | None:
        """The exit policy in use as plain JSON; None where everything runs to the end."""
        return None

    def _check(self, images: Images) -> None:
        if images.dtype != np.uint8 or images.shape[1:] != (*self.view.size, 3) or not len(images):
            raise ValueError(
                f"images are {images.dtype} {images.shape}, expected uint8 (N, "
                f"{self.view.size[0]}, {self.view.size[1]}, 3)"
            )


class NetworkPredictor(Predictor):
    """A network without exits.

    Args:
        run: uint8 images ``(N, H, W, 3)`` to probabilities ``(N, K)``, or features.
    """

    def __init__(self, facts: ModelFacts, run: Run, *, runtime: str, name: str) -> None:
        super().__init__(facts, runtime=runtime, name=name)
        self._run = run

    def outputs(self, images: Images) -> Outputs:
        """See :meth:`Predictor.outputs`."""
        self._check(images)
        return Outputs(self._run(images), None)


class ExitPredictor(Predictor):
    """A network with early exits.

    Args:
        classify: images and a policy to the logits ``(N, K)`` of the head at which each image left,
            and these exits ``(N,)`` in 0..G.
        has_gates: whether it gives gate logits, which the rules ``gate`` and ``jei`` ask for.
        policy: None takes the model's own; without one everything runs to the final head.
    """

    def __init__(
        self,
        facts: ModelFacts,
        classify: Classify,
        *,
        runtime: str,
        name: str,
        has_gates: bool,
        policy: ExitPolicy | None = None,
    ) -> None:
        super().__init__(facts, runtime=runtime, name=name)
        if facts.exits is None:
            raise ValueError(f"{name} has no exits, expected some")
        self._exits, self._classify, self._has_gates = facts.exits, classify, has_gates
        self.policy = self._own() if policy is None else policy

    def _own(self) -> ExitPolicy:
        state = self._exits.policy
        return ExitPolicy.never() if state is None else ExitPolicy.from_state(state)

    def outputs(self, images: Images) -> Outputs:
        """See :meth:`Predictor.outputs`; logits are divided by the temperature of their exit."""
        self._check(images)
        logits, exits = self._classify(images, self.policy)
        heads = range(len(self._exits.costs))
        temperatures = np.array([self.policy.temperature(n) for n in heads])[exits][:, None]
        return Outputs(activate(logits, self.facts.activation, temperatures), exits)

    def with_exits(self, options: ExitOptions) -> ExitPredictor:
        """See :meth:`Predictor.with_exits`."""
        found = ExitPredictor(
            self.facts, self._classify, runtime=self.runtime, name=self.name,
            has_gates=self._has_gates, policy=self._choose(options),
        )  # fmt: skip
        found.threads = self.threads
        return found

    def _choose(self, options: ExitOptions) -> ExitPolicy:
        temperatures = self._own().temperatures
        if options.none:
            return ExitPolicy("max_prob", NEVER, temperatures)
        if options.kind is not None and options.thresholds is not None:
            policy = ExitPolicy(options.kind, options.thresholds, temperatures)
            if policy.needs_gates and not (self._has_gates and self._exits.learned_gates):
                raise UsageError(f"--policy {policy.kind} asks learned gates, {self.name} has none")
            try:
                policy.check(len(self._exits.after))
            except ValueError as error:
                raise UsageError(f"--threshold: {error}") from None
            return policy
        if options.kind is not None:
            state = self._exits.rules.get(options.kind)
        elif options.point is not None:
            state = self._exits.points.get(options.point)
            if state is None and self._exits.points:
                known = ", ".join(self._exits.points)
                raise UsageError(f"--policy-point {options.point}: expected one of {known}")
        else:
            state = self._exits.policy
        if state is None:
            what = f"--policy {options.kind}" if options.kind else "its exits"
            raise UsageError(
                f"no record gives {self.name} thresholds for {what}: expected --policy KIND "
                "--threshold T, or --no-exits"
            )
        return ExitPolicy.from_state(state)

    def policy_state(self) -> dict[str, Any] | None:
        """See :meth:`Predictor.policy_state`."""
        return self.policy.state_dict() if self.policy.thresholds != (NEVER,) else None


def activate(logits: Values, activation: str, temperature: Any = 1.0) -> Values:
    """Answers float32 from a network's outputs ``(N, K)``, computed in float64.

    Args:
        activation: ``softmax``, ``sigmoid``, ``unit`` (length 1) or ``none``.
        temperature: divides the outputs first; a number, or ``(N, 1)``.
    """
    x = np.asarray(logits, np.float64) / temperature
    if activation == "softmax":
        x = softmax(x)
    elif activation == "sigmoid":
        x = 0.5 * (1 + np.tanh(0.5 * x))  # without overflow
    elif activation == "unit":
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    answers: Values = x.astype(np.float32)
    return answers


def logits_to_run(facts: ModelFacts, network: Callable[[npt.NDArray[np.float32]], Values]) -> Run:
    """The ``run`` of a plain float network, by its facts.

    Args:
        network: normalised images float32 ``(N, 3, H, W)`` to outputs ``(N, K)``.
    """

    def run(images: Images) -> Values:
        outputs = network(facts.normalise(images))
        return activate(outputs, facts.activation, facts.temperature)

    return run


# -- opening --------------------------------------------------------------------------------------


class Opener(Protocol):
    """Opens what only a project knows: a checkpoint, a form of its framework's."""

    def __call__(self, path: Path, *, runtime: str, threads: int, device: str) -> Predictor | None:
        """None: not mine. It is asked before the core looks itself."""


def open_model(
    path: str | Path,
    *,
    runtime: str = "auto",
    threads: int = 1,
    device: str = "cpu",
    openers: Sequence[Opener] = (),
) -> Predictor:
    """Open a model folder, one of its files, or what an opener knows.

    Args:
        path: a folder with ``model.json``; an ``.onnx`` file that carries its facts, or lies beside
            them; an OpenVINO ``.xml`` beside its ``model.json``.
        runtime: ``onnx``, ``onnx-int8``, ``openvino`` or an opener's; ``auto`` takes the model's
            own default.
        threads: of the CPU.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        openers: of the project, asked first, in their order.

    Raises:
        FileNotFoundError: nothing is there, or not for this runtime.
        ModelError: damaged, or nothing that is known; one line.
        ImportError: the runtime is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, expected a model")
    for opener in openers:
        found = opener(path, runtime=runtime, threads=threads, device=device)
        if found is not None:
            break
    else:
        found = _open_core(path, runtime, threads, device)
    found.threads = threads
    return found


def _open_core(path: Path, runtime: str, threads: int, device: str) -> Predictor:
    if path.is_dir():
        return _open_folder(path, runtime, threads, device)
    if path.suffix == ".onnx":
        return _open_onnx(path, runtime, threads, device)
    if path.suffix == ".xml":
        return _open_openvino(path, read_facts(path.parent), runtime, threads, device)
    raise ModelError(
        f"{path} is no model that this command knows: expected a folder with {FACTS_FILE}, or an "
        ".onnx file"
    )


def open_asked(options: ModelOptions, *, openers: Sequence[Opener] = ()) -> Predictor:
    """The model that a command's options name; see :func:`open_model`."""
    return open_model(
        options.model,
        runtime=options.runtime,
        threads=usable_cores() if options.threads is None else options.threads,
        device=options.device,
        openers=openers,
    )


def _open_folder(folder: Path, runtime: str, threads: int, device: str) -> Predictor:
    facts = read_facts(folder)
    chosen = runtime
    if runtime == "auto":  # the default, unless only the project's own commands open it
        usable = [one for one in (facts.default, *RUNTIMES) if one in RUNTIMES]
        chosen = next((one for one in usable if one in facts.files), facts.default)
    files = whole_files(folder, facts, chosen)
    if chosen == OPENVINO:
        return _open_openvino(files[0], facts, chosen, threads, device)
    if chosen not in (ONNX, INT8):
        raise ModelError(f"{folder}: {chosen} is opened by the commands of {facts.project} alone")
    sessions = [open_session(file, threads=threads, device=device) for file in files]
    return predictor_of(facts, sessions, chosen, str(folder))


def whole_files(folder: Path, facts: ModelFacts, runtime: str) -> list[Path]:
    """The files of a folder for one runtime, each there and with the recorded content.

    Raises:
        FileNotFoundError: the model has none for this runtime, or one is missing.
        ModelError: one is damaged, or another file.
    """
    files = [folder / name for name in facts.files.get(runtime, ())]
    if not files:
        known = ", ".join(facts.files) or "none"
        raise FileNotFoundError(f"{folder} holds no file for {runtime}, expected one of: {known}")
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is missing, expected the network of {folder}")
    for file in files:
        _check_hash(file, facts)
    return files


def _check_hash(file: Path, facts: ModelFacts) -> None:
    if (wanted := facts.sha256.get(file.name)) is None:
        return
    total = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 20):
            total.update(part)
    if total.hexdigest() != wanted:
        raise ModelError(
            f"{file} is damaged or another file: its sha256 is {total.hexdigest()[:12]}..., "
            f"expected {wanted[:12]}... of {FACTS_FILE}"
        )


def _open_onnx(path: Path, runtime: str, threads: int, device: str) -> Predictor:
    if runtime not in ("auto", ONNX, INT8):
        raise UsageError(f"--runtime {runtime}: {path} is a file for ONNX Runtime")
    beside = read_facts(path.parent) if (path.parent / FACTS_FILE).is_file() else None
    if beside is not None:
        _check_hash(path, beside)
    session = open_session(path, threads=threads, device=device)
    facts = facts_in(session, where=path) or beside
    if facts is None:
        raise ModelError(f"{path} does not say its classes: expected a file that an export wrote")
    if facts.exits is not None:
        raise ModelError(f"{path} is one segment of a chain: expected its folder {path.parent}")
    kept = [key for key, names in facts.files.items() if path.name in names]
    return predictor_of(facts, [session], kept[0] if kept else ONNX, str(path))


def predictor_of(facts: ModelFacts, sessions: list[Any], runtime: str, name: str) -> Predictor:
    """Sessions of files that take uint8 images and give probabilities; of a chain, logits."""
    if facts.exits is not None:
        try:
            chain = ExitChain(sessions)
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from None
        if chain.num_exits != len(facts.exits.after):
            raise ModelError(
                f"{name} is a chain with {chain.num_exits} exits, expected the "
                f"{len(facts.exits.after)} of {FACTS_FILE}"
            )
        return ExitPredictor(facts, chain, runtime=runtime, name=name, has_gates=chain.has_gates)
    (session,) = sessions
    taken = session.get_inputs()
    if len(taken) != 1 or taken[0].type != "tensor(uint8)":
        kinds = ", ".join(f"{one.name} {one.type}" for one in taken)
        raise ModelError(f"{name} takes {kinds}, expected uint8 images alone")
    width = session.get_outputs()[0].shape[-1]
    if facts.class_names and isinstance(width, int) and width != len(facts.class_names):
        raise ModelError(f"{name} gives {width} numbers for {len(facts.class_names)} classes")
    key = taken[0].name
    return NetworkPredictor(
        facts, lambda images: session.run(None, {key: images})[0], runtime=runtime, name=name
    )


def _open_openvino(
    path: Path, facts: ModelFacts, runtime: str, threads: int, device: str
) -> Predictor:
    if runtime not in ("auto", OPENVINO):
        raise UsageError(f"--runtime {runtime}: {path} is a file for OpenVINO")
    if device not in ("cpu", "auto"):
        raise UsageError(f"--device {device}: OpenVINO runs on the CPU here, expected cpu")
    run = openvino_run(path, threads=threads)
    return NetworkPredictor(facts, run, runtime=OPENVINO, name=str(path))

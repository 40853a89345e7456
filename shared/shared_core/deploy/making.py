"""The files of a model folder in the making: written, asked, compared, measured."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.deploy.check import Agreement, ExportError, compare_answers
from shared_core.deploy.contract import Int8Result, quantize_within
from shared_core.deploy.exit_policy import NEVER
from shared_core.deploy.facts import INT8, ONNX, ModelFacts
from shared_core.deploy.graph import set_facts, wrap_chain, wrap_network
from shared_core.deploy.latency import measure_latency
from shared_core.deploy.options import ExitOptions
from shared_core.deploy.predictor import NetworkPredictor, Outputs, Predictor, predictor_of
from shared_core.deploy.session import open_session, this_cpu
from shared_core.metrics.intervals import Z95, wilson_interval
from shared_core.runs.environment import environment

Images = npt.NDArray[np.uint8]
Answers = Callable[[Images], npt.NDArray[Any]]  # views (N, H, W, 3) to probabilities or features
Labels = npt.NDArray[np.int64]
INT8_MODES = ("no", "auto", "yes")


@dataclass(frozen=True)
class Calibration:
    """Images that fix the ranges of int8 and judge it; none of the test split.

    Without a judge of one's own every second image judges, and the others fix the ranges.

    Attributes:
        images: uint8 views ``(M, H, W, 3)``, in an order that means nothing.
        labels: ``(M,)``; None: int8 is judged by how many answers stay the same.
    """

    images: Images
    labels: Labels | None = None


@dataclass(frozen=True)
class Form:
    """A file form that the core does not write itself.

    Attributes:
        write: writes into the folder it is given; returns the names of its files.
        open: the same folder, to something that can be asked: it is checked like the rest.
        exact: whether it must answer as the network; False for int8 and such, whose agreement is
            measured alone.
    """

    write: Callable[[Path], Sequence[str]]
    open: Callable[[Path], Answers]
    exact: bool = True


@dataclass(frozen=True)
class Int8Wish:
    """What is asked of int8.

    Attributes:
        mode: ``no``; ``auto``: kept if it is faster here and accurate enough; ``yes``: kept if it
            is accurate enough, for a device that is not this one.
        max_accuracy_loss: most that accuracy may fall by, on the calibration images and on test.
        settings: ``scheme``, ``method``, ``glue``, ``quantize_bias`` of ``deploy.quantize``.
        judge: files' answers to a score, higher is better; None: accuracy (without labels:
            agreement; for features: mean cosine) on every second calibration image.
    """

    mode: str = "no"
    max_accuracy_loss: float = 0.01
    settings: Mapping[str, Any] = field(default_factory=dict)
    judge: Callable[[Answers], float] | None = None

    def __post_init__(self) -> None:
        if self.mode not in INT8_MODES:
            raise ValueError(f"int8 {self.mode!r}, expected one of {', '.join(INT8_MODES)}")
        if not 0 <= self.max_accuracy_loss <= 1:
            raise ValueError(f"accuracy loss {self.max_accuracy_loss}, expected 0 to 1")


@dataclass
class _Tally:
    """What one file has answered so far."""

    agreement: Agreement = field(default_factory=Agreement)
    correct: int = 0
    labelled: int = 0
    exits_differ: int = 0
    cost: float = 0.0  # multiply-accumulates of all images together, of a network with exits

    def share(self) -> dict[str, Any] | None:
        """Accuracy with its interval, or None where there were no labels."""
        if not self.labelled:
            return None
        low, high = wilson_interval(self.correct, self.labelled)
        value = self.correct / self.labelled
        return {"value": value, "low": low, "high": high, "images": self.labelled}


class Making:
    """The files of a folder in the making, by runtime, and what is known of each."""

    def __init__(self, folder: Path, facts: ModelFacts, network: Predictor) -> None:
        self.folder, self.facts, self.network = folder, facts, network
        self.files: dict[str, tuple[str, ...]] = {}
        self.open: dict[str, Predictor] = {}
        self.exact: set[str] = set()
        self.tallies: dict[str, _Tally] = {}
        self.own = _Tally()  # of the network

    def write_onnx(self, sources: Sequence[str | Path | Any]) -> None:
        """The wrapped network, or the segments of a chain."""
        import onnx

        chain = self.facts.exits is not None
        names = tuple(f"segment{n}.onnx" for n in range(len(sources))) if chain else ("model.onnx",)
        about = self._inside(ONNX, names)
        if chain:
            models = wrap_chain(sources, about)
        else:
            (source,) = sources
            models = [wrap_network(source, about)]
        for name, model in zip(names, models, strict=True):
            onnx.save(model, str(self.folder / name))
        self._add(ONNX, names, self._predictor(names))
        self.exact.add(ONNX)

    def write_form(self, runtime: str, form: Form) -> None:
        """A form of the project's."""
        names = tuple(form.write(self.folder))
        run = form.open(self.folder)
        self._add(runtime, names, NetworkPredictor(self.facts, run, runtime=runtime, name=runtime))
        if form.exact:
            self.exact.add(runtime)

    def write_int8(
        self, calibration: Calibration, wish: Int8Wish, batches: Sequence[int]
    ) -> Int8Result:
        """The int8 files, if they keep the contract on the calibration images."""
        if ONNX not in self.files:
            raise ValueError("int8 is made from an ONNX file, expected one to be written")
        names = tuple(name.replace(".onnx", ".int8.onnx") for name in self.files[ONNX])
        ranges, judge = _parts(calibration, wish, self.facts, self.open[ONNX].probabilities)

        def score(files: list[Path]) -> float:
            sessions = [open_session(file) for file in files]
            return judge(predictor_of(self.facts, sessions, INT8, "int8").probabilities)

        result = quantize_within(
            [self.folder / name for name in self.files[ONNX]],
            [self.folder / name for name in names],
            ranges,
            judge=score,
            max_accuracy_loss=wish.max_accuracy_loss,
            min_speedup=1.0 if wish.mode == "auto" else None,
            batches=batches,
            **wish.settings,
        )
        if result.kept:
            about = self._inside(INT8, names)
            for name in names:
                set_facts(self.folder / name, about)
            self._add(INT8, names, self._predictor(names))
        return result

    def judge(self, test: Iterable[tuple[Images, Labels | None]]) -> Images:
        """Ask the network and every file all images; the first ones, to measure time with."""
        sample: Images | None = None
        self.tallies = {runtime: _Tally() for runtime in self.files}
        for images, labels in test:
            if not len(images):
                continue
            sample = images.copy() if sample is None else sample
            truth = self.network.outputs(images)
            self._count(self.own, truth.values, labels)
            for runtime, predictor in self.open.items():
                tally, got = self.tallies[runtime], predictor.outputs(images)
                self._count(tally, got.values, labels)
                if truth.exits is None or got.exits is None:
                    tally.agreement += self._compare(runtime, truth.values, got.values)
                    continue
                self._count_exits(runtime, truth, got)
                if runtime in self.exact:
                    self._compare_heads(runtime, predictor, images)
        if sample is None:
            raise ExportError(
                "no image to check the files with, expected a split that is not empty"
            )
        return sample

    def check(self, min_same: float, max_distance: float) -> None:
        """Refuse files that must answer as the network and do not."""
        for runtime in sorted(self.exact):
            tally = self.tallies[runtime]
            name = ", ".join(self.files[runtime])
            tally.agreement.check(name=name, min_same=min_same, max_distance=max_distance)
            images = tally.agreement.images
            if tally.exits_differ > max(1, (1 - min_same) * images):
                raise ExportError(
                    f"{name}: {tally.exits_differ} of {images} images leave at another exit than "
                    f"the network's, expected at most {100 * (1 - min_same):.2f} %"
                )

    def judged_int8(self, result: Int8Result, wish: Int8Wish) -> Int8Result:
        """A net below the contract: int8 files that break it beyond doubt are removed.

        Calibration images decide. Test images only stop what they show to be broken: a loss whose
        95 % interval (of two independent shares, so a wide one) lies above what is allowed. Less
        than that is told, not acted upon, or the test split would choose.
        """
        float_share, int8_share = (self.tallies[name].share() for name in (ONNX, INT8))
        if float_share is None or int8_share is None:
            return result
        loss = float_share["value"] - int8_share["value"]
        spread = sum(one["value"] * (1 - one["value"]) for one in (float_share, int8_share))
        least = loss - Z95 * math.sqrt(spread / int8_share["images"])
        if least <= wish.max_accuracy_loss + 1e-12:
            return result
        for name in self.files.pop(INT8):
            (self.folder / name).unlink()
        del self.open[INT8], self.tallies[INT8]
        return replace(
            result,
            kept=False,
            reason=f"on the {int8_share['images']} test images it loses {loss:.4f} of "
            f"{float_share['value']:.4f}, allowed {wish.max_accuracy_loss:.4f}",
        )

    def latency(self, sample: Images, batches: Sequence[int]) -> dict[str, Any]:
        """Of every form, side by side."""
        runs = {runtime: one.probabilities for runtime, one in self.open.items()}
        return measure_latency(runs, sample, batches=batches)

    def described(
        self, int8: Int8Result | None, latency: dict[str, Any], judged_on: str | None
    ) -> ModelFacts:
        """The facts with all that was measured."""
        fast = int8 is not None and int8.kept and int8.speedup > 1
        default = INT8 if fast else next(iter(self.files))
        sizes = {
            n: (self.folder / n).stat().st_size for names in self.files.values() for n in names
        }
        rows = {
            runtime: {
                "accuracy": tally.share(),
                "agreement": self._agreement(tally),
                "latency": latency[runtime],
                "bytes": {name: sizes[name] for name in self.files[runtime]},
            }
            for runtime, tally in self.tallies.items()
        }
        hardware = environment()
        measured = {
            **self.facts.measured,
            "judged_on": judged_on or "generated pictures: accuracy was not measured",
            "accuracy": rows[default]["accuracy"],
            "network_accuracy": self.own.share(),
            "files": rows,
            "int8": None if int8 is None else int8.as_dict(),
            "threads": 1,
            "hardware": {
                "cpu": hardware["cpu"],
                "vnni": bool(this_cpu() & {"avx512_vnni", "avx_vnni"}),
                "system": hardware["system"],
                "packages": {
                    name: version for name, version in hardware["packages"].items()
                    if name in ("numpy", "onnx", "onnxruntime", "openvino", "torch", "paddlepaddle")
                },
            },
        }  # fmt: skip
        digests = {n: hashlib.sha256((self.folder / n).read_bytes()).hexdigest() for n in sizes}
        return self.facts.replaced(
            files=self.files, default=default, sha256=digests, measured=measured,
            costs={**self.facts.costs, "bytes": sizes},
        )  # fmt: skip

    def _agreement(self, tally: _Tally) -> dict[str, Any]:
        row = tally.agreement.as_dict()
        if self.facts.task != "classify":
            row["same_class"] = None
        if self.facts.exits is not None:
            row["same_exit"] = 1 - tally.exits_differ / tally.agreement.images
            row["mean_macs"] = tally.cost / tally.agreement.images
        return row

    def _inside(self, runtime: str, names: tuple[str, ...]) -> ModelFacts:
        """What stands in the metadata of a file: it is found alone sometimes."""
        return self.facts.replaced(files={runtime: names}, default=runtime, sha256={}, measured={})

    def _predictor(self, names: tuple[str, ...]) -> Predictor:
        sessions = [open_session(self.folder / name) for name in names]
        return predictor_of(self.facts, sessions, ONNX, ", ".join(names))

    def _add(self, runtime: str, names: tuple[str, ...], predictor: Predictor) -> None:
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise ExportError(f"{missing[0]} was not written, expected it for {runtime}")
        self.files[runtime], self.open[runtime] = names, predictor

    def _count(self, tally: _Tally, values: npt.NDArray[Any], labels: Labels | None) -> None:
        if labels is not None and self.facts.task == "classify":
            tally.correct += int((values.argmax(axis=1) == labels).sum())
            tally.labelled += len(labels)

    def _compare(self, runtime: str, truth: npt.NDArray[Any], got: npt.NDArray[Any]) -> Agreement:
        name = ", ".join(self.files[runtime])
        return compare_answers(truth, got, task=self.facts.task, name=name)

    def _count_exits(self, runtime: str, truth: Outputs, got: Outputs) -> None:
        """Decisions, and the answers: another exit gives another answer, which is no fault."""
        assert self.facts.exits is not None and truth.exits is not None and got.exits is not None
        tally, same = self.tallies[runtime], truth.exits == got.exits
        for chosen in (same, ~same):
            if chosen.any():
                found = self._compare(runtime, truth.values[chosen], got.values[chosen])
                distance = found.max_distance if chosen is same else 0.0
                tally.agreement += replace(found, max_distance=distance)
        tally.exits_differ += int((~same).sum())
        tally.cost += float(np.asarray(self.facts.exits.costs)[got.exits].sum())

    def _compare_heads(self, runtime: str, predictor: Predictor, images: Images) -> None:
        """Every head of a chain, each made to answer for all."""
        assert self.facts.exits is not None
        count = len(self.facts.exits.after)
        for head in range(count + 1):
            forced = tuple(-1.0 if n == head else NEVER for n in range(count)) or (NEVER,)
            options = ExitOptions(kind="max_prob", thresholds=forced)
            truth, got = (
                one.with_exits(options).outputs(images) for one in (self.network, predictor)
            )
            for exits in (truth.exits, got.exits):
                if exits is None or not (exits == head).all():
                    raise ExportError(f"exit {head} was asked for, another one answered")
            found = self._compare(runtime, truth.values, got.values)
            self.tallies[runtime].agreement += replace(found, images=0, same=0)


def _parts(
    calibration: Calibration, wish: Int8Wish, facts: ModelFacts, exact: Answers
) -> tuple[Images, Callable[[Answers], float]]:
    """Images that fix the ranges, and what judges."""
    if wish.judge is not None:
        return calibration.images, wish.judge
    held = calibration.images[::2]
    if facts.task == "embed":
        features = _unit(_asked(exact, held))
        return calibration.images[1::2], lambda run: float(
            (_unit(_asked(run, held)) * features).sum(axis=1).mean()
        )
    if calibration.labels is not None:
        classes = np.asarray(calibration.labels)[::2]
    else:
        classes = _asked(exact, held).argmax(axis=1)
    return calibration.images[1::2], lambda run: float(
        (_asked(run, held).argmax(axis=1) == classes).mean()
    )


def _asked(run: Answers, images: Images, size: int = 16) -> npt.NDArray[Any]:
    return np.concatenate([run(images[i : i + size]) for i in range(0, len(images), size)])


def _unit(features: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    rows = np.asarray(features, np.float64)
    unit: npt.NDArray[np.float64] = rows / np.maximum(np.linalg.norm(rows, axis=1)[:, None], 1e-12)
    return unit

"""The matrix: precision x objective x temperature x seed, every cell measured in the same way.

Rows are precisions: a student trained in fp32 or bf16, and the fp32 student with 8, 4, 2 or mixed
3 bits; a row that the hardware only emulates may be left out. Columns are objectives: labels, and
the teacher alone at several temperatures. A cell is written down when it is done, so a matrix that
was stopped goes on with the next one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpkd import quantization_stage
from mpkd.dataset.data_utils import TEST
from mpkd.deploy.export import quiet
from mpkd.run_context import Run
from mpkd.stages import load_teacher, new_net, save, teacher_stage, train_student
from mpkd.utils.common import evaluate, load_net
from shared_core.for_torch.cost import count_params
from shared_core.runs.progress import format_seconds

TRAINED = ("fp32", "bf16")  # precisions that a student is trained in
TEMPERATURES = (1.0, 2.0, 4.0)
LABELS = "labels"


@dataclass(frozen=True)
class Quantized:
    """A precision that comes after training.

    Attributes:
        method, w_bits, a_bits: of the quantization stage.
        more: further keys of the configuration.
    """

    method: str
    w_bits: int
    a_bits: int
    more: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """As keys of the configuration."""
        keys = {"method": self.method, "w_bits": self.w_bits, "a_bits": self.a_bits}
        return {f"quantization.{key}": value for key, value in (keys | dict(self.more)).items()}


QUANTIZED: dict[str, Quantized] = {
    "int8 PTQ": Quantized("ptq", 8, 8),
    "int8 QAT": Quantized("qat", 8, 8),
    "4 bits": Quantized("qat", 4, 4),
    "2 bits": Quantized("qat", 2, 4),
    "mixed 3 bits": Quantized(
        "sensitivity", 3, 8, {"budget_kind": "size", "budget": 3.0, "first_last_8bit": False}
    ),
}
PRECISIONS = (*TRAINED, *QUANTIZED)


def columns(temperatures: Sequence[float] = TEMPERATURES) -> list[str]:
    """The objectives by name: ``labels``, ``KD T=1`` ..."""
    return [LABELS, *(f"KD T={t:g}" for t in temperatures)]


def column_settings(column: str) -> dict[str, Any]:
    """An objective as keys of the configuration."""
    if column == LABELS:
        return {"distillation.mode": "labels"}
    temperature = float(column.rpartition("=")[2])
    return {"distillation.mode": "teacher_only", "distillation.temperature": temperature}


def cell_name(precision: str, column: str, seed: int) -> str:
    """The name under which a cell is written down."""
    return f"{precision} | {column} | {seed}"


class Matrix:
    """All cells over one data set.

    Args:
        run: data, folder, log and the configuration that cells differ from.
        seeds: of the students; the teacher is one.
        temperatures: of the columns.
        precisions: of the rows, in the order of ``PRECISIONS``; ``fp32`` is one of them.
    """

    def __init__(
        self,
        run: Run,
        *,
        seeds: Sequence[int],
        temperatures: Sequence[float] = TEMPERATURES,
        precisions: Sequence[str] = PRECISIONS,
    ) -> None:
        self.run, self.seeds, self.columns = run, list(seeds), columns(temperatures)
        self.precisions = list(precisions)
        self._teacher: tuple[nn.Module, str] | None = None

    def cells(self) -> list[tuple[str, str, int]]:
        """Precision, column, seed of every cell; students before what is made from them."""
        return [(p, c, s) for s in self.seeds for c in self.columns for p in self.precisions]

    def teacher(self) -> tuple[nn.Module, str]:
        """The one teacher of all cells, trained when it is not there yet."""
        log = self.run.log
        if log.done("teacher") is None:
            begun = time.monotonic()
            result = teacher_stage(self.run)
            log.finish(
                "teacher",
                {"seconds": time.monotonic() - begun, **result,
                 "csv_position": self.run.csv.position()},
            )  # fmt: skip
        if self._teacher is None:
            self._teacher = load_teacher(self.run)
        return self._teacher

    def go(self) -> None:
        """Every cell that is not done."""
        cells = self.cells()
        self.teacher()
        for number, (precision, column, seed) in enumerate(cells):
            name = cell_name(precision, column, seed)
            if self.run.log.done(name) is not None:
                continue
            begun = time.monotonic()
            result = self.cell(precision, column, seed)
            seconds = round(time.monotonic() - begun, 3)
            position = self.run.csv.position()
            self.run.log.finish(name, {"seconds": seconds, **result, "csv_position": position})
            self.run.log.say(
                f"{number + 1}/{len(cells)} {name}: {result['test_accuracy']:.4f} "
                f"({format_seconds(seconds)})"
            )

    def cell(self, precision: str, column: str, seed: int) -> dict[str, Any]:
        """Train or quantize one student and measure it on the test images."""
        config = {**self.run.config, **column_settings(column), "experiment.seed": seed}
        teacher, digest = self.teacher()
        if precision in QUANTIZED:
            config |= QUANTIZED[precision].settings()
            return self._quantized(self._run(config), column, seed, teacher, digest)
        config |= {"mixed_precision.enabled": precision != "fp32", "mixed_precision.dtype": "bf16"}
        return self._trained(self._run(config), precision, column, seed, teacher, digest)

    def _run(self, config: dict[str, Any]) -> Run:
        run = self.run
        return Run(
            config, run.data, run.folder, run.log, run.csv, run.device, run.world, run.scale,
            run.command,
        )  # fmt: skip

    def _file(self, precision: str, column: str, seed: int) -> str:
        return f"{precision}-{column}-{seed}.pth".replace(" ", "_").replace("=", "")

    def _trained(
        self, run: Run, precision: str, column: str, seed: int, teacher: nn.Module, digest: str
    ) -> dict[str, Any]:
        run.begin("student")  # the same start for every precision and objective
        student, about = new_net(run, "student")
        name = cell_name(precision, column, seed)
        own = None if column == LABELS else teacher
        epoch, seconds = train_student(run, _plain(name), student, own, digest)
        found = self._measure(run, student, teacher)
        save(run, self._file(precision, column, seed), student, about, epoch=epoch, metrics=found)
        size = 4 * count_params(student)
        return {
            **found,
            "epoch": epoch,
            "training_seconds": seconds,
            "bytes": size,
            "mean_bits": 32.0,
        }

    def _quantized(
        self, run: Run, column: str, seed: int, teacher: nn.Module, digest: str
    ) -> dict[str, Any]:
        student, _ = load_net(run.checkpoint(self._file("fp32", column, seed)))
        student.to(run.device)
        own = None if column == LABELS else teacher
        made = quantization_stage.quantize(run, student, own, digest)
        found = self._measure(run, made.net, teacher)
        record = made.record()
        kept = {key: record[key] for key in ("mean_bits", "w_bits", "notes", "baselines")}
        return {**found, **kept, "bytes": made.size_bytes, "bops": made.bops}

    def _measure(self, run: Run, net: nn.Module, teacher: nn.Module) -> dict[str, Any]:
        test = run.evaluate(net, TEST)
        return {
            "test_accuracy": test.accuracy, "test_loss": test.loss,
            "agreement": test.agreement(self._teacher_logits(run, teacher)),
        }  # fmt: skip

    def _teacher_logits(self, run: Run, teacher: nn.Module) -> np.ndarray:
        if not hasattr(self, "_logits"):
            self._logits = evaluate(teacher, run.evaluation_loader(TEST)).logits
        return self._logits


def _plain(name: str) -> str:
    """A stage's name as part of a file's."""
    return "".join(c if c.isalnum() else "-" for c in name)


def latencies(run: Run, student_file: str, *, repeats: int = 30) -> dict[str, float]:
    """Milliseconds an image, batch 1, one thread, torch and ONNX Runtime (fp32, int8), in turns.

    No processor has kernels for fewer bits: their rows have no time.
    """
    from mpkd.quant.ort_int8 import ort_int8
    from shared_core.for_torch.export import export_onnx

    student, _ = load_net(run.checkpoint(student_file))
    size = run.data.image_size
    folder = run.folder / "export"
    folder.mkdir(exist_ok=True)
    paths = {"ONNX Runtime fp32": folder / "fp32.onnx", "ONNX Runtime int8": folder / "int8.onnx"}
    export_onnx(student, paths["ONNX Runtime fp32"], input_size=(3, size, size))
    images = torch.cat(run.calibration_images()).cpu().numpy()
    with quiet():
        ort_int8(paths["ONNX Runtime fp32"], paths["ONNX Runtime int8"], images)
    image = torch.from_numpy(images[:1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ways = {"torch fp32": lambda: student(image)}
        for name, path in paths.items():
            ways[name] = _session_call(path, image.numpy())
        times: dict[str, list[float]] = {name: [] for name in ways}
        with torch.no_grad():
            for turn in range(repeats + 3):
                for name, call in ways.items():
                    begun = time.perf_counter()
                    call()
                    if turn >= 3:
                        times[name].append(1e3 * (time.perf_counter() - begun))
    finally:
        torch.set_num_threads(threads)
    return {name: float(np.median(values)) for name, values in times.items()}


def _session_call(path: Path, image: np.ndarray) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image}
    return lambda: session.run(None, feed)

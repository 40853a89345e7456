"""The matrix: precision x objective x temperature x seed, every cell measured in the same way.

Rows are precisions: a student trained in fp32 or bf16, and the fp32 student with 8, 4, 2 or mixed
3 bits; a row that the hardware only emulates may be left out. Columns are objectives: labels, and
the teacher alone at several temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mpkd.deploy.openers import facts_of, torch_run
from mpkd.experiments.bench import Bench
from mpkd.run_context import STUDENT_FILE
from mpkd.starting import plain_floor
from mpkd.utils.common import load_net
from shared_core.deploy.graph import wrap_network
from shared_core.deploy.latency import measure_latency
from shared_core.deploy.quantize import quantize_static
from shared_core.deploy.session import open_session
from shared_core.for_torch.export import export_onnx
from shared_core.trials import Cell

TRAINED = ("fp32", "bf16")  # precisions that a student is trained in
TEMPERATURES = (1.0, 2.0, 4.0)
LABELS = "labels"
LATENCY, FLOOR = "latency", "floor"


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


def cell_name(precision: str, column: str) -> str:
    """What a cell is called."""
    return f"{precision} | {column}"


def matrix_cells(
    bench: Bench, *, seeds: Sequence[int], temperatures: Sequence[float], precisions: Sequence[str]
) -> list[Cell]:
    """Every cell; students before what is made from them, all of a seed, then the next.

    Args:
        precisions: rows in the order of ``PRECISIONS``; ``fp32`` is one of them.
    """
    cells = []
    for seed in seeds:
        for column in columns(temperatures):
            for precision in precisions:
                changes = column_settings(column)
                if precision in QUANTIZED:
                    changes |= QUANTIZED[precision].settings() | {"mixed_precision.enabled": False}
                    kind, needs = "quantize", cell_name("fp32", column)
                else:
                    low = precision != "fp32"
                    changes |= {"mixed_precision.enabled": low, "mixed_precision.dtype": "bf16"}
                    kind, needs = "train", ""
                name = cell_name(precision, column)
                cells.append(bench.cell(name, kind, changes, seed=seed, needs=needs))
    return cells


def latency_cell(bench: Bench, student: Cell) -> tuple[Cell, Any]:
    """The times of a student's image, as a cell, and what measures it."""
    cell = Cell(LATENCY, {"student": student.name}, student.seed)

    def measure(_cell: Cell, _work: Path) -> dict[str, Any]:
        return {"ms": latencies(bench, bench.work_of(student) / "checkpoints" / STUDENT_FILE)}

    return cell, measure


def floor_cell(bench: Bench) -> tuple[Cell, Any]:
    """What plain features and a line reach on the same images, as a cell, and what measures it."""
    cell = Cell(FLOOR, {"split_hash": bench.data.split_hash}, 0)
    return cell, lambda _cell, _work: plain_floor(bench.run_of(bench.teacher_cell(), bench.folder))


def latencies(bench: Bench, student_file: Path) -> dict[str, float]:
    """Milliseconds an image, batch 1, one thread, torch and ONNX Runtime (fp32, int8), in turns.

    No processor has kernels for fewer bits: their rows have no time.
    """
    student, known = load_net(student_file)
    facts = facts_of(known)
    run = bench.run_of(bench.teacher_cell(), bench.folder)
    images = run.calibration_pixels()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            files = {name: folder / f"{name}.onnx" for name in ("plain", "fp32", "int8")}
            export_onnx(
                student, files["plain"], input_size=(3, *facts.input_size), check_batches=()
            )
            files["fp32"].write_bytes(wrap_network(files["plain"], facts).SerializeToString())
            quantize_static(files["fp32"], files["int8"], [images])
            runs = {"torch fp32": torch_run(facts, student)}
            for name in ("fp32", "int8"):
                runs[f"ONNX Runtime {name}"] = _call(files[name])
            found = measure_latency(runs, images, batches=(1,))
    finally:
        torch.set_num_threads(threads)
    return {name: row["1"]["cpu_ms"] for name, row in found.items()}


def _call(path: Path) -> Any:
    session = open_session(path)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: np.ascontiguousarray(images)})[0]

"""A distillation step without its teacher's cost; a small network in int8 against torch.

Everything is mpkd's own. One thread, timed by the CPU time of the process, interleaved.

- training step: ResNet-18 with the 3 x 3 stem into ``simple_cnn``, 32 pixels, batches of 64: as it
  would be written (torch, fp32, the teacher answers in every step) against stored answers and
  against a teacher in OpenVINO beside a channels-last student. The losses of the first steps,
  from the same weights and images, must be equal;
- exported network: MobileNetV2 at 224 pixels, from uint8 images to probabilities, in torch against
  ONNX Runtime and OpenVINO, fp32 and int8, in batches of 1 and 16. It is trained before on digits,
  so that the share of equal answers says something; one digit is repeated 7 x 7 times, for a digit
  has no 224 pixels.

    python tools/bench/mpkd.py [--quick] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(REPOSITORY / "packages"), str(REPOSITORY / "shared"),
                    str(REPOSITORY / "tools" / "bench")]  # fmt: skip

import numpy as np
import torch
from _mpkd_steps import BF16, LIVE, SIDE, STORED, WRITTEN, Deployed, mobilenet, trainings
from _rows import measure, row, share, skipped

from mpkd.deploy.forms import IR, IR_INT8, ONNX_FILE, nncf_form, openvino_form
from mpkd.deploy.openers import torch_run
from shared_core.deploy.graph import wrap_network
from shared_core.deploy.openvino_file import openvino_run
from shared_core.deploy.quantize import quantize_static
from shared_core.deploy.session import open_session
from shared_core.for_torch.export import export_onnx
from shared_core.runs import environment, write_benchmark

KD_STORED, KD_LIVE = 20.0, 2.4  # goals, as ratios
INT8 = {1: 4.5, 16: 12.0}  # by batch size
AGREE = 0.99  # share of images with the same class as in torch
SAME_LOSS, CLOSE = 1e-5, 1e-4  # relative; of probabilities
FILES = {
    "ONNX Runtime fp32": ONNX_FILE, "ONNX Runtime int8": "model.int8.onnx",
    "OpenVINO fp32": IR, "OpenVINO int8": IR_INT8,
}  # fmt: skip
Rows = list[dict[str, Any]]


def missing_bf16(features: list[str]) -> str | None:
    """Why nothing is gained by bf16 on a processor with these features; None where it has it."""
    if {"avx512_bf16", "amx_bf16"} & set(features):
        return None
    return "this processor has neither avx512_bf16 nor amx_bf16"


# -- the training step ----------------------------------------------------------------------------


def compare_steps(folder: Path, rounds: int, *, checked: int, bf16: str | None) -> Rows:
    """Whole steps by the way they are made; ``checked`` losses of each are compared first.

    Raises:
        ValueError: a loss in fp32 differs from that of the step as it would be written.
    """
    engine = "openvino" if find_spec("openvino") else None
    ways: dict[str, dict[str, Any]] = {"as written": WRITTEN, "stored": STORED}
    if engine:
        ways["live"] = LIVE
    if bf16 is None:
        ways["stored bf16"] = STORED | BF16
        ways |= {"live bf16": LIVE | BF16} if engine else {}
    made = trainings(folder, ways, count=checked)
    losses = {name: [one.step() for _ in range(checked)] for name, one in made.items()}
    equal: dict[str, str] = {}
    for name, found in losses.items():
        pairs = zip(found, losses["as written"], strict=True)
        worst = max(abs(a - b) / abs(b) for a, b in pairs)
        equal[name] = f"losses of the first {checked} steps within {worst:.0e}"
        if "bf16" not in name and worst > SAME_LOSS:
            raise ValueError(f"{name}: a loss differs by {worst:.1e} relative: {losses}")
    times = measure({name: one.step for name, one in made.items()}, rounds)
    rows: Rows = []

    def add(name: str, way: str, goal: float | None, reason: str | None) -> None:
        name = f"distillation step: {name} against torch fp32, live"
        if way in times:
            rows.append(row(name, times[way], times["as written"], goal=goal, equal=equal[way]))
        else:
            rows.append(skipped(name, goal, reason or "openvino is not installed"))

    add("stored answers, fp32", "stored", KD_STORED, None)
    if bf16 is None:
        add("stored answers, bf16", "stored bf16", None, None)
    add("live OpenVINO teacher, bf16", "live bf16", KD_LIVE, bf16)
    if bf16 is not None or not engine:
        add("live OpenVINO teacher, fp32", "live", None, None)
    return rows


# -- the exported network -------------------------------------------------------------------------


def export(made: Deployed, folder: Path) -> dict[str, str]:
    """Write every file whose packages are here; the reason by name for what is not written."""
    left: dict[str, str] = {}
    runtime = ("onnx", "onnxscript", "onnxruntime")
    needs = {"ONNX Runtime": runtime, "OpenVINO": (*runtime, "openvino")}
    for name in FILES:
        wanted = needs[name.rpartition(" ")[0]] + (("nncf",) if name == "OpenVINO int8" else ())
        absent = [package for package in wanted if find_spec(package) is None]
        if absent:
            left[name] = f"{absent[0]} is not installed"
    if "ONNX Runtime fp32" not in left:
        export_onnx(made.net, folder / "plain.onnx", input_size=(3, SIDE, SIDE), check_batches=())
        wrapped = wrap_network(folder / "plain.onnx", made.facts)
        (folder / ONNX_FILE).write_bytes(wrapped.SerializeToString())
        quantize_static(
            folder / ONNX_FILE, folder / FILES["ONNX Runtime int8"], [made.calibration]
        )  # fmt: skip
    if "OpenVINO fp32" not in left:
        openvino_form().write(folder)
    if "OpenVINO int8" not in left:
        nncf_form(made.calibration).write(folder)
    return left


def opened(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A file as a function from uint8 images to probabilities, on one thread."""
    if path.suffix == ".xml":
        return openvino_run(path)
    session = open_session(path)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def compare_exported(made: Deployed, folder: Path, batches: tuple[int, ...], rounds: int) -> Rows:
    """Answers, then times, of every file against the network in torch.

    Raises:
        ValueError: probabilities in fp32 differ.
    """
    left = export(made, folder)
    networks = {n: opened(folder / f) for n, f in FILES.items() if n not in left}
    eager, data = torch_run(made.facts, made.net), made.images

    def answers(network: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.concatenate([network(data[n : n + 16]) for n in range(0, len(data), 16)])

    expected = answers(eager)
    equal, rows = {}, []
    for name, network in networks.items():
        found = answers(network)
        worst = float(np.abs(found - expected).max() / np.abs(expected).max())
        same = float((found.argmax(1) == expected.argmax(1)).mean())
        right = float((found.argmax(1) == made.labels).mean())
        equal[name] = f"probabilities within {worst:.0e}"
        if name.endswith("int8"):
            equal[name] = (
                f"same class {same:.4f} of {len(data)} images, probabilities within {worst:.2f}"
            )
            detail = f"right {right:.4f}, torch {(expected.argmax(1) == made.labels).mean():.4f}"
            line = f"MobileNetV2: {name}, images of the same class as in torch"
            rows.append(share(line, same, goal=AGREE, equal=f"{len(data)} held-out; {detail}"))
        elif worst > CLOSE:
            raise ValueError(f"{name}: probabilities differ by {worst:.1e} relative")
    for size in batches:
        part = np.ascontiguousarray(data[:size])
        runs = {n: partial(f, part) for n, f in {"torch": eager, **networks}.items()}
        times = measure(runs, rounds, repeats=3 if size == 1 else 1)
        for name in FILES:
            line = f"MobileNetV2, batch {size}: {name} against torch"
            goal = INT8[size] if name.endswith("int8") else None
            if name in networks:
                rows.append(row(line, times[name], times["torch"], goal=goal, equal=equal[name]))
            else:
                rows.append(skipped(line, goal, left[name]))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 whether goals are met or not, for the machine decides that, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less training, fewer rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 7; quick 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(argv)
    quick = options.quick
    rounds = options.rounds or (2 if quick else 7)
    torch.set_num_threads(1)
    bf16 = missing_bf16(environment()["cpu_features"])
    with tempfile.TemporaryDirectory(prefix="bench-mpkd-") as place:
        folder = Path(place)
        rows = compare_steps(folder / "steps", rounds, checked=2 if quick else 4, bf16=bf16)
        made = mobilenet(
            epochs=1 if quick else 6, held_out=32 if quick else 200,
            calibration=16 if quick else 32, say=partial(print, flush=True),
        )  # fmt: skip
        rows += compare_exported(made, folder, (1,) if quick else (1, 16), rounds)
    if options.json:
        write_benchmark(options.json, topic="mpkd", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

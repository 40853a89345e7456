"""The exported student against dygraph; the training step with knowledge against a live teacher.

Everything is visiondistill_gc's own: MobileNetV2 student with the improved head, ResNet50 teacher,
4 classes, 224 pixels, random weights (times do not depend on them; the int8 agreement does, so it
is not a measure of accuracy). One thread, timed by the CPU time of the process, interleaved.

- exported student: ONNX Runtime, Paddle Inference with oneDNN, int8 in ONNX Runtime, against the
  same student in dygraph, in batches of 1 and 8;
- teacher: Paddle Inference with oneDNN against dygraph;
- training step: what the original does (live dygraph teacher, everything learns) against a step
  with stored answers and 14 frozen blocks, and against a live teacher in Paddle Inference.

    python tools/bench/visiondistill.py [--quick] [--rounds N] [--json FILE]
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
import paddle
from _rows import measure, row, skipped

from shared_core.deploy.predictor import open_model
from shared_core.deploy.quantize import quantize_static
from shared_core.deploy.write import write_model_folder
from shared_core.for_paddle.export import export_inference
from shared_core.for_paddle.inference import Network, paddle_inference
from shared_core.for_paddle.losses import cross_entropy, kd_kl
from shared_core.runs import write_benchmark
from visiondistill_gc.deploy.forms import onnx_source, paddle_form
from visiondistill_gc.deploy.openers import OPENERS, facts_of, predictor_of
from visiondistill_gc.models.student_model import build_student
from visiondistill_gc.models.teacher_model import build_teacher, freeze, teach
from visiondistill_gc.utils.model_files import load_model, save_model

PIXELS, CLASSES = 224, 4
EXPORTED, STEP, TEACHER = 7.0, 5.5, 4.0  # goals, as ratios
CLOSE = 1e-4  # of probabilities; of logits relative
TEMPERATURE, ALPHA = 4.0, 0.5


def images(count: int, *, seed: int = 1) -> np.ndarray:
    """Normalised noise float32 ``(N, 3, 224, 224)``."""
    values = np.random.default_rng(seed).standard_normal((count, 3, PIXELS, PIXELS))
    return values.astype(np.float32)


def settled_student(**options: Any) -> paddle.nn.Layer:
    """A student whose batch-norm statistics are those of data: its logits do not vanish."""
    net = build_student(num_classes=CLASSES, **options)
    norms = [layer for layer in net.sublayers() if hasattr(layer, "_momentum")]
    before = [norm._momentum for norm in norms]
    for norm in norms:
        norm._momentum = 0.0
    net.train()
    for layer in net.sublayers(include_self=False):
        layer.train()
    with paddle.no_grad():
        net(paddle.to_tensor(images(8, seed=2)))
    for norm, momentum in zip(norms, before, strict=True):
        norm._momentum = momentum
    net.eval()
    return net


def difference(network: Network, expected: np.ndarray, data: np.ndarray) -> float:
    """Relative difference of logits."""
    return float(np.abs(network(data) - expected).max() / np.abs(expected).max())


def pictures(count: int, *, seed: int) -> np.ndarray:
    """Noise uint8 ``(N, 224, 224, 3)``."""
    return np.random.default_rng(seed).integers(0, 256, (count, PIXELS, PIXELS, 3), np.uint8)


def exported(folder: Path, missing: list[str]) -> dict[str, Network]:
    """The student by what runs it: uint8 pictures to probabilities."""
    save_model(folder / "m.pdparams", settled_student(), class_names="abcd",
               architecture="mobilenet_v2", input_size=PIXELS)  # fmt: skip
    model = load_model(folder / "m.pdparams")
    facts, network, home = facts_of(model), predictor_of(model, name="student"), folder / "export"
    sources = [] if missing else [onnx_source(model.net, facts, folder, opset=17)]
    write_model_folder(home, facts=facts, network=network, sources=sources,
                       forms={"paddle": paddle_form(model.net, facts)})  # fmt: skip
    opened = {name: open_model(home, runtime=name, openers=OPENERS).probabilities
              for name in ("paddle", "onnx") if name == "paddle" or not missing}  # fmt: skip
    found = {"dygraph": network.probabilities, "Paddle Inference, oneDNN": opened["paddle"]}
    if not missing:
        quantize_static(home / "model.onnx", folder / "int8.onnx", [pictures(16, seed=3)])
        found["ONNX Runtime"] = opened["onnx"]
        found["ONNX Runtime int8"] = open_model(folder / "int8.onnx").probabilities
    return found


def compare_exported(folder: Path, batches: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """The exported student in three runtimes against dygraph."""
    missing = [p for p in ("paddle2onnx", "onnx", "onnxruntime") if find_spec(p) is None]
    networks = exported(folder, missing)
    data = pictures(max(batches), seed=1)
    expected = networks["dygraph"](data)
    goals = {
        "ONNX Runtime": EXPORTED,
        "Paddle Inference, oneDNN": None,
        "ONNX Runtime int8": EXPORTED,
    }
    equal = {}
    for name, network in networks.items():
        found = network(data)
        worst = float(np.abs(found - expected).max())
        if name.endswith("int8"):
            same = (found.argmax(1) == expected.argmax(1)).mean()
            equal[name] = f"probabilities within {worst:.3f}, same class {same:.2f} on noise"
        elif worst > CLOSE:
            raise ValueError(f"{name}: probabilities differ by {worst:.1e}")
        else:
            equal[name] = f"probabilities within {worst:.0e}"
    rows = []
    for size in batches:
        part = data[:size]
        runs = {name: partial(network, part) for name, network in networks.items()}
        times = measure(runs, rounds, repeats=5 if size == 1 else 1)
        for name, goal in goals.items():
            line = f"student, batch {size}: {name} against dygraph"
            if name in networks:
                rows.append(row(line, times[name], times["dygraph"], goal=goal, equal=equal[name]))
            else:
                rows.append(skipped(line, goal, f"{missing[0]} is not installed"))
    return rows


class Step:
    """One training step: student forward, loss against a teacher's logits, backward, Adam."""

    def __init__(self, *, frozen: int) -> None:
        paddle.seed(0)
        self.net = build_student(num_classes=CLASSES, frozen=frozen, dropout=0.0)
        self.net.train()
        learn = [p for p in self.net.parameters() if not p.stop_gradient]
        self.optimizer = paddle.optimizer.Adam(1e-4, parameters=learn, weight_decay=1e-4)

    def __call__(self, data: paddle.Tensor, labels: paddle.Tensor, teacher: paddle.Tensor) -> float:
        logits = self.net(data)
        hard = cross_entropy(logits, labels)
        soft = kd_kl(logits, teacher, temperature=TEMPERATURE)
        loss = ALPHA * hard + (1 - ALPHA) * soft
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return loss.item()


def compare_steps(folder: Path, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Teacher engines alone, then whole steps."""
    paddle.seed(0)
    net = freeze(build_teacher("resnet50", num_classes=CLASSES))
    export_inference(net, folder / "teacher", input_size=(3, PIXELS, PIXELS))
    engine = paddle_inference(folder / "teacher")

    def dygraph(images: np.ndarray) -> np.ndarray:
        return teach(net, paddle.to_tensor(images)).numpy()

    data = images(batch)
    expected = dygraph(data)
    worst = difference(engine, expected, data)
    if worst > CLOSE:
        raise ValueError(f"the teacher in Paddle Inference differs by {worst:.1e} relative")
    # Logits of a random ResNet50 are of no scale: what a loss makes of them is the same for all.
    scale = np.float32(3 / np.abs(expected).max())
    pixels = paddle.to_tensor(data)
    labels = paddle.to_tensor(np.arange(batch) % CLASSES)
    stored = paddle.to_tensor(expected * scale)
    steps = {name: Step(frozen=n) for name, n in (("all", 0), ("live", 0), ("frozen", 14))}
    first: dict[str, float] = {}

    def run(name: str, kind: str, teacher: Callable[[], paddle.Tensor]) -> Callable[[], None]:
        def one() -> None:
            loss = steps[kind](pixels, labels, teacher())
            first.setdefault(name, loss)

        return one

    def live(network: Network) -> Callable[[], paddle.Tensor]:
        return lambda: paddle.to_tensor(network(data) * scale)

    runs = {
        "original": run("original", "all", live(dygraph)),
        "live, Inference": run("live, Inference", "live", live(engine)),
        "stored, frozen": run("stored, frozen", "frozen", lambda: stored),
        "teacher dygraph": lambda: dygraph(data),
        "teacher Inference": lambda: engine(data),
    }
    times = measure(runs, rounds)
    if abs(first["live, Inference"] - first["original"]) > 1e-4 * abs(first["original"]):
        raise ValueError(f"the first losses differ: {first}")
    equal = f"first loss {first['live, Inference']:.6f}, original {first['original']:.6f}"
    where = f"batch {batch}"
    return [
        row(
            f"teacher ResNet50, {where}: Paddle Inference, oneDNN against dygraph",
            times["teacher Inference"],
            times["teacher dygraph"],
            goal=TEACHER,
            equal=f"logits within {worst:.0e}",
        ),
        row(
            f"training step, {where}: live teacher in Inference against dygraph",
            times["live, Inference"],
            times["original"],
            goal=None,
            equal=equal,
        ),
        row(
            f"training step, {where}: stored answers, frozen blocks against live dygraph",
            times["stored, frozen"],
            times["original"],
            goal=STEP,
            equal="same teacher logits; the frozen blocks use their statistics, so losses differ",
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 whether goals are met or not, for the machine decides that, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller batches, fewer rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 7; quick 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(argv)
    rounds = options.rounds or (3 if options.quick else 7)
    paddle.set_device("cpu")
    with tempfile.TemporaryDirectory(prefix="bench-visiondistill-") as place:
        rows = compare_exported(Path(place), (1,) if options.quick else (1, 8), rounds)
        rows += compare_steps(Path(place), 2 if options.quick else 8, rounds)
    if options.json:
        write_benchmark(options.json, topic="visiondistill", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

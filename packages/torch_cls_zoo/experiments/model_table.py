"""The zoo's table of networks, measured again: parameters, multiply-adds, CPU time, ONNX size.

The published column of multiply-adds (called FLOPs there) is a count of its own: besides the
products it has biases, BatchNorm, ReLU and pooling windows. :func:`published_count` repeats it, so
that the two can be compared to the digit; MACs are the plain products.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared_core.for_torch.export import export_onnx
from shared_core.runs import Report
from torch_cls_zoo.models import build_model
from torch_cls_zoo.models.summary import summarize

CLASSES = 6
PIXELS = 224
BASE = "resnet18"


@dataclass(frozen=True)
class Published:
    """A row of the README's table: 6 classes, 224 x 224 pixels."""

    params: float  # millions
    count: float  # millions, in the table's own counting
    milliseconds: float  # one forward on a Mac's CPU that is not named


PUBLISHED = {
    "resnet18": Published(11.18, 1820.16, 65),
    "resnet50": Published(23.52, 4109.68, 160),
    "shufflenet_v2_x1_0": Published(1.26, 148.00, 25),
    "shufflenet_v2_x2_0": Published(5.36, 588.43, 58),
    "mobilenet_v2": Published(2.23, 306.18, 52),
    "mobilenetv3_small": Published(1.52, 57.38, 20),
    "mobilenetv3_large": Published(4.21, 222.04, 50),
    "efficientnet_b0": Published(4.00, 405.31, 135),
    "efficientnet_b4": Published(18.04, 4600.46, 320),
}
WHY = {
    "shufflenet_v2_x1_0": "the published count is that of 5 classes, 148.00; with 6 it is 148.01",
    "efficientnet_b0": "published as an estimate: the counting tool missed the padded convolutions",
    "efficientnet_b4": "published as an estimate, and near the count at 380 x 380 pixels",
}


def published_count(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-adds of one image in the counting of the published table.

    The sum over layers of: convolution ``outputs * (k * k * inputs / groups + bias)``, linear
    weights and biases, BatchNorm and ``nn.ReLU`` inputs, pooling ``outputs * k * k``. Activations
    of other kinds, adaptive pooling, sums and products count nothing.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            each = layer.weight[0].numel() + (layer.bias is not None)
            total += output[0].numel() * each
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())
        elif isinstance(layer, nn.BatchNorm2d) or type(layer) is nn.ReLU:
            total += inputs[0][0].numel()
        elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            size = layer.kernel_size
            sides = (size, size) if isinstance(size, int) else tuple(size)
            total += output[0].numel() * sides[0] * sides[1]

    leaves = [layer for layer in model.modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(count) for layer in leaves]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            place = next(model.parameters()).device
            model(torch.zeros(1, 3, *image_size, device=place))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return total


def costs(arch: str, *, num_classes: int = CLASSES, pixels: int = PIXELS) -> dict[str, Any]:
    """Parameters, MACs and the published way of counting, without weights in memory."""
    with torch.device("meta"):
        model = build_model(arch, num_classes=num_classes, image_size=(pixels, pixels)).model
    summary = summarize(model, (pixels, pixels))
    return {
        "params": summary.params,
        "macs": summary.macs,
        "published_count": published_count(model, (pixels, pixels)),
    }


def forward_ratios(
    names: Sequence[str], *, rounds: int = 7, pixels: int = PIXELS, base: str = BASE
) -> dict[str, dict[str, float]]:
    """Time of one forward of one image as a multiple of ``base``'s, on one CPU thread.

    Each round times every network and the base right before it, so that other work on the machine
    touches both.

    Returns:
        By name ``ratio`` (median), ``ratio_min``, ``ratio_max``, ``milliseconds`` (median).
    """
    images = torch.zeros(1, 3, pixels, pixels)
    reference = _ready(base, pixels)
    result: dict[str, dict[str, float]] = {}
    with _one_thread(), torch.inference_mode():
        for name in names:
            net = reference if name == base else _ready(name, pixels)
            ratios, times = [], []
            for number in range(rounds + 1):
                below, above = _seconds(reference, images), _seconds(net, images)
                if number:  # the first is a warm-up
                    ratios.append(above / below)
                    times.append(above)
            result[name] = {
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "milliseconds": statistics.median(times) * 1e3,
            }
    return result


def _ready(arch: str, pixels: int) -> nn.Module:
    return build_model(arch, num_classes=CLASSES, image_size=(pixels, pixels)).model.eval()


def _seconds(run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    start = time.thread_time()
    run(images)
    return time.thread_time() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def onnx_bytes(arch: str, *, pixels: int = PIXELS) -> int:
    """Size of the network as a checked ONNX file with its weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        export_onnx(_ready(arch, pixels), path, input_size=(3, pixels, pixels))
        return path.stat().st_size


def table_row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Measured values beside the published ones, and whether they agree in the digits printed."""
    row: dict[str, Any] = {"arch": name, **found}
    published = PUBLISHED.get(name)
    if published is None:
        return row
    row["published"] = {
        "params": published.params,
        "count": published.count,
        "ratio": published.milliseconds / PUBLISHED[BASE].milliseconds,
    }
    row["params_agree"] = abs(found["params"] / 1e6 - published.params) < 0.0051
    row["count_agrees"] = abs(found["published_count"] / 1e6 - published.count) < 0.0051
    if not (row["params_agree"] and row["count_agrees"]):
        row["why"] = WHY.get(name, "")
    return row


def measure(
    names: Sequence[str], *, rounds: int, onnx: bool, say: Callable[[str], object] | None = None
) -> list[dict[str, Any]]:
    """A row of the table for each network.

    Args:
        rounds: of timing; 0 times nothing.
        onnx: whether to measure the size as ONNX.
        say: gets a line when a network is done.
    """
    times = forward_ratios(names, rounds=rounds) if rounds else {}
    rows = []
    for name in names:
        found: dict[str, Any] = {**costs(name), **times.get(name, {})}
        if onnx:
            found["onnx_bytes"] = onnx_bytes(name)
        rows.append(table_row(name, found))
        if say is not None:
            say("  ".join(table_cells(rows[-1])))
    return rows


def add_table(report: Report, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows on a page, with what their columns mean and why some differ."""
    report.text(
        f"{CLASSES} classes, {PIXELS} pixels squared, one image. 'count' is the published table's "
        "own counting (it calls it FLOPs): products, biases, BatchNorm, ReLU and pooling windows; "
        f"MACs are the products alone. Times are CPU time of one thread divided by {BASE}'s, taken "
        "in turns: median (least to largest). The published times are of a Mac that is not named, "
        "so their ratios are a hint only."
    )
    report.table(COLUMNS, [table_cells(dict(row)) for row in rows])
    for row in rows:
        if row.get("why"):
            report.text(f"* {row['arch']}: {row['why']}.")


COLUMNS = (
    "network", "params (M)", "published", "count (M)", "published", "MACs (M)",
    "time / resnet18", "published", "ONNX (MB)",
)  # fmt: skip


def table_cells(row: dict[str, Any]) -> list[str]:
    """A row of :data:`COLUMNS` as text; what was not measured or published is a dash."""
    published = row.get("published", {})

    def number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value / scale:.{digits}f}"

    ratio = number(row.get("ratio"))
    if "ratio_min" in row:
        ratio += f" ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    return [
        row["arch"],
        number(row["params"], 2, 1e6),
        number(published.get("params")) + ("" if row.get("params_agree", True) else " *"),
        number(row["published_count"], 2, 1e6),
        number(published.get("count")) + ("" if row.get("count_agrees", True) else " *"),
        number(row["macs"], 2, 1e6),
        ratio,
        number(published.get("ratio")),
        number(row.get("onnx_bytes"), 1, 1e6),
    ]

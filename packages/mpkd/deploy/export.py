"""The export stage: the student, with its own bits where it has them, as a model folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from mpkd.deploy import forms
from mpkd.deploy.openers import OPENVINO_INT8, PACKED, facts_of, torch_run
from mpkd.deploy.qdq import opset_for, with_own_grids
from mpkd.deploy.tensorrt_build import build_command
from mpkd.quant.cost import layer_facts
from mpkd.quant.layers import quant_layers
from mpkd.quant.shipped import plain, shipped
from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.predictor import OPENVINO
from shared_core.deploy.write import Calibration, Form, Int8Wish, Written, write_model_folder
from shared_core.for_torch.cost import count_params
from shared_core.for_torch.export import export_onnx

KINDS = ("onnx", "qdq", "openvino", "tensorrt")
TENSORRT = "tensorrt"
# Of a float network the answers differ by rounding alone. Of a quantized one a value that lies on
# the edge of a step may fall to either side, by the whole step, because runtimes add in another
# order; and ONNX Runtime rounds the biases of its 8-bit kernels.
FLOAT_CHECK = {"min_same": 0.999, "max_distance": 1e-3}
GRID_CHECK = {"min_same": 0.99, "max_distance": 0.1}


@dataclass(frozen=True)
class ExportWishes:
    """``export.*`` of the configuration.

    Attributes:
        onnx, qdq, openvino, tensorrt: which files.
        slower_int8: keep an int8 file that is not faster on this machine, for another device.
        max_accuracy_loss: most that int8 may lose, a fraction.
    """

    onnx: bool
    qdq: bool
    openvino: bool
    tensorrt: bool
    slower_int8: bool
    max_accuracy_loss: float

    @property
    def any(self) -> bool:
        """Whether anything is asked for."""
        return any(getattr(self, kind) for kind in KINDS)


def export_wishes(config: Mapping[str, Any]) -> ExportWishes:
    """Read from values by dotted key."""
    names = ExportWishes.__dataclass_fields__
    return ExportWishes(**{name: config[f"export.{name}"] for name in names})


@dataclass(frozen=True)
class ExportData:
    """Images for an export.

    Attributes:
        test: uint8 views and labels in batches; every file is asked all of them.
        calibration: uint8 views of training images.
    """

    test: Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]
    calibration: npt.NDArray[np.uint8]


def export_student(
    folder: Path,
    net: nn.Module,
    known: Mapping[str, Any],
    wishes: ExportWishes,
    data: ExportData,
    *,
    packed: Path | None = None,
    command: str = "",
) -> Written:
    """Write the model folder of a student; every file is compared with the network in torch.

    A quantized student is shipped with the grids that it was trained with, and packed: no second
    quantization takes their place. ``qdq`` then has nothing to do.

    Args:
        net: the student, quantized or not, on the CPU.
        known: facts of its checkpoint.
        packed: the file of its packed weights, of a quantized one.
        command: as the user typed it.

    Raises:
        ExportError: a file that does not answer as the network.
        ImportError: a runtime that is asked for is not installed.
    """
    size, has_bits = int(known["input_size"][1]), bool(quant_layers(net))
    net = shipped(net) if has_bits else net.eval()
    bare, facts = plain(net), facts_of(known)
    costs = {
        "macs": sum(layer.macs for layer in layer_facts(net, size)),
        "parameters": count_params(bare),
    }
    facts = facts.replaced(costs=costs, provenance={**facts.provenance, "command": command})
    calibrated = wishes.qdq and not has_bits
    int8 = Int8Wish(
        ("yes" if wishes.slower_int8 else "auto") if calibrated else "no",
        max_accuracy_loss=wishes.max_accuracy_loss,
    )
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "float.onnx"
        export_onnx(
            bare, source, input_size=(3, size, size), check_batches=(), opset=opset_for(net)
        )
        return write_model_folder(
            folder, facts=facts, network=torch_run(facts, net), sources=[_graph(source, net)],
            forms=_forms(bare, facts, wishes, data, packed, has_bits=has_bits), test=data.test,
            calibration=Calibration(data.calibration) if calibrated else None, int8=int8,
            **(GRID_CHECK if has_bits else FLOAT_CHECK),
        )  # fmt: skip


def _graph(source: Path, net: nn.Module) -> Any:
    import onnx

    return with_own_grids(onnx.load(str(source)), net)


def _forms(
    bare: nn.Module,
    facts: ModelFacts,
    wishes: ExportWishes,
    data: ExportData,
    packed: Path | None,
    *,
    has_bits: bool,
) -> dict[str, Form]:
    made: dict[str, Form] = {}
    if packed is not None:
        made[PACKED] = forms.packed_form(packed, facts)
    if wishes.openvino:
        made[OPENVINO] = forms.openvino_form()
        if not has_bits:
            made[OPENVINO_INT8] = forms.nncf_form(data.calibration)
    if wishes.tensorrt:
        made[TENSORRT] = forms.tensorrt_form(bare, facts, data.calibration)
    return made


def export_lines(written: Written, wishes: ExportWishes, *, has_bits: bool) -> list[str]:
    """What there is to say of an export, a line each."""
    lines = list(written.lines)
    if wishes.qdq and has_bits:
        lines.append(
            "  export.qdq: the student has its bits already, model.onnx holds them as Q/DQ nodes"
        )
    if wishes.tensorrt:
        side = written.facts.input_size[0]
        command = build_command(str(written.folder / forms.TRT), image_size=side)
        lines.append(f"  build the engine on the device: {command}")
    return lines

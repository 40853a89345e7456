"""A network as float ONNX files: one for a plain network, one a segment for a network with exits.

A segment is the part of the network up to an exit. The core wraps the files, checks them, makes
them int8 and runs them; the extra packages onnx and onnxscript write them.
"""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.named import NamedNetwork
from shared_core.deploy.exit_chain import GATE, LOGITS
from shared_core.for_torch.export import export_onnx

TOKENS = "tokens"  # what a segment hands on
FFT_OPSET = 20  # of DFT nodes with an axis as input


class Segment(nn.Module):
    """Takes images (first segment) or tokens; gives tokens, logits and gate logits, the last
    segment logits only."""

    def __init__(self, model: GFNetDynn, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        model, index = self.model, self.index
        tokens = model.segment(model.backbone.stem(x) if index == 0 else x, index)
        logits = model.head(index)(model.backbone.pool(tokens))
        if index == model.num_gates:
            return (logits,)
        return tokens, logits, model.gates[index](logits)


def portable(model: nn.Module, form: str) -> nn.Module:
    """A copy of ``model`` on the CPU, in eval mode, with its filters in ``form``."""
    model = copy.deepcopy(model).cpu().float().eval()
    plain = model.backbone if isinstance(model, GFNetDynn) else model
    if not isinstance(plain, NamedNetwork):
        plain.set_filter(form)
    return model


def write_float(
    model: nn.Module, folder: Path, *, opset: int | None = None, filter: str = "dft"
) -> list[Path]:
    """Write the ONNX files, each held to torch's numbers. Batch size is free.

    Args:
        model: left as it is.
        folder: gets ``float0.onnx``, and with exits ``float1.onnx`` ...
        opset: of ONNX, 13 or more; None takes torch's default, with ``fft`` 20.
        filter: ``dft`` and ``dft-dense`` use nothing but matrix products, for any runtime; ``fft``
            writes DFT nodes, which are slow in ONNX Runtime.

    Raises:
        ExportError: a file does not give torch's numbers.
        ValueError: an opset that cannot be written.
    """
    if filter == "fft":
        opset = FFT_OPSET if opset is None else opset
        if opset < FFT_OPSET:
            raise ValueError(f"opset is {opset}, expected {FFT_OPSET} or more for the fft filter")
    model = portable(model, filter)
    if not isinstance(model, GFNetDynn):
        path = folder / "float0.onnx"
        export_onnx(model, path, input_size=(3, *model.img_size), opset=opset)
        return [path]
    backbone, paths = model.backbone, []
    for index in range(model.num_gates + 1):
        last = index == model.num_gates
        paths.append(folder / f"float{index}.onnx")
        export_onnx(
            Segment(model, index),
            paths[-1],
            input_size=(3, *backbone.img_size)
            if index == 0
            else backbone.token_shape(model.exits[index - 1]),
            input_name="image" if index == 0 else f"{TOKENS}_in",
            output_names=(LOGITS,) if last else (TOKENS, LOGITS, GATE),
            opset=opset,
        )
    return paths

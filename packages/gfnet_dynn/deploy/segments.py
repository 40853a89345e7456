"""ONNX files: the plain network, and the network with exits as a chain of segments.

A chain is one file for the part up to each exit and a small JSON file beside them;
:mod:`gfnet_dynn.onnx_chain` runs it with real exits. Both can be quantized to int8.

Needs the extra packages onnx, onnxscript and onnxruntime.
"""

import copy
import json
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.gfnet_pyramid import GFNetPyramid
from gfnet_dynn.onnx_chain import CHAIN_FILE, CHAIN_VERSION, OnnxEarlyExit, input_name, session
from gfnet_dynn.quantization import QUANTIZATIONS, quantize_segments, quantize_student
from shared_core.checkpoints import atomic_write
from shared_core.for_torch.export import Difference, check_onnx

__all__ = [
    "OnnxEarlyExit",
    "Segment",
    "check_opset",
    "export_early_exit",
    "export_student",
    "portable",
    "quantize_student",
    "session",
]

LEAST_OPSET = 13
EXPORTED_FROM = 18  # from here on torch's newer exporter writes the opset that it is asked for


class Segment(nn.Module):
    """The part of a network with exits that one file holds.

    Takes images (first segment) or tokens; gives tokens, logits and gate logits, the last segment
    logits only.
    """

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
    (model.backbone if isinstance(model, GFNetDynn) else model).set_filter(form)
    return model


def export_student(
    model: GFNet | GFNetPyramid,
    path: str | Path,
    *,
    filter: str = "dft",
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> Difference:
    """Write a plain GFNet or pyramid as one ONNX file of free batch size, checked against torch.

    Args:
        model: left as it is.
        path: the file; its input is ``image (N, 3, H, W)``, normalised; its output ``logits``.
        filter: ``dft`` or ``dft-dense`` use nothing but matrix products, for any runtime; ``fft``
            writes DFT nodes, which need opset 20 and are slow in ONNX Runtime.
        opset: 13 or more, with ``fft`` 20 or more; None takes torch's default, with ``fft`` 20.
        tolerance: largest relative difference of the logits.

    Raises:
        ExportError: the file does not give torch's logits; none is left.
        ValueError: an opset that cannot be written.
    """
    opset = check_opset(opset, filter)
    model = portable(model, filter)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, *model.img_size, generator=generator) for n in (1, 3)]
    with torch.no_grad():
        expected = [[model(images).numpy()] for images in batches]
    save = _writer(model, batches[1], "image", ["logits"], opset)
    found = Difference(0.0, 0.0)

    def write(path: Path) -> None:
        nonlocal found
        save(path)
        found = check_onnx(path, [b.numpy() for b in batches], expected, tolerance=tolerance)

    atomic_write(path, write)
    return found


def export_early_exit(
    model: GFNetDynn,
    folder: str | Path,
    *,
    policy: ExitPolicy | None = None,
    opset: int | None = None,
    int8: str | None = None,
    calibration: np.ndarray | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write a network with exits as a chain of ONNX segments.

    Args:
        model: left as it is.
        folder: gets ``segment0.onnx`` ... and, last, ``chain.json``.
        policy: stored in the chain as the one to use by default.
        opset: of ONNX, 13 or more; None takes torch's default.
        int8: ``static`` or ``dynamic`` quantize the linear layers inside the blocks.
        calibration: normalised images float32 ``(M, 3, H, W)``; needed for ``static``.
        tolerance: largest relative difference of the float32 chain's logits from torch's.

    Returns:
        The path of ``chain.json``.

    Raises:
        ValueError: a policy that does not fit, or a chain whose logits differ from torch's.
    """
    opset = check_opset(opset)
    if policy is not None:
        policy.check(model.num_gates)
    if int8 is not None and int8 not in QUANTIZATIONS:
        raise ValueError(f"int8: got {int8!r}, expected one of {QUANTIZATIONS}")
    if int8 == "static" and (calibration is None or not len(calibration)):
        raise ValueError("int8: got no calibration images, expected some for 'static'")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CHAIN_FILE).unlink(missing_ok=True)  # a chain without it is not one
    exported = portable(model, "dft")
    backbone = exported.backbone
    names = [f"segment{index}.onnx" for index in range(model.num_gates + 1)]
    shape = (backbone.grid[0] * backbone.grid[1], backbone.embed_dim)
    for index, name in enumerate(names):
        example = torch.zeros(2, *((3, *model.backbone.img_size) if index == 0 else shape))
        outputs = ["logits"] if index == model.num_gates else ["tokens", "logits", "gate_logit"]
        write = _writer(Segment(exported, index), example, input_name(index), outputs, opset)
        atomic_write(folder / name, write)
    facts = {
        "version": CHAIN_VERSION,
        "segments": names,
        "exits": list(model.exits),
        "img_size": list(model.backbone.img_size),
        "num_classes": model.backbone.num_classes,
        "int8": int8,
        "policy": None if policy is None else policy.state_dict(),
    }
    _check_segments(exported, folder, names, tolerance)
    if int8 is not None:
        quantize_segments(folder, names, method=int8, images=calibration)
    text = json.dumps(facts, indent=2) + "\n"
    atomic_write(folder / CHAIN_FILE, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    return folder / CHAIN_FILE


def check_opset(opset: int | None, filter: str = "dft") -> int | None:
    """The opset to write, or a ValueError that says why it cannot be.

    13 is the least in which int8 layers have a scale for each channel; DFT nodes with an axis as
    input, which the fft filter needs, came with 20.
    """
    if filter == "fft":
        opset = 20 if opset is None else opset
        if opset < 20:
            raise ValueError(f"opset: got {opset}, expected at least 20 for the fft filter")
    if opset is not None and opset < LEAST_OPSET:
        raise ValueError(f"opset: got {opset}, expected at least {LEAST_OPSET}")
    return opset


def _writer(module: nn.Module, example: Tensor, name: str, outputs: list[str], opset: int | None):
    """What writes one network, batch size free, to a given path."""
    module = module.eval()

    def write(path: Path) -> None:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # the exporter is chatty
            warnings.simplefilter("ignore")
            common = {"input_names": [name], "output_names": outputs, "opset_version": opset}
            if opset is not None and opset < EXPORTED_FROM:
                # The newer exporter would write its own least opset instead of the one asked for.
                free = {key: {0: "batch"} for key in (name, *outputs)}
                torch.onnx.export(
                    module, (example,), path, dynamo=False, dynamic_axes=free, **common
                )
                return
            torch.onnx.export(
                module,
                (example,),
                path,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
                **common,
            )

    return write


def _check_segments(model: GFNetDynn, folder: Path, names: list[str], tolerance: float) -> None:
    """Hold the segments, one after the other, to a full pass of torch."""
    generator = torch.Generator().manual_seed(0)
    for n in (1, 3):
        images = torch.randn(n, 3, *model.backbone.img_size, generator=generator)
        with torch.no_grad():
            expected = model(images)
        value = images.numpy()
        for index, name in enumerate(names):
            *rest, last = session(folder / name).run(None, {input_name(index): value})
            logits = rest[1] if rest else last
            if rest:
                value = rest[0]
            truth = expected.logits[index].numpy()
            worst = float(np.abs(logits - truth).max() / max(np.abs(truth).max(), 1e-12))
            if not worst <= tolerance:
                raise ValueError(
                    f"export: {name} differs from torch by {worst:.1e} of the largest logit, "
                    f"expected at most {tolerance:.1e}"
                )

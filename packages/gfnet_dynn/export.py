"""ONNX files: the plain network, and the network with exits as a chain of segments.

A chain is one file for the part up to each exit and a small JSON file beside them. ONNX Runtime
runs a segment, the same :class:`ExitPolicy` as everywhere decides, and only the samples that are
left go into the next segment: real exits, the same decisions. Both can be quantized to int8.

Needs the extra packages onnx, onnxscript and onnxruntime.
"""

import copy
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gfnet_dynn.models.custom_modules.exit_policy import ExitPolicy, keep_rows
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.gfnet_pyramid import GFNetPyramid
from shared_core.checkpoints import atomic_write
from shared_core.for_torch.export import Difference, export_onnx

CHAIN_FILE = "chain.json"
CHAIN_VERSION = 1
QUANTIZATIONS = ("static", "dynamic")


class ChainResult(NamedTuple):
    """``logits (N, K)`` float32 and ``exit_index (N,)`` int64 in 0..G, in the input's order."""

    logits: np.ndarray
    exit_index: np.ndarray


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
        opset: None takes torch's default, with ``fft`` 20.
        tolerance: largest relative difference of the logits.

    Raises:
        ExportError: the file does not give torch's logits.
    """
    if filter == "fft":
        opset = 20 if opset is None else opset
        if opset < 20:
            raise ValueError(f"opset: got {opset}, expected at least 20 for the fft filter")
    return export_onnx(
        portable(model, filter),
        path,
        input_size=(3, *model.img_size),
        opset=opset,
        tolerance=tolerance,
    )


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
        opset: of ONNX; None takes torch's default.
        int8: ``static`` or ``dynamic`` quantize the linear layers inside the blocks.
        calibration: normalised images float32 ``(M, 3, H, W)``; needed for ``static``.
        tolerance: largest relative difference of the float32 chain's logits from torch's.

    Returns:
        The path of ``chain.json``.

    Raises:
        ValueError: a policy that does not fit, or a chain whose logits differ from torch's.
    """
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
        write = _writer(Segment(exported, index), example, _input(index), outputs, opset)
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


def _writer(module: nn.Module, example: Tensor, name: str, outputs: list[str], opset: int | None):
    """What writes one segment to a given path."""

    def write(path: Path) -> None:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # the exporter is chatty
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                (example,),
                path,
                dynamo=True,
                input_names=[name],
                output_names=outputs,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
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
            *rest, last = session(folder / name).run(None, {_input(index): value})
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


def _input(index: int) -> str:
    return "image" if index == 0 else "tokens_in"


def session(path: str | Path, *, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU that says nothing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxEarlyExit:
    """Runs a chain of segments with real exits.

    Args:
        folder: where ``chain.json`` lies.
        threads: of ONNX Runtime.

    Raises:
        FileNotFoundError: no chain there.
        ValueError: a chain of another version, or one that lacks entries.
    """

    def __init__(self, folder: str | Path, *, threads: int = 1) -> None:
        path = Path(folder) / CHAIN_FILE
        if not path.is_file():
            raise FileNotFoundError(f"chain: got {path}, expected an existing file")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"chain: {path} is not JSON: {error}") from error
        needed = {"version", "segments", "exits", "img_size", "num_classes", "policy"}
        if not isinstance(facts, dict) or facts.get("version") != CHAIN_VERSION:
            raise ValueError(f"chain: {path} has no version {CHAIN_VERSION}")
        if missing := needed - facts.keys():
            raise ValueError(f"chain: {path} lacks {sorted(missing)}")
        self.facts = facts
        self.img_size = tuple(facts["img_size"])
        self.policy = None if facts["policy"] is None else ExitPolicy.from_state(facts["policy"])
        self.sessions = []
        for name in facts["segments"]:
            segment = path.parent / Path(name).name
            if not segment.is_file():
                raise FileNotFoundError(f"chain: got {segment}, expected an existing file")
            self.sessions.append(session(segment, threads=threads))

    def run(self, images: np.ndarray, policy: ExitPolicy | None = None) -> ChainResult:
        """Classify normalised images float32 ``(N, 3, H, W)``.

        Args:
            policy: None takes the chain's own.
        """
        policy = self.policy if policy is None else policy
        if policy is None:
            raise ValueError("policy: got none, and the chain has none; expected an ExitPolicy")
        if images.ndim != 4 or tuple(images.shape[2:]) != self.img_size:
            raise ValueError(
                f"images: got shape {images.shape}, expected (N, 3, {self.img_size[0]}, "
                f"{self.img_size[1]})"
            )
        num_gates = len(self.sessions) - 1
        policy.check(num_gates)
        n, classes = len(images), self.facts["num_classes"]
        out = np.empty((n, classes), np.float32)
        exit_index = np.full(n, num_gates, np.int64)
        rows, value, state = np.arange(n), images, {}
        for index, part in enumerate(self.sessions):
            if not len(rows):
                break
            results = part.run(None, {_input(index): value})
            if index == num_gates:
                out[rows] = results[0]
                break
            tokens, logits, gate_logit = results
            leaving = policy.leave(
                index, torch.from_numpy(logits), torch.from_numpy(gate_logit), state
            ).numpy()
            if not leaving.any():
                value = tokens
                continue
            gone, stay = rows[leaving], np.flatnonzero(~leaving)
            out[gone], exit_index[gone] = logits[leaving], index
            rows, value = rows[stay], tokens[stay]
            keep_rows(state, torch.from_numpy(stay))
        return ChainResult(out, exit_index)


def linear_nodes(path: str | Path) -> list[str]:
    """Names of the MatMul nodes of a file whose right side is a weight: its linear layers.

    The matrices of the filters stand on the left and stay float32.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]


def quantize_file(
    source: str | Path,
    target: str | Path,
    *,
    method: str = "static",
    calibration: Iterable[dict[str, np.ndarray]] = (),
) -> int:
    """Write an int8 version of an ONNX file: weights per channel, activations per tensor.

    Args:
        method: ``static`` fixes the ranges of activations on ``calibration`` inputs; ``dynamic``
            finds them anew for each batch.
        calibration: inputs by name, a few batches.

    Returns:
        How many linear layers became int8.

    Source: Jacob et al. 2018, arXiv:1712.05877.
    """
    import onnx
    from onnxruntime import quantization as q

    if method not in QUANTIZATIONS:
        raise ValueError(f"int8: got {method!r}, expected one of {QUANTIZATIONS}")
    nodes = linear_nodes(source)
    options = {
        "nodes_to_quantize": nodes,
        "op_types_to_quantize": ["MatMul"],
        "per_channel": True,
        "weight_type": q.QuantType.QInt8,
    }
    model = onnx.load(str(source))
    del model.graph.value_info[:]  # quantize_dynamic transposes weights, but not their entries here

    def write(scratch: Path) -> None:
        if method == "dynamic":
            q.quantize_dynamic(model, str(scratch), **options)
            return
        q.quantize_static(
            model,
            str(scratch),
            _Reader(calibration),
            quant_format=q.QuantFormat.QDQ,
            activation_type=q.QuantType.QUInt8,
            **options,
        )

    with _quiet():
        atomic_write(target, write)
    return len(nodes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice to run its pre-processing, which changes nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Reader:
    """What ONNX Runtime's calibration asks for its inputs, one after the other."""

    def __init__(self, inputs: Iterable[dict[str, np.ndarray]]) -> None:
        self.inputs = iter(inputs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Nothing: the inputs fit into memory, so no part of them is asked for."""


def quantize_segments(
    folder: Path, names: Sequence[str], *, method: str, images: np.ndarray | None, batch: int = 16
) -> None:
    """Quantize the segments of a chain in place; each is calibrated on the float chain's tokens."""
    parts = [] if images is None else [images[i : i + batch] for i in range(0, len(images), batch)]
    values = [np.ascontiguousarray(part, dtype=np.float32) for part in parts]
    for index, name in enumerate(names):
        inputs = [{_input(index): value} for value in values]
        if index + 1 < len(names):
            run = session(folder / name)
            values = [run.run(["tokens"], feed)[0] for feed in inputs]
        quantize_file(folder / name, folder / name, method=method, calibration=inputs)


def quantize_student(
    source: str | Path, target: str | Path, *, images: np.ndarray, method: str = "static"
) -> dict:
    """Quantize an exported plain network; returns :func:`accuracy_report` on ``images``.

    Give :func:`accuracy_report` held-out images and labels for a number to publish.
    """
    batches = [images[i : i + 16] for i in range(0, len(images), 16)]
    count = quantize_file(
        source, target, method=method, calibration=[{"image": b} for b in batches]
    )
    return {"quantized_layers": count, **accuracy_report(source, target, images)}


def accuracy_report(
    float_path: str | Path,
    int8_path: str | Path,
    images: np.ndarray,
    labels: np.ndarray | None = None,
) -> dict:
    """What quantization changed: agreement, error, accuracies (fractions), file sizes (bytes).

    Args:
        images: normalised, float32 ``(N, 3, H, W)``.
        labels: int ``(N,)``; without them no accuracies.
    """
    if not len(images):
        raise ValueError("images: got none, expected at least one")
    outputs = []
    for path in (float_path, int8_path):
        run = session(path)
        outputs.append(
            np.concatenate(
                [run.run(None, {"image": images[i : i + 16]})[0] for i in range(0, len(images), 16)]
            )
        )
    exact, rounded = outputs
    report = {
        "images": len(images),
        "top1_agreement": float((exact.argmax(1) == rounded.argmax(1)).mean()),
        "relative_error": float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact)),
        "float_bytes": Path(float_path).stat().st_size,
        "int8_bytes": Path(int8_path).stat().st_size,
    }
    if labels is not None:
        report["float_accuracy"] = float((exact.argmax(1) == labels).mean())
        report["int8_accuracy"] = float((rounded.argmax(1) == labels).mean())
    return report

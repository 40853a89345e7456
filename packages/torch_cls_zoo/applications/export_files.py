"""Write a network for other runtimes, TorchScript, ONNX and torch.export, and check each file.

Each takes normalised float images and gives logits, and carries its facts (classes, view,
normalisation) inside, so that the demo needs nothing else. A file that does not give the network's
numbers is not left behind.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_core.checkpoints import atomic_write
from shared_core.deploy.facts import METADATA_KEY, ModelFacts
from shared_core.deploy.session import open_session
from shared_core.for_torch.export import Difference, ExportError, export_onnx
from torch_cls_zoo.applications.model_facts import FACTS

FORMATS = {"jit": "jit_{arch}.pt", "onnx": "{arch}.onnx", "export": "{arch}.pt2"}
CHECK_BATCHES = (1, 3)
Network = Callable[[Tensor], Tensor]  # (N, 3, H, W) to (N, K)
Saver = Callable[[nn.Module, Path, str, Tensor], Network]


def export_all(
    model: nn.Module,
    folder: str | Path,
    *,
    arch: str,
    facts: ModelFacts,
    formats: Sequence[str] = tuple(FORMATS),
    tolerance: float = 1e-4,
) -> dict[str, dict[str, Any]]:
    """Write ``model`` in each of ``formats`` and compare it with itself on random images.

    Args:
        model: on the CPU; float32 images ``(N, 3, H, W)`` to logits ``(N, K)``. Its mode is kept.
        folder: where to; made when missing.
        arch: for the file names: ``jit_ARCH.pt``, ``ARCH.onnx``, ``ARCH.pt2``.
        facts: of the network; the batch is free, the input size is not.
        formats: out of ``jit``, ``onnx``, ``export``.
        tolerance: largest difference, relative to the largest logit.

    Returns:
        For each format ``file``, ``bytes``, ``max_abs`` and ``max_rel``.

    Raises:
        ValueError: an unknown format.
        ExportError: a file's numbers differ, or the network cannot be written in that form.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"export format {unknown[0]!r}, expected some of {', '.join(FORMATS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text, batches = json.dumps(facts.as_dict(), ensure_ascii=False), _batches(facts.input_size)
    was_training = model.training
    model.eval()
    done = {}
    try:
        for name in formats:
            path = folder / FORMATS[name].format(arch=arch.replace("/", "_"))
            try:
                found = _written(model, path, SAVERS[name], text, batches, tolerance)
            except (ExportError, OSError, ImportError):
                raise
            except Exception as error:  # what a network cannot do raises nearly anything
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ExportError(f"{arch} cannot be written as {name}: {reason}") from error
            done[name] = {
                "file": path.name,
                "bytes": path.stat().st_size,
                "max_abs": found.max_abs,
                "max_rel": found.max_rel,
            }
    finally:
        model.train(was_training)
    return done


def _batches(image_size: tuple[int, int]) -> list[Tensor]:
    generator = np.random.default_rng(0)
    return [
        torch.from_numpy(generator.standard_normal((n, 3, *image_size)).astype(np.float32))
        for n in CHECK_BATCHES
    ]


def _written(
    model: nn.Module, path: Path, save: Saver, facts: str, batches: list[Tensor], tolerance: float
) -> Difference:
    """Write a file, all or nothing, and compare what is read back with the network."""
    found = Difference(0.0, 0.0)

    def write(scratch: Path) -> None:
        nonlocal found
        with warnings.catch_warnings(), torch.no_grad():  # TorchScript warns that it is old
            warnings.simplefilter("ignore")
            found = _compare(path, model, save(model, scratch, facts, batches[-1]), batches)
        if not found.max_rel <= tolerance:
            raise ExportError(
                f"{path}: differs by {found.max_rel:.2e} of the largest output, "
                f"expected at most {tolerance:.0e}"
            )

    atomic_write(path, write)
    return found


def _compare(path: Path, model: nn.Module, other: Network, batches: list[Tensor]) -> Difference:
    max_abs = max_rel = 0.0
    for batch in batches:
        expected, got = model(batch), other(batch)
        if got.shape != expected.shape:
            raise ExportError(
                f"{path}: output is {tuple(got.shape)}, expected {tuple(expected.shape)}"
            )
        difference = float((got - expected).abs().max())
        size = float(expected.abs().max())
        max_abs = float(np.maximum(max_abs, difference))  # unlike max, it keeps a nan
        max_rel = float(np.maximum(max_rel, difference / size if size else difference))
    return Difference(max_abs, max_rel)


def _save_jit(model: nn.Module, path: Path, facts: str, example: Tensor) -> Network:
    traced = torch.jit.trace(model, example, check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={FACTS: facts.encode()})
    loaded: Network = torch.jit.load(str(path), map_location="cpu")
    return loaded


def _save_onnx(model: nn.Module, path: Path, facts: str, example: Tensor) -> Network:
    import onnx

    export_onnx(model, path, input_size=tuple(example.shape[1:]), check_batches=CHECK_BATCHES)
    content = onnx.load(str(path))
    entry = content.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, facts
    onnx.checker.check_model(content)
    onnx.save(content, str(path))
    session = open_session(path)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _save_export(model: nn.Module, path: Path, facts: str, example: Tensor) -> Network:
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
    named = path.with_name(path.name + ".pt2")  # the writer insists on its ending
    try:
        torch.export.save(program, str(named), extra_files={FACTS: facts})
        loaded: Network = torch.export.load(str(named)).module()
        named.replace(path)
    finally:
        named.unlink(missing_ok=True)
    return loaded


SAVERS: dict[str, Saver] = {"jit": _save_jit, "onnx": _save_onnx, "export": _save_export}

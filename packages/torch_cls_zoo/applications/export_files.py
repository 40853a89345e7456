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
from shared_core.for_torch.export import Difference, ExportError, export_onnx
from torch_cls_zoo.applications.model_facts import FACTS

FORMATS = {"jit": "jit_{arch}.pt", "onnx": "{arch}.onnx", "export": "{arch}.pt2"}
CHECK_BATCHES = (1, 3)


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
    text, image_size = json.dumps(facts.as_dict(), ensure_ascii=False), facts.input_size
    writers: dict[str, Callable[[Path], Difference]] = {
        "jit": lambda path: _jit(model, path, image_size, text, tolerance),
        "onnx": lambda path: _onnx(model, path, image_size, text, tolerance),
        "export": lambda path: _torch_export(model, path, image_size, text, tolerance),
    }
    was_training = model.training
    model.eval()
    done = {}
    try:
        for name in formats:
            path = folder / FORMATS[name].format(arch=arch.replace("/", "_"))
            try:
                found = writers[name](path)
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


def _compare(
    path: Path, model: nn.Module, other: Callable[[Tensor], Tensor], batches: list[Tensor],
    tolerance: float,
) -> Difference:  # fmt: skip
    max_abs = max_rel = 0.0
    with torch.no_grad():
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
    if not max_rel <= tolerance:
        raise ExportError(
            f"{path}: differs by {max_rel:.2e} of the largest output, "
            f"expected at most {tolerance:.0e}"
        )
    return Difference(max_abs, max_rel)


def _jit(
    model: nn.Module, path: Path, image_size: tuple[int, int], facts: str, tolerance: float
) -> Difference:
    batches = _batches(image_size)
    found = Difference(0.0, 0.0)

    def save(scratch: Path) -> None:
        nonlocal found
        with warnings.catch_warnings(), torch.no_grad():  # TorchScript warns that it is old
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, batches[-1], check_trace=False)
            torch.jit.save(traced, str(scratch), _extra_files={FACTS: facts.encode()})
            loaded = torch.jit.load(str(scratch), map_location="cpu")
            found = _compare(path, model, loaded, batches, tolerance)

    atomic_write(path, save)
    return found


def _onnx(
    model: nn.Module, path: Path, image_size: tuple[int, int], facts: str, tolerance: float
) -> Difference:
    import onnx

    found = Difference(0.0, 0.0)

    def save(scratch: Path) -> None:
        nonlocal found
        found = export_onnx(
            model, scratch, input_size=(3, *image_size), tolerance=tolerance,
            check_batches=CHECK_BATCHES,
        )  # fmt: skip
        content = onnx.load(str(scratch))
        entry = content.metadata_props.add()
        entry.key, entry.value = METADATA_KEY, facts
        onnx.checker.check_model(content)
        onnx.save(content, str(scratch))

    atomic_write(path, save)
    return found


def _torch_export(
    model: nn.Module, path: Path, image_size: tuple[int, int], facts: str, tolerance: float
) -> Difference:
    batches = _batches(image_size)
    found = Difference(0.0, 0.0)

    def save(scratch: Path) -> None:
        nonlocal found
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                model, (batches[-1],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
            )
            named = scratch.with_name(scratch.name + ".pt2")  # the writer insists on its ending
            try:
                torch.export.save(program, str(named), extra_files={FACTS: facts})
                loaded = torch.export.load(str(named)).module()
                found = _compare(path, model, loaded, batches, tolerance)
                named.replace(scratch)
            finally:
                named.unlink(missing_ok=True)

    atomic_write(path, save)
    return found

"""Write a network for other runtimes, TorchScript, ONNX and torch.export, and check each file.

Every file carries its facts (classes, input size, normalisation) inside, so that the demo needs
nothing else. A file that does not give the network's numbers is not left behind.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_core.checkpoints import atomic_write
from shared_core.for_torch.export import Difference, ExportError, export_onnx

FORMATS = {"jit": "jit_{arch}.pt", "onnx": "{arch}.onnx", "export": "{arch}.pt2"}
FACTS = "facts.json"  # name of the facts inside a TorchScript or torch.export file
ONNX_KEY = "smallvision.facts"  # of an ONNX file's metadata
CHECK_BATCHES = (1, 3)


def export_all(
    model: nn.Module,
    folder: str | Path,
    *,
    arch: str,
    image_size: tuple[int, int],
    facts: Mapping[str, Any],
    formats: Sequence[str] = tuple(FORMATS),
    tolerance: float = 1e-4,
) -> dict[str, dict[str, Any]]:
    """Write ``model`` in each of ``formats`` and compare it with itself on random images.

    Args:
        model: on the CPU; float32 images ``(N, 3, H, W)`` to logits ``(N, K)``. Its mode is kept.
        folder: where to; made when missing.
        arch: for the file names: ``jit_ARCH.pt``, ``ARCH.onnx``, ``ARCH.pt2``.
        image_size: height and width in pixels; the batch is free, the size is not.
        facts: plain JSON, at least what :func:`demo_facts` gives.
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
    text = json.dumps(dict(facts), ensure_ascii=False)
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


def demo_facts(
    *,
    arch: str,
    class_names: Sequence[str],
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    family: str = "softmax",
) -> dict[str, Any]:
    """What the demo must know, under the names that a checkpoint's facts have: plain JSON.

    Args:
        family: ``softmax`` or ``bce`` (``sigmoid``): what turns logits into probabilities.
    """
    return {
        "project": "torch_cls_zoo",
        "architecture": arch,
        "class_names": list(class_names),
        "input_size": [3, *(int(side) for side in image_size)],
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "criterion": "bce" if family in ("bce", "sigmoid") else "softmax",
    }


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
        entry.key, entry.value = ONNX_KEY, facts
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

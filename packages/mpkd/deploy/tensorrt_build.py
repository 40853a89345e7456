"""Build a TensorRT engine from the int8 Q/DQ file, on the device that will run it.

Needs an NVIDIA GPU and the package tensorrt. Everything up to the engine (the file, its symmetric
zero-points, the batch sizes) is checked before tensorrt is imported, so that a mistake is told on
any machine.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from mpkd.quant.ort_int8 import check_qdq
from shared_core.checkpoints import atomic_write
from shared_core.runs import UsageError, run_command


def build_command(model: str, *, image_size: int) -> str:
    """The command that a user types on the device."""
    return shlex.join(
        ["python", "packages/mpkd/deploy/tensorrt_build.py", model, "--image-size", str(image_size)]
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="tensorrt_build.py", description="Build a TensorRT engine from an int8 Q/DQ ONNX file."
    )
    p.add_argument("model", type=Path, help="student_tensorrt.onnx of the export stage")
    p.add_argument("--image-size", type=int, required=True, help="pixels a side")
    p.add_argument("--max-batch", type=int, default=16)
    p.add_argument("--output", type=Path, help="the engine (default: beside the model, .engine)")
    p.add_argument("--check", action="store_true", help="check the file and stop")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then build. Returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.max_batch < 1 or args.image_size < 1:
        raise UsageError(
            f"--max-batch {args.max_batch}, --image-size {args.image_size}: expected 1 or more"
        )
    found = check_qdq(args.model)
    if "int32" in found.kinds:
        raise ValueError(f"{args.model}: quantized biases, expected the file of export.tensorrt")
    nodes = found.quantize + found.dequantize
    print(f"{args.model}: {nodes} Q/DQ nodes, all zero points 0", flush=True)
    if args.check:
        return 0
    try:
        import tensorrt
    except ImportError as error:
        raise ImportError(
            "tensorrt is not installed: expected it on the device that runs the engine; --check "
            "checks the file without it"
        ) from error
    target = args.output or args.model.with_suffix(".engine")
    engine = build_engine(tensorrt, args.model, size=args.image_size, batch=args.max_batch)
    atomic_write(target, lambda scratch: scratch.write_bytes(engine))
    print(f"engine: {target}")
    return 0


def build_engine(trt: Any, model: Path, *, size: int, batch: int) -> bytes:
    """The serialised engine; ``trt`` is the package tensorrt (10 or later).

    Raises:
        ValueError: TensorRT cannot read or build the file.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # explicit batch; precision comes from the Q/DQ nodes
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.read_bytes()):
        raise ValueError(f"{model}: TensorRT cannot read it: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    profile = builder.create_optimization_profile()
    name = network.get_input(0).name
    profile.set_shape(name, (1, 3, size, size), (batch, 3, size, size), (batch, 3, size, size))
    config.add_optimization_profile(profile)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise ValueError(f"{model}: TensorRT could not build an engine from it")
    return bytes(made)


if __name__ == "__main__":
    sys.exit(run_command(main))

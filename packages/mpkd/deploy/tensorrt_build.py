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

from shared_core.checkpoints import atomic_write
from shared_core.deploy.quantize import check_symmetric
from shared_core.runs.command import run_command
from shared_core.runs.numbers import SIZE
from shared_core.runs.options import CommandParser


def build_command(model: str, *, image_size: int) -> str:
    """The command that a user types on the device."""
    return shlex.join(
        ["python", "packages/mpkd/deploy/tensorrt_build.py", model, "--image-size", str(image_size)]
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="tensorrt_build.py",
        description="Build a TensorRT engine from an int8 Q/DQ ONNX file, on the device that will "
        "run it.",
    )
    add = p.add_argument
    add("model", type=Path, metavar="MODEL", help="model.tensorrt.onnx of the export stage.")
    add(
        "--image-size", type=SIZE, required=True, metavar="PIXELS",
        help="The side in pixels of the network's images.",
    )  # fmt: skip
    add(
        "--max-batch", type=SIZE, default=16, metavar="N",
        help="The most images that the engine will take at once.",
    )  # fmt: skip
    add(
        "--output", type=Path, metavar="FILE",
        help="The engine's file. Without it the model's name with the ending .engine.",
    )  # fmt: skip
    add("--check", action="store_true", help="Check the file and stop; any machine can do that.")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then build. Returns the exit code."""
    args = build_parser().parse_args(argv)
    found = check_symmetric(args.model)
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


def cli() -> int:
    """The installed command ``mpkd-tensorrt``."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())

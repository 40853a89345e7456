"""Serve a finished model over HTTP, with a drag-and-drop page; ``--help`` lists the options."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]
if __name__ == "__main__":  # before the framework: threads that wait without spinning
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle warns about things nobody can change

import argparse
import signal
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from shared_core.datasets.reading.loader import usable_cores
from shared_core.runs import UsageError, run_command
from visiondistill_gc.deploy_model import RUNTIMES, load_classifier
from visiondistill_gc.inference import at_least
from visiondistill_gc.serve_upload import Limits

GRACE = 30  # seconds that open requests get when the service is told to stop


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="serve.py",
        description="Serve a finished model over HTTP: a page to drop images on, POST /predict, "
        "GET /health, GET /model. Ctrl-C or SIGTERM stop it; open requests are answered first.",
        epilog="Needs: pip install 'visiondistill_gc[serve]'. There is no encryption and no login: "
        "leave it on 127.0.0.1, or put a proxy before it.",
    )
    p.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a folder that export.py wrote, or a .pdparams file",
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    p.add_argument("--port", type=_port, default=8080, help="0 takes a free one (default 8080)")
    p.add_argument(
        "--runtime",
        choices=("auto", *RUNTIMES),
        default="auto",
        help="what runs an exported folder (default: ONNX Runtime where there is a file for it)",
    )
    p.add_argument("--categories", nargs="+", metavar="NAME", help="must be the model's own")
    p.add_argument("--use_gpu", action="store_true", help="run on the GPU; an error without one")
    p.add_argument("--threads", type=at_least(1), help="of the network (default: the cores)")
    p.add_argument("--max_batch", type=at_least(1), default=16, help="images a batch (default 16)")
    p.add_argument(
        "--max_wait_ms",
        type=_positive(zero=True),
        default=2.0,
        metavar="MS",
        help="how long the first image of a batch waits for others (default 2)",
    )
    p.add_argument(
        "--max_queue",
        type=at_least(1),
        default=256,
        help="images that may wait; more get 503 (default 256)",
    )
    p.add_argument(
        "--max_mb", type=_positive(), default=10.0, help="megabytes of a request (default 10)"
    )
    p.add_argument(
        "--max_megapixels",
        type=_positive(),
        default=40.0,
        help="of an image, before it is decoded (default 40)",
    )
    p.add_argument(
        "--max_files", type=at_least(1), default=16, help="images of a request (default 16)"
    )
    return p


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a port, 0 to 65535")
    return int(text)


def _positive(*, zero: bool = False) -> Any:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (0 < value < 1e6 or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
        return value

    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Load, warm up, listen until told to stop. Returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn

        from visiondistill_gc.serve_app import create_app
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed: expected it for the service; "
            "pip install './packages/visiondistill_gc[serve]'"
        ) from error
    classifier = load_classifier(
        args.model,
        categories=args.categories,
        runtime=args.runtime,
        use_gpu=args.use_gpu,
        threads=args.threads or usable_cores(),
    )
    # The first pass of every batch size costs more: memory is laid out, kernels are chosen.
    side = classifier.description.input_size[0]
    for size in {1, args.max_batch}:
        classifier.probabilities(np.zeros((size, side, side, 3), np.uint8))
    app = create_app(
        classifier,
        limits=Limits(
            max_bytes=int(args.max_mb * 2**20),
            max_pixels=int(args.max_megapixels * 1e6),
            max_files=args.max_files,
        ),
        max_batch=args.max_batch,
        max_wait=args.max_wait_ms / 1e3,
        max_queue=args.max_queue,
    )
    with _listen(args.host, args.port) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {args.model} ({classifier.runtime}) on http://{shown}:{port}/", flush=True)
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE
        )
        server = uvicorn.Server(settings)
        # When it is done, uvicorn sends itself the signal again: a wished-for stop is no failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    print("stopped", flush=True)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        if error.errno is None or error.errno < 0:  # the name has no address
            raise UsageError(f"--host {host}: expected an address of this machine") from None
        reason = os.strerror(error.errno)
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from error


if __name__ == "__main__":
    sys.exit(run_command(main))

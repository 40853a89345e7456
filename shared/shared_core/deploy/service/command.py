"""Listen until told to stop: SIGTERM and Ctrl-C let open requests be answered first."""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

from shared_core.deploy.options import ServeOptions
from shared_core.deploy.predictor import Predictor
from shared_core.deploy.service.uploads import Limits
from shared_core.runs.command import UsageError

GRACE = 30  # seconds that open requests get when the service is told to stop
MAX_CONNECTIONS = 1024  # open at the same time, idle ones too


def serve(predictor: Predictor, options: ServeOptions) -> int:
    """Serve a model over HTTP until SIGTERM or Ctrl-C. Returns the exit code.

    There is no encryption and no login: leave it on 127.0.0.1, or put a proxy before it.

    Raises:
        ImportError: a package of the extra ``serve`` is missing.
        UsageError: the host is no address of this machine.
        OSError: the port is taken.
    """
    uvicorn = _load_uvicorn()
    from shared_core.deploy.service.app import create_app

    app = create_app(
        predictor,
        limits=Limits(
            max_bytes=int(options.max_mb * 2**20),
            max_pixels=int(options.max_megapixels * 1e6),
            max_files=options.max_files,
            max_requests=options.max_requests,
        ),
        max_batch=options.max_batch,
        max_wait=options.max_wait_ms / 1e3,
        max_queue=options.max_queue,
    )
    with listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        where = f"http://{shown}:{port}/"
        print(f"serving {predictor.name} ({predictor.runtime}) on {where}", flush=True)
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE,
            limit_concurrency=MAX_CONNECTIONS,
        )  # fmt: skip
        server = uvicorn.Server(settings)
        # When it is done, uvicorn sends itself the signal again: a wished-for stop is no failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    print("stopped", flush=True)
    return 0


def _load_uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed, expected it for the service: pip install "
            "'shared-core[serve]', or the extra serve of your project"
        ) from error
    return uvicorn


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections send small answers at once.

    Raises:
        UsageError: the host is no address of this machine.
        OSError: the port is taken; the message names address and port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The event loop turns Nagle's algorithm off for sockets that say they are TCP, and only those:
    # otherwise each answer on an open connection waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
        return listener
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror):
            raise UsageError(f"--host {host}: expected an address of this machine") from None
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from error

"""HTTP with the standard library: POST an image to /predict, GET /health and /model.

There is no encryption and no login: leave it on 127.0.0.1, or put a proxy before it. Requests are
read by threads and computed one at a time.
"""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mpkd.inference.backends import Classifier
from shared_core.datasets import DecodeError
from shared_core.datasets.reading.decode import EncodedImage
from shared_core.runs import UsageError

READ_SECONDS = 30.0  # for a request's bytes; a slower one is dropped
MAX_PIXELS = 40_000_000  # of an image, looked at before it is decoded


class _Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; the server holds the model and the limits."""

    server: Server
    timeout = READ_SECONDS
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "mpkd", ""

    def do_GET(self) -> None:  # noqa: N802 - the name that the standard library calls
        """``/health`` and ``/model``."""
        classifier = self.server.classifier
        if self.path == "/health":
            self._send(HTTPStatus.OK, {"status": "ok"})
        elif self.path == "/model":
            about = {"backend": classifier.backend, "classes": list(classifier.classes)}
            self._send(HTTPStatus.OK, {**about, "image_size": classifier.image_size})
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": f"no page {self.path[:80]!r}"})

    def do_POST(self) -> None:  # noqa: N802
        """``/predict``: the image file's bytes are the body."""
        try:
            self._send(HTTPStatus.OK, self._predict())
        except _Refusal as error:
            self.close_connection = True  # the rest of the body was not read
            self._send(error.status, {"error": error.reason})

    def _predict(self) -> dict[str, Any]:
        if self.path != "/predict":
            raise _Refusal(HTTPStatus.NOT_FOUND, f"no page {self.path[:80]!r}")
        text = self.headers.get("Content-Length", "")
        if not text.isdecimal():
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        size, most = int(text), self.server.max_bytes
        if size > most:
            reason = f"{size} bytes, expected at most {most}"
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
        body = self.rfile.read(size)
        if len(body) != size or not size:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "expected an image file as the body")
        try:
            _check_pixels(body)
            image = self.server.classifier.open(body, name="upload")
        except (DecodeError, ValueError) as error:
            raise _Refusal(HTTPStatus.BAD_REQUEST, " ".join(str(error).split())) from None
        with self.server.lock:
            row = self.server.classifier.probabilities([image])[0]
        return self.server.classifier.answer(row, top=self.server.top)

    def _send(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        data = (json.dumps(content, ensure_ascii=False) + "\n").encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what clients send is not for a log."""


class Server(ThreadingHTTPServer):
    """The listening server.

    Args:
        address: host and port.
        classifier: what answers.
        top: classes to name.
        max_bytes: of a request's body.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], classifier: Classifier, *, top: int, max_bytes: int
    ) -> None:
        super().__init__(address, Handler)
        self.classifier, self.top, self.max_bytes = classifier, top, max_bytes
        self.lock = threading.Lock()


def _check_pixels(data: bytes) -> None:
    """Refuse an image whose header announces more pixels than are decoded here.

    Raises:
        ValueError: names both numbers.
        DecodeError: no image.
    """
    encoded = EncodedImage(data, name="upload")
    pixels = encoded.height * encoded.width
    if pixels > MAX_PIXELS:
        raise ValueError(f"{pixels} pixels, expected at most {MAX_PIXELS}")


def parse_address(text: str) -> tuple[str, int]:
    """``127.0.0.1:8080`` as host and port.

    Raises:
        UsageError: another form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--http {text}: expected HOST:PORT, 127.0.0.1:8080")
    return host, int(port)


def serve(classifier: Classifier, address: str, *, top: int, max_bytes: int) -> None:
    """Listen until Ctrl-C."""
    with Server(parse_address(address), classifier, top=top, max_bytes=max_bytes) as server:
        host, port = server.server_address[:2]
        print(f"serving ({classifier.backend}) on http://{host}:{port}/predict", flush=True)
        server.serve_forever()

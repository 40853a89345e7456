"""A headless Chromium for tests, driven by its DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """The first Chromium on the path."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. What it asks of the network is in ``requests``, what it complains in ``errors``."""

    def __init__(self, process: subprocess.Popen, to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._buffer, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, seconds: float = 30, **params: Any) -> dict[str, Any]:
        """Send a command, wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        due = time.monotonic() + seconds
        while True:
            answer = self._read(due)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self, due: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = due - time.monotonic()
            if left <= 0 or not select.select([self._back], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._back, 1 << 20)
            if not part:
                raise RuntimeError("the browser is gone")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"])[:500])
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))
        return message

    def open(self, url: str, *, width: int = 1100, height: int = 800) -> None:
        """Go to an address."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, code: str, *, seconds: float = 30) -> Any:
        """The value of an expression as soon as it is true."""
        due = time.monotonic() + seconds
        while not (value := self.run(code)):
            if time.monotonic() > due:
                raise TimeoutError(f"{code} stays false; page says {self.text()[:500]!r}")
            time.sleep(0.05)
        return value

    def text(self) -> str:
        """The text that a visitor reads."""
        return self.run("document.body ? document.body.innerText : ''") or ""

    def drop(self, files: list[Path], x: int, y: int) -> None:
        """Drag files over a point and let go."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector: str, files: list[Path]) -> None:
        """Choose files in a file field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], nodeId=node)

    def screenshot(self, path: Path) -> bytes:
        """A PNG of what is seen; also its bytes."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data


@contextlib.contextmanager
def browser(*, language: str = "en-US") -> Iterator[Browser]:
    """A fresh browser with a profile of its own."""
    program = find_chromium()
    if program is None:
        raise FileNotFoundError("no chromium")
    (out, to), (back, into) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as home:
        words = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--disable-default-apps", f"--user-data-dir={home}",
            f"--lang={language}", f"--accept-lang={language}", "--remote-debugging-pipe",
        ]  # fmt: skip
        # Chromium listens on descriptor 3 and answers on 4.
        shell = f'exec "$@" 3<&{out} 4>&{into}'
        process = subprocess.Popen(
            ["/bin/bash", "-c", shell, "sh", *words],
            pass_fds=(out, into),
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LANGUAGE": language},
        )
        os.close(out), os.close(into)
        try:
            yield Browser(process, to, back)
        finally:
            os.close(to)  # Chromium ends when its pipe does
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(back)

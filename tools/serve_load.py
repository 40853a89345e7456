"""Put a running service of any project under load and check every answer.

python tools/serve_load.py http://127.0.0.1:8080 FOLDER [--requests N] [--concurrency N]
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "shared")]

import numpy as np

from shared_core.datasets.finding.scan import list_images
from shared_core.datasets.reading.image_headers import kind_of
from shared_core.runs import run_command
from shared_core.runs.json_files import write_json
from shared_core.runs.numbers import SIZE
from shared_core.runs.options import CommandParser

CLOSE = 1e-5  # largest difference of a probability between a batch and a single image


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="serve_load.py",
        description="Ask a running service about images: first one by one, then many at once; "
        "every answer under load must be that of the single image.",
        epilog="Exit code: 0, or 1 when an answer differed or was refused.",
    )
    add = p.add_argument
    add("url", metavar="URL", help="The address of the service, such as http://127.0.0.1:8080.")
    add("images", type=Path, metavar="PATH", help="An image, or a folder of them.")
    add("--requests", type=SIZE, default=200, metavar="N", help="How many requests there are.")
    add("--concurrency", type=SIZE, default=16, metavar="N", help="How many are open at once.")
    add("--json", type=Path, metavar="FILE", help="Write the numbers to this file.")
    return p


class Client:
    """One connection that stays open."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"url is {url!r}, expected http://HOST:PORT")
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=60)

    def ask(self, data: bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer for the bytes of one image file."""
        headers = {"Content-Type": f"image/{kind_of(data)}"}
        self._connection.request("POST", "/predict?top=1000", body=data, headers=headers)
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())

    def close(self) -> None:
        """Close it."""
        self._connection.close()


def by_class(answer: dict[str, Any]) -> dict[str, float]:
    """Probabilities by class of an answer about one image."""
    return {one["class"]: one["probability"] for one in answer["predictions"][0]["top"]}


class Load:
    """Many connections that ask about the same images, and what came of it.

    Args:
        single: probabilities by class of each image, asked about alone.
    """

    def __init__(
        self, url: str, images: Sequence[bytes], single: Sequence[dict[str, float]], requests: int
    ) -> None:
        self.url, self.images, self.single = url, images, single
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []
        self.differences: list[float] = []
        self.failures: list[Exception] = []
        self._left, self._lock = iter(range(requests)), threading.Lock()

    def run(self, concurrency: int) -> float:
        """Seconds until all requests are answered.

        Raises:
            OSError: a connection failed.
        """
        threads = [threading.Thread(target=self._work) for _ in range(concurrency)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            count = len(self.failures)
            raise OSError(f"{self.url}: {count} connections failed: {self.failures[0]}")
        return time.perf_counter() - start

    def _work(self) -> None:
        own = Client(self.url)
        try:
            while True:
                with self._lock:
                    number = next(self._left, None)
                if number is None:
                    return
                which = number % len(self.images)
                begin = time.perf_counter()
                status, answer = own.ask(self.images[which])
                self._note(which, status, answer, time.perf_counter() - begin)
        except (OSError, http.client.HTTPException) as error:
            with self._lock:
                self.failures.append(error)
        finally:
            own.close()

    def _note(self, which: int, status: int, answer: dict[str, Any], took: float) -> None:
        found = by_class(answer) if status == 200 else None
        wanted = self.single[which]
        with self._lock:
            self.statuses[status] += 1
            self.latencies.append(took)
            if found is not None:
                self.differences.append(max(abs(found[name] - wanted[name]) for name in wanted))


def load_test(
    url: str, images: Sequence[bytes], *, requests: int = 200, concurrency: int = 16
) -> dict[str, Any]:
    """Numbers of a load test.

    Returns:
        ``statuses`` by code, ``differing`` answers and the ``largest_difference`` of a probability
        from the single image's, ``images_per_second`` one by one and under load, latencies in
        milliseconds (``ms_median``, ``ms_p95``, ``ms_max``).

    Raises:
        ValueError: an image is refused when it is asked about alone.
        OSError: the service does not answer.
    """
    client, single = Client(url), []
    start = time.perf_counter()
    for data in images:
        status, answer = client.ask(data)
        if status != 200:
            raise ValueError(f"{url} answered {status}: {answer['error']['message']}")
        single.append(by_class(answer))
    alone = time.perf_counter() - start
    client.close()
    load = Load(url, images, single, requests)
    seconds = load.run(concurrency)
    milliseconds = 1e3 * np.asarray(load.latencies)
    return {
        "requests": requests,
        "concurrency": concurrency,
        "images": len(images),
        "statuses": {str(code): count for code, count in sorted(load.statuses.items())},
        "differing": sum(difference > CLOSE for difference in load.differences),
        "largest_difference": max(load.differences, default=0.0),
        "images_per_second_single": len(images) / alone,
        "images_per_second": requests / seconds,
        "ms_median": float(np.median(milliseconds)),
        "ms_p95": float(np.percentile(milliseconds, 95)),
        "ms_max": float(milliseconds.max()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Load, compare, print. Returns the exit code."""
    args = build_parser().parse_args(argv)
    files = list_images([args.images]).files
    if not files:
        raise FileNotFoundError(f"{args.images} holds no image, expected at least one")
    images = [path.read_bytes() for path in files[: args.requests]]
    report = load_test(
        args.url.rstrip("/"), images, requests=args.requests, concurrency=args.concurrency
    )
    statuses = ", ".join(f"{count} x {code}" for code, count in report["statuses"].items())
    print(
        f"{report['requests']} requests, {report['concurrency']} at once: {statuses}; "
        f"{report['differing']} answers differ from the single image's (largest difference "
        f"{report['largest_difference']:.1e})"
    )
    print(
        f"{report['images_per_second']:.1f} images a second, one by one "
        f"{report['images_per_second_single']:.1f}; latency median {report['ms_median']:.1f} ms, "
        f"95 % {report['ms_p95']:.1f}, largest {report['ms_max']:.1f}"
    )
    if args.json:
        write_json(args.json, report)
    return 0 if set(report["statuses"]) == {"200"} and not report["differing"] else 1


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Put a running service under load and check every answer; ``--help`` lists the options."""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from shared_core.checkpoints import atomic_write
from shared_core.datasets.reading.image_headers import kind_of
from shared_core.runs import run_command
from visiondistill_gc.deploy_images import list_images
from visiondistill_gc.inference import at_least

CLOSE = 1e-5  # largest difference of a probability between a batch and a single image


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="serve_load.py",
        description="Ask a running service about images: first one by one, then many at once; "
        "every answer under load must be that of the single image.",
        epilog="Exit code: 0, or 1 when an answer differed or was refused.",
    )
    p.add_argument("url", help="of the service: http://127.0.0.1:8080")
    p.add_argument("images", type=Path, metavar="PATH", help="an image, or a folder of them")
    p.add_argument("--requests", type=at_least(1), default=200, help="in all (default 200)")
    p.add_argument("--concurrency", type=at_least(1), default=16, help="at once (default 16)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
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
    client = Client(url)
    single = []
    start = time.perf_counter()
    for data in images:
        status, answer = client.ask(data)
        if status != 200:
            raise ValueError(f"{url} answered {status}: {answer['error']['message']}")
        single.append(by_class(answer))
    alone = time.perf_counter() - start
    client.close()
    lock, left = threading.Lock(), iter(range(requests))
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    differences: list[float] = []
    failures: list[Exception] = []

    def work() -> None:
        own = Client(url)
        try:
            while True:
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                which = number % len(images)
                begin = time.perf_counter()
                status, answer = own.ask(images[which])
                took = time.perf_counter() - begin
                found = by_class(answer) if status == 200 else {}
                with lock:
                    statuses[status] += 1
                    latencies.append(took)
                    if found:
                        wanted = single[which]
                        differences.append(max(abs(found[k] - wanted[k]) for k in wanted))
        except (OSError, http.client.HTTPException) as error:
            with lock:
                failures.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=work) for _ in range(concurrency)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if failures:
        raise OSError(f"{url}: {len(failures)} connections failed: {failures[0]}")
    milliseconds = 1e3 * np.asarray(latencies)
    return {
        "requests": requests,
        "concurrency": concurrency,
        "images": len(images),
        "statuses": {str(code): count for code, count in sorted(statuses.items())},
        "differing": sum(difference > CLOSE for difference in differences),
        "largest_difference": max(differences, default=0.0),
        "images_per_second_single": len(images) / alone,
        "images_per_second": requests / seconds,
        "ms_median": float(np.median(milliseconds)),
        "ms_p95": float(np.percentile(milliseconds, 95)),
        "ms_max": float(milliseconds.max()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Load, compare, print. Returns the exit code."""
    args = build_parser().parse_args(argv)
    files = list_images(args.images).files
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
        text = json.dumps(report, indent=2) + "\n"
        atomic_write(args.json, lambda path: path.write_text(text, encoding="utf-8"))
    return 0 if set(report["statuses"]) == {"200"} and not report["differing"] else 1


if __name__ == "__main__":
    sys.exit(run_command(main))

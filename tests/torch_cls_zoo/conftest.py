"""What the tests of the command share: a small data folder, runs here and in processes to kill."""

from __future__ import annotations

import hashlib
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from command_tools import Done, Server, in_process, run_main

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "packages" / "torch_cls_zoo"
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}  # RGB
ARCH = "test_resnet"  # timm's own small test network, with batch norm
# One thread: runs in this process and in forked ones must round alike.
TINY = (
    *("--arch", ARCH, "--image_size", "24", "24", "--epochs", "3", "--warmup", "1"),
    *("--lr", "0.003", "--batch_size", "8", "--threads", "1", "-j", "1", "--no-cuda"),
    *("--init", "none", "--no-floor"),
)

# Forks a process for each line of its input, so that torch is imported once.
SETUP = """
import timm, torchvision, tensorboard
from torch.utils import tensorboard as _
from torch_cls_zoo import main
from torch_cls_zoo.applications import dispatch
"""
FORKING = """
import array, json, os, runpy, socket, sys
import matplotlib.backends.backend_agg, onnx, onnxscript, timm, torchvision, tensorboard
from torch.utils import tensorboard as _
from torch_cls_zoo.applications import dispatch
from torch_cls_zoo.applications import export_files
from torch_cls_zoo.utils import builtin_data
place = sys.argv[1]
server = socket.socket(socket.AF_UNIX)
server.bind(place)
server.listen(8)
print("ready", flush=True)
while True:
    call, _ = server.accept()
    data, fds, _flags, _address = socket.recv_fds(call, 1 << 20, 2)
    job = json.loads(data)
    if job is None:
        break
    pid = os.fork()
    if pid == 0:
        os.dup2(fds[0], 1), os.dup2(fds[1], 2)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        code = 0
        try:
            if job["argv"][0] == "-c":
                exec(job["argv"][1], {"__name__": "__main__"})
            else:
                sys.argv = job["argv"]
                runpy.run_path(job["argv"][0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code or 0)
    for fd in fds:
        os.close(fd)
    call.sendall(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    call.close()
"""
SHIM = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as call:
    call.connect({place!r})
    job = dict(argv=sys.argv[1:], cwd=os.getcwd(), env=dict(os.environ))
    socket.send_fds(call, [json.dumps(job).encode()], [1, 2])
    sys.exit(int(call.recv(16)))
"""


@pytest.fixture(scope="session")
def zoo_server() -> Iterator[Server]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    started = Server(SETUP)
    yield started
    started.close()


@pytest.fixture(scope="session")
def zoo_python(tmp_path_factory) -> Iterator[Path]:
    """What scripts may call as their Python; see ``FORKING``."""
    folder = tmp_path_factory.mktemp("python")
    place, shim, caller = str(folder / "socket"), folder / "python", folder / "caller.py"
    if not hasattr(os, "fork") or len(place) > 100:
        yield Path(sys.executable)
        return
    path = os.pathsep.join([str(REPOSITORY / "packages"), str(REPOSITORY / "shared")])
    server = subprocess.Popen(
        [sys.executable, "-c", FORKING, place],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    caller.write_text(SHIM.format(place=place))
    # Not named on a first line of its own: such a line takes no path with a space.
    words = shlex.join([sys.executable, "-IS", str(caller)])
    shim.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    shim.chmod(0o755)
    yield shim
    with socket.socket(socket.AF_UNIX) as call:
        call.connect(place)
        call.sendall(b"null")
    server.wait(timeout=30)


@pytest.fixture(scope="session")
def zoo_folder() -> Callable[..., Path]:
    """Write train, val and test folders; a class's images share a colour."""

    def make(
        root: Path,
        *,
        counts: dict[str, int] | None = None,
        size: tuple[int, int] = (20, 28),
        noise: int = 40,
    ) -> Path:
        rng = np.random.default_rng(0)
        for part, number in (counts or {"train": 8, "val": 5, "test": 5}).items():
            for name, colour in COLOURS.items():
                (root / part / name).mkdir(parents=True)
                for index in range(number):
                    pixels = np.asarray(colour) + rng.integers(-noise, noise + 1, (*size, 3))
                    data = cv2.imencode(
                        ".png", np.clip(pixels, 0, 255).astype(np.uint8)[..., ::-1]
                    )[1]
                    (root / part / name / f"{index:02d}.png").write_bytes(data.tobytes())
        return root

    return make


@pytest.fixture(scope="session")
def zoo_data(tmp_path_factory, zoo_folder) -> Path:
    """A data folder that no test changes."""
    return zoo_folder(tmp_path_factory.mktemp("zoo") / "data")


@pytest.fixture(scope="session")
def zoo_words(zoo_data) -> Callable[..., list[str]]:
    """The words of a tiny training into a folder; more words may follow."""

    def words(output: Path, *more: object, data: Path | None = None) -> list[str]:
        found = ["--train", "--data", str(data or zoo_data), *TINY, "--output", str(output)]
        return [*found, *map(str, more)]

    return words


@pytest.fixture(scope="session")
def zoo_command() -> Callable[..., Done]:
    """Run ``main.py`` in this process as a shell would see it."""
    from torch_cls_zoo import main

    return lambda *words: run_main(main.main, words)


@pytest.fixture(scope="session")
def zoo_reproduce() -> Callable[..., Done]:
    """Run ``reproduce.py`` in this process."""
    from shared_core.runs import run_command
    from torch_cls_zoo import reproduce

    return lambda *words: in_process(lambda argv: run_command(reproduce.main, argv), words)


@pytest.fixture(scope="session")
def zoo_trained(tmp_path_factory, zoo_words, zoo_command) -> tuple[Path, Done]:
    """A finished tiny training, and what it said."""
    folder = tmp_path_factory.mktemp("zoo-trained") / "run"
    done = zoo_command(*zoo_words(folder, "--epochs", "6"))
    assert done.code == 0, done.err
    return folder, done


@pytest.fixture(scope="session")
def zoo_best(zoo_trained) -> Path:
    """The best weights of the finished training."""
    return zoo_trained[0] / "checkpoints" / f"model_best_{ARCH}.pth"


@pytest.fixture(scope="session")
def zoo_digests() -> Callable[[Path], dict[str, str]]:
    """sha256 of every file of weights of a run, and of its metric log."""

    def of(folder: Path) -> dict[str, str]:
        files = [*sorted((folder / "checkpoints").glob("*.pth")), folder / "metrics.jsonl"]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return of

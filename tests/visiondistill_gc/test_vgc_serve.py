"""serve.py: the core's service for this project's files, with the README's words; the load tool.

What a request may bring, how images become batches, and the page are the core's, tested there.
"""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request

import numpy as np
import pytest
import vgc_tools as tools

import serve_load
from visiondistill_gc import serve

for name in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(name)

CLASSES = tools.CLASSES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tools.save(tmp_path_factory.mktemp("served model") / "m.pdparams")


@pytest.fixture(scope="module")
def files():
    return [tools.encode(one) for one in tools.make_pixels()]


@pytest.fixture(scope="module")
def service(model):
    """The real command in a process of its own, with low limits, in the README's spelling."""
    words = [tools.PACKAGE / "serve.py", model, "--port", "0", "--max_mb", "0.05",
             "--max_megapixels", "0.09", "--max_files", "3", "--max_wait_ms", "20",
             "--max_queue", "9", "--max_batch", "4"]  # fmt: skip
    with tools.started(words, "/health") as (process, url):
        yield process, url


def ask(url, path, data=None):
    request = urllib.request.Request(url + path, data, {"Content-Type": "image/png"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_it_answers_as_the_network(service, files):
    _, url = service
    truth = tools.true_probabilities(tools.make_pixels())
    for data, wanted in zip(files, truth, strict=True):
        status, said = ask(url, "/predict?top=9", data)
        found = {one["class"]: one["probability"] for one in said["predictions"][0]["top"]}
        assert status == 200
        np.testing.assert_allclose([found[name] for name in CLASSES], wanted, atol=3e-4)


def test_the_words_of_the_command_arrive(service):
    _, url = service
    assert ask(url, "/health")[1]["runtime"] == "dygraph"
    said = ask(url, "/model")[1]
    assert said["class_names"] == list(CLASSES) and said["input_size"] == [32, 32]
    assert said["limits"] == {"bytes": int(0.05 * 2**20), "pixels": 90_000, "files": 3}


def test_a_crowd_gets_the_answers_of_the_single_image(service, files, tmp_path):
    _, url = service
    for number, data in enumerate(files):
        (tmp_path / f"{number}.png").write_bytes(data)
    words = (url, tmp_path, "--requests", 40, "--concurrency", 8, "--json", tmp_path / "n.json")
    done = tools.call(serve_load, *words)
    report = json.loads((tmp_path / "n.json").read_text())
    assert done.code == 0, done.out + done.err
    assert report["statuses"] == {"200": 40} and report["differing"] == 0
    health = ask(url, "/health")[1]
    assert 1 < health["largest_batch"] <= 4 and health["images"] >= 49


def test_told_to_stop_it_ends_well(service):
    """Last of its module: the service is gone afterwards."""
    process, _ = service
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0 and "stopped" in process.stdout.read()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--categories", "a", "b"], 1, "--categories"),
        (["--use_gpu"], 2, "use_gpu"),
        (["--port", "70000"], 2, "--port"),
        (["--max_mb", "0"], 2, "max_mb"),
        (["--host", "no.such.host.invalid"], 2, "--host"),
    ],
)
def test_errors_of_the_command_are_one_line(model, words, code, said):
    import paddle

    if words == ["--use_gpu"] and paddle.device.is_compiled_with_cuda():
        pytest.skip("this Paddle has CUDA")
    done = tools.call(serve, model, *words)
    assert done.code == code and said in done.err and done.err.count("\n") == 1

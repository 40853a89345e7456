"""serve.py: the core's service for this project's files, with the README's words; the load tool.

What a request may bring, how images become batches, and the page are the core's, tested there.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import urllib.error
import urllib.request

import numpy as np
import pytest
import vgc_tools as tools

import serve_load
from shared_core.deploy.options import add_model_options, add_serve_options, serve_options
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


def test_the_dockerfile_says_what_is_there():
    """Its sources, the extra, the command's words, the port and the health check fit together."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    text = (tools.PACKAGE / "Dockerfile").read_text()
    steps = [line.partition(" ")[::2] for line in text.splitlines() if line[:1].isalpha()]
    said = dict(steps)
    source, _ = said["COPY"].split()
    project = tomllib.loads((tools.REPOSITORY / source / "pyproject.toml").read_text())["project"]
    installs = next(words for step, words in steps if step == "RUN" and "pip install" in words)
    (extra,) = re.findall(r"shared\[(\w+)\]", installs)
    assert {"onnxruntime", "fastapi", "uvicorn"} <= {
        re.split("[><=]", need)[0] for need in project["optional-dependencies"][extra]
    }
    command, *words = json.loads(said["ENTRYPOINT"])
    assert command in project["scripts"] and words[0] == "serve"
    parser = argparse.ArgumentParser()
    add_model_options(parser, all_threads=True)
    add_serve_options(parser)
    options = serve_options(parser.parse_args(words[1:]))
    assert options.host == "0.0.0.0" and str(options.port) == said["EXPOSE"]
    assert f"http://127.0.0.1:{said['EXPOSE']}/health" in said["HEALTHCHECK"]
    assert said["USER"] not in ("root", "0") and "useradd --system" in text
    assert steps.index(("USER", said["USER"])) < steps.index(("ENTRYPOINT", said["ENTRYPOINT"]))


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

"""The service: right answers alone and in a crowd, clear refusals, a working page, a clean end."""

import http.client
import importlib.util
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from visiondistill_gc import serve, serve_load


def _load(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


tools, driver = _load("vgc_tools"), _load("vgc_browser")
CLASSES = tools.CLASSES
for name in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(name)


@pytest.fixture(scope="module")
def pixels():
    return tools.make_pixels()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tools.save(tmp_path_factory.mktemp("served model") / "m.pdparams")


@pytest.fixture(scope="module")
def truth(pixels):
    return tools.true_probabilities(pixels)


@pytest.fixture(scope="module")
def files(pixels, tmp_path_factory):
    root = tmp_path_factory.mktemp("some pictures")
    for index, one in enumerate(pixels):
        (root / f"{index}.png").write_bytes(tools.encode(one))
    return sorted(root.glob("*.png"))


@pytest.fixture(scope="module")
def service(model):
    """The real command in a process of its own, with low limits."""
    words = [tools.PACKAGE / "serve.py", model, "--port", "0", "--max_mb", "0.05",
             "--max_megapixels", "0.09", "--max_files", "3", "--max_wait_ms", "20"]  # fmt: skip
    with tools.started(words, "/health") as (_, url):
        yield url


def request(url, path, method="GET", body=None, headers=None):
    """Status, headers, decoded JSON (or bytes)."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request(method, path, body=body, headers=headers or {})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    kind = response.headers["content-type"] or ""
    return response.status, response.headers, json.loads(data) if "json" in kind else data


def form(*parts, boundary="xXx"):
    """Body and headers of a form; each part is (field, file name or None, bytes)."""
    body = b""
    for field, name, data in parts:
        line = f'Content-Disposition: form-data; name="{field}"'
        line += "" if name is None else f'; filename="{name}"'
        body += f"--{boundary}\r\n{line}\r\n\r\n".encode() + data + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def probabilities(prediction):
    found = {one["class"]: one["probability"] for one in prediction["top"]}
    return np.array([found[name] for name in CLASSES])


# -- answers --------------------------------------------------------------------------------------


def test_health_and_model(service):
    status, headers, said = request(service, "/health")
    assert status == 200 and said["status"] == "ok" and said["runtime"] == "dygraph"
    assert "default-src 'none'" in headers["content-security-policy"]
    status, _, said = request(service, "/model")
    assert said["class_names"] == list(CLASSES) and said["input_size"] == [32, 32]
    assert said["limits"] == {"bytes": int(0.05 * 2**20), "pixels": 90_000, "files": 3}


def test_an_image_as_the_body(service, files, truth):
    for path, wanted in zip(files, truth, strict=True):
        headers = {"Content-Type": "image/png"}
        status, _, said = request(service, "/predict?top=9", "POST", path.read_bytes(), headers)
        assert status == 200
        (one,) = said["predictions"]
        np.testing.assert_allclose(probabilities(one), wanted, atol=3e-4)
        assert one["class"] == CLASSES[wanted.argmax()] and len(one["top"]) == 4
        assert [t["probability"] for t in one["top"]] == sorted(wanted_of(one), reverse=True)


def wanted_of(one):
    return [t["probability"] for t in one["top"]]


def test_files_in_a_form_are_answered_in_their_order(service, files, truth):
    parts = [("file", f"../a/{path.name}", path.read_bytes()) for path in files[3:6]]
    body, headers = form(*parts)
    status, _, said = request(service, "/predict?top=4", "POST", body, headers)
    assert status == 200
    assert [one["file"] for one in said["predictions"]] == ["3.png", "4.png", "5.png"]
    got = np.array([probabilities(one) for one in said["predictions"]])
    np.testing.assert_allclose(got, truth[3:6], atol=3e-4)


def test_a_crowd_gets_the_answers_of_the_single_image(service, files):
    before = request(service, "/health")[2]
    images = [path.read_bytes() for path in files]
    report = serve_load.load_test(service, images, requests=90, concurrency=12)
    assert report["statuses"] == {"200": 90} and report["differing"] == 0
    assert report["largest_difference"] < 1e-5
    after = request(service, "/health")[2]
    assert after["images"] - before["images"] == 99  # nine alone, ninety at once
    assert after["batches"] - before["batches"] < 60 and after["largest_batch"] > 1


def test_the_load_command(service, files, tmp_path):
    words = (
        files[0].parent,
        "--requests",
        "20",
        "--concurrency",
        "4",
        "--json",
        tmp_path / "o.json",
    )
    done = tools.call(serve_load, service, *words)
    assert done.code == 0, done.err
    assert "20 requests, 4 at once: 20 x 200; 0 answers differ" in done.out
    assert json.loads((tmp_path / "o.json").read_text())["images_per_second"] > 0
    done = tools.call(serve_load, "http://127.0.0.1:9", files[0])
    assert done.code == 1 and done.err.startswith("error: ")


# -- refusals -------------------------------------------------------------------------------------

PNG = tools.encode(tools.make_pixels(1)[0])


@pytest.mark.parametrize(
    ("parts", "status", "code", "said"),
    [
        ([("file", "a.png", b"")], 400, "empty", "a.png: empty file"),
        ([("file", "a.png", b"hello")], 415, "not_an_image", "a.png: not a JPEG"),
        ([("file", "a.png", b"GIF89a" + bytes(50))], 415, "not_an_image", "not a JPEG"),
        ([("file", "a.png", PNG[:200])], 422, "damaged", "a.png: truncated or damaged"),
        ([("file", "a.png", PNG[:20])], 422, "damaged", "header is cut off"),
        ([("image", "a.png", PNG)], 400, "wrong_field", "'image', expected 'file'"),
        ([("file", "a.png", PNG), ("x", None, b"1")], 400, "wrong_field", "'x'"),
        ([("file", None, PNG)], 400, "wrong_field", "holds text, expected a file"),
        ([], 400, "no_file", "expected the field 'file'"),
        ([("file", "a.png", PNG)] * 4, 413, "too_many_files", "Too many files"),
        ([("file", "ok.png", PNG), ("file", "bad.png", b"x")], 415, "not_an_image", "bad.png"),
    ],
)
def test_a_bad_form_is_refused_with_a_reason(service, parts, status, code, said):
    body, headers = form(*parts)
    got, _, answer = request(service, "/predict", "POST", body, headers)
    assert got == status and answer["error"]["code"] == code
    assert said in answer["error"]["message"] and "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "method", "kind", "body", "status", "code"),
    [
        ("/predict", "POST", "application/json", b"{}", 415, "unsupported_media_type"),
        ("/predict", "POST", "image/gif", PNG, 415, "unsupported_media_type"),
        ("/predict", "POST", "", PNG, 415, "unsupported_media_type"),
        ("/predict", "POST", "image/png", b"", 400, "empty"),
        ("/predict", "POST", "multipart/form-data", b"x", 400, "bad_form"),
        ("/predict", "POST", "multipart/form-data; boundary=q", b"nothing", 400, "bad_form"),
        ("/predict?top=0", "POST", "image/png", PNG, 400, "bad_parameter"),
        ("/predict?top=x", "POST", "image/png", PNG, 400, "bad_parameter"),
        ("/predict", "GET", "", None, 405, "wrong_method"),
        ("/nothing", "GET", "", None, 404, "not_found"),
        ("/static/..%2fserve.py", "GET", "", None, 404, "not_found"),
        ("/static/serve.py", "GET", "", None, 404, "not_found"),
        ("/docs", "GET", "", None, 404, "not_found"),
    ],
)
def test_other_requests_are_refused_with_a_reason(service, path, method, kind, body, status, code):
    headers = {"Content-Type": kind} if kind else {}
    got, _, answer = request(service, path, method, body, headers)
    assert (got, answer["error"]["code"]) == (status, code)


def test_too_large_is_refused_with_and_without_a_stated_length(service):
    headers = {"Content-Type": "image/png"}
    for size in (60_000, 2_000_000):
        got, _, answer = request(service, "/predict", "POST", bytes(size), headers)
        assert got == 413 and answer["error"]["code"] == "too_large"
    host, _, port = service.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    parts = iter([bytes(30_000)] * 4)
    connection.request("POST", "/predict", body=parts, headers=headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(service):
    """A bomb: a few bytes that state 60,000 by 60,000 pixels."""
    import zlib

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    bomb += chunk(b"IEND", b"")
    start = time.monotonic()
    got, _, answer = request(service, "/predict", "POST", bomb, {"Content-Type": "image/png"})
    assert got == 413 and answer["error"]["code"] == "too_many_pixels"
    assert "60000 x 60000 pixels" in answer["error"]["message"] and time.monotonic() - start < 2


def test_after_all_that_it_still_answers(service, files, truth):
    headers = {"Content-Type": "image/png"}
    _, _, said = request(service, "/predict?top=4", "POST", files[0].read_bytes(), headers)
    np.testing.assert_allclose(probabilities(said["predictions"][0]), truth[0], atol=3e-4)


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_answers_what_is_open_and_ends_well(model, number):
    words = [tools.PACKAGE / "serve.py", model, "--port", "0", "--max_wait_ms", "1500"]
    with tools.started(words, "/health") as (process, url):
        answers = []

        def ask():
            headers = {"Content-Type": "image/png"}
            answers.append(request(url, "/predict", "POST", PNG, headers)[0])

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        due = time.monotonic() + 10
        while True:  # all five are with the batcher, which waits for more
            said = request(url, "/health")[2]
            if said["waiting"] + said["images"] >= 4 or time.monotonic() > due:
                break
        process.send_signal(number)
        for thread in threads:
            thread.join(20)
        assert answers == [200] * 5
        assert process.wait(20) == 0
        assert process.stdout.read().strip() == "stopped"
        with pytest.raises(OSError):
            urllib.request.urlopen(url + "/health", timeout=2)


def test_errors_of_the_command_are_one_line(model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tools.call(serve, model, "--port", port, "--threads", "1")
    assert done.code == 1 and f"cannot listen on 127.0.0.1:{port}" in done.err
    assert done.err.count("\n") == 1
    for words, code, said in (
        (["--max_mb", "-1"], 2, "above 0"),
        (["--max_wait_ms", "nan"], 2, "above 0"),
        (["--port", "70000"], 2, "0 to 65535"),
        (["--categories", "a", "b"], 1, "categories are a b"),
        (["--runtime", "paddle"], 2, "expected a folder"),
        (["--host", "no.such.host.invalid"], 2, "--host no.such.host.invalid"),
    ):
        done = tools.call(serve, model, *words)
        assert done.code == code and said in done.err, (words, done.err)
    assert tools.call(serve, tmp_path / "none").code == 1


# -- the page -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(driver.find_chromium() is None, reason="no chromium on the path")
def test_the_page_in_a_browser(service, files, truth, tmp_path):
    text = tmp_path / "notes <b>.txt"
    text.write_text("no image")
    idle = "document.body.dataset.state == 'idle'"
    with driver.browser(language="de-DE") as page:
        page.open(service + "/")
        page.wait("document.querySelector('#model').textContent.includes('4 classes')")
        assert "Drop images here" in page.text()
        page.drop([files[0], files[1], text], 500, 200)
        page.wait(f"document.querySelectorAll('.card').length == 3 && {idle}")
        page.choose("#files", [files[2]])
        page.wait(f"document.querySelectorAll('.card').length == 4 && {idle}")
        assert "3 classified, 1 refused" in page.text()
        cards = page.run(
            "[...document.querySelectorAll('.card')].map((c) => [c.querySelector('.file')"
            ".textContent, c.querySelector('.answer').textContent, c.classList.contains('fault'),"
            " [...c.querySelectorAll('progress')].map((p) => p.value)])"
        )
        by_name = {card[0]: card for card in cards}
        for n in range(3):
            name, answer, fault, bars = by_name[f"{n}.png"]
            assert answer == CLASSES[truth[n].argmax()] and not fault
            np.testing.assert_allclose(bars, np.sort(truth[n])[::-1][:3], atol=3e-4)
        name, answer, fault, bars = by_name[text.name]
        assert fault and "not a JPEG, PNG" in answer and bars == []
        assert page.run("document.querySelector('b') === null")  # a file name is no HTML
        page.run("document.querySelector('#language').click()")
        assert "把图片拖到这里" in page.text()
        assert page.screenshot(tmp_path / "page.png")[:4] == b"\x89PNG"
        outside = [u for u in page.requests if not u.startswith((service, f"blob:{service}"))]
        assert outside == []
        # The refused file is in the log of every browser; nothing else is.
        assert all("415" in error for error in page.errors) and len(page.errors) == 1


@pytest.mark.slow
@pytest.mark.skipif(driver.find_chromium() is None, reason="no chromium on the path")
def test_a_chinese_browser_gets_a_chinese_page(service):
    with driver.browser(language="zh-CN") as page:
        page.open(service + "/")
        page.wait("document.body.innerText.includes('4 个类别')")
        assert page.run("document.documentElement.lang") == "zh" and page.errors == []


def test_the_page_is_packed_and_asks_for_nothing_else():
    from visiondistill_gc import serve_app

    names = {path.name for path in serve_app.STATIC.iterdir()}
    assert names == set(serve_app.PAGE)
    for path in serve_app.STATIC.iterdir():
        assert "://" not in path.read_text(encoding="utf-8"), path


def test_the_script_says_what_is_missing(model, tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ImportError('no', name='uvicorn')")
    done = subprocess.run(
        [sys.executable, "-c",
         "import sys; sys.path[:0] = sys.argv[1:4]; from visiondistill_gc import serve;"
         "from shared_core.runs import run_command; sys.exit(run_command(serve.main, ['x']))",
         str(tmp_path), str(tools.REPOSITORY / "packages"), str(tools.REPOSITORY / "shared")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "visiondistill_gc[serve]" in done.stderr
    assert done.stderr.count("\n") == 1

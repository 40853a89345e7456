"""The service: right answers alone and in a crowd, clear refusals, a working page, a clean end."""

import asyncio
import http.client
import io
import json
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import browser
import numpy as np
import pytest
import tiny_models as tiny
from PIL import Image

from shared_core import smallvision
from shared_core.deploy.options import ServeOptions
from shared_core.deploy.predictor import Outputs, open_model
from shared_core.deploy.service import app as app_module
from shared_core.deploy.service import command
from shared_core.deploy.service.uploads import Limits
from shared_core.runs import run_command

for name in ("onnxruntime", "fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(name)

IMAGES = tiny.make_images(9)
PNG = tiny.encode(IMAGES[0])
LEFT, TRUTH = tiny.exits_by_hand(IMAGES)
ROOT = Path(smallvision.__file__).parents[1]


@contextmanager
def started(*words):
    """The real command in a process of its own: the process, and the service's address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shared_core.smallvision", "serve", *map(str, words), "--port", "0"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), line
        url = line.split()[-1].rstrip("/")
        due = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(url + "/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < due and process.poll() is None
                time.sleep(0.02)
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return tiny.save_chain(tmp_path_factory.mktemp("served chain"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("some pictures"), IMAGES)


@pytest.fixture(scope="module")
def service(chain):
    """A chain with low limits."""
    words = (
        "--max-mb",
        "0.05",
        "--max-megapixels",
        "0.09",
        "--max-files",
        "3",
        "--max-wait-ms",
        "20",
    )
    with started(chain, *words) as (_, url):
        yield url


def connect(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return http.client.HTTPConnection(host, int(port), timeout=30)


def request(url, path, method="GET", body=None, headers=None):
    """Status, headers, decoded JSON (or bytes)."""
    connection = connect(url)
    connection.request(method, path, body=body, headers=headers or {})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    kind = response.headers["content-type"] or ""
    return response.status, response.headers, json.loads(data) if "json" in kind else data


def post(url, data, path="/predict", kind="image/png"):
    return request(url, path, "POST", data, {"Content-Type": kind} if kind else {})


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
    return np.array([found[name] for name in tiny.CLASSES])


# -- answers --------------------------------------------------------------------------------------


def test_health_and_model(service):
    status, headers, said = request(service, "/health")
    assert status == 200 and said["status"] == "ok" and said["runtime"] == "onnx"
    assert "default-src 'none'" in headers["content-security-policy"]
    _, _, said = request(service, "/model")
    assert said["class_names"] == list(tiny.CLASSES) and said["input_size"] == [8, 8]
    assert said["limits"] == {"bytes": int(0.05 * 2**20), "pixels": 90_000, "files": 3}
    assert [one["exit"] for one in said["exits"]] == ["block 2", "block 5", "final"]
    assert [one["macs"] for one in said["exits"]] == list(tiny.MACS)
    assert said["policy"]["thresholds"] == [0.6] and said["task"] == "classify"
    assert request(service, "/openapi.json")[0] == 200


def test_an_image_as_the_body(service, files):
    for n, path in enumerate(files):
        status, _, said = post(service, path.read_bytes(), "/predict?top=9")
        assert status == 200
        (one,) = said["predictions"]
        np.testing.assert_allclose(probabilities(one), TRUTH[n], atol=1e-5)
        assert one["class"] == tiny.CLASSES[TRUTH[n].argmax()] and len(one["top"]) == 4
        assert [t["probability"] for t in one["top"]] == sorted(
            (t["probability"] for t in one["top"]), reverse=True
        )
        assert one["exit_index"] == LEFT[n] and one["macs"] == tiny.MACS[LEFT[n]]
        assert {key: said[key] for key in ("class", "probability", "top")} == {
            key: one[key] for key in ("class", "probability", "top")
        }  # the one answer also stands at the top


@pytest.mark.parametrize(
    "kind", ["", "application/octet-stream", "application/x-www-form-urlencoded", "image/x-png"]
)
def test_what_tools_say_of_a_file_as_the_body_is_taken(service, kind):
    status, _, said = post(service, PNG, kind=kind)
    assert status == 200 and said["class"] == tiny.CLASSES[TRUTH[0].argmax()]


def test_a_gif_is_an_image_as_it_is_for_predict(service):
    data = io.BytesIO()
    Image.fromarray(IMAGES[0]).convert("P").save(data, "GIF")
    again = io.BytesIO()
    Image.open(io.BytesIO(data.getvalue())).convert("RGB").save(again, "PNG")
    status, _, answer = post(service, data.getvalue(), kind="image/gif")
    assert status == 200
    assert answer["predictions"] == post(service, again.getvalue())[2]["predictions"]


def test_files_in_a_form_are_answered_in_their_order(service, files):
    names = ["../a/3.png", "..\\b\\4.png", "5.png"]
    parts = [("file", name, files[n].read_bytes()) for n, name in zip((3, 4, 5), names)]  # noqa: B905
    body, headers = form(*parts)
    status, _, said = request(service, "/predict?top=4", "POST", body, headers)
    assert status == 200 and "class" not in said
    assert [one["file"] for one in said["predictions"]] == ["3.png", "4.png", "5.png"]
    got = np.array([probabilities(one) for one in said["predictions"]])
    np.testing.assert_allclose(got, TRUTH[3:6], atol=1e-5)
    assert [one["exit_index"] for one in said["predictions"]] == LEFT[3:6].tolist()


def test_a_crowd_gets_the_answers_of_the_single_image(service, files):
    data = [path.read_bytes() for path in files]
    before = request(service, "/health")[2]
    with ThreadPoolExecutor(12) as pool:
        said = list(pool.map(lambda n: post(service, data[n % 9], "/predict?top=4"), range(90)))
    assert {status for status, _, _ in said} == {200}
    got = np.array([probabilities(one["predictions"][0]) for _, _, one in said])
    np.testing.assert_allclose(got, TRUTH[np.arange(90) % 9], atol=1e-5)
    after = request(service, "/health")[2]
    assert after["images"] - before["images"] == 90
    assert after["batches"] - before["batches"] < 60 and after["largest_batch"] > 1


def test_an_open_connection_is_answered_at_once(chain):
    """Without TCP_NODELAY each answer on an open connection takes 40 ms more."""
    with started(chain, "--max-wait-ms", "0") as (_, url):
        connection = connect(url)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            connection.request("POST", "/predict", body=PNG, headers={"Content-Type": "image/png"})
            connection.getresponse().read()
            times.append(time.perf_counter() - start)
        connection.close()
        assert statistics.median(times) < 0.030


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "status", "code", "said"),
    [
        ([("file", "a.png", b"")], 400, "empty", "a.png: empty file"),
        ([("file", "a.png", b"hello")], 415, "not_an_image", "a.png: not a JPEG"),
        ([("file", "a.png", b"GIF89a" + bytes(50))], 422, "damaged", "states 0 x 0 pixels"),
        ([("file", "a.png", PNG[:90])], 422, "damaged", "a.png: truncated or damaged"),
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
    images = request(service, "/health")[2]["images"]
    body, headers = form(*parts)
    got, _, answer = request(service, "/predict", "POST", body, headers)
    assert got == status and answer["error"]["code"] == code
    assert said in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert request(service, "/health")[2]["images"] == images  # nothing was computed


@pytest.mark.parametrize(
    ("path", "method", "kind", "body", "status", "code"),
    [
        ("/predict", "POST", "application/json", b"{}", 415, "unsupported_media_type"),
        ("/predict", "POST", "text/plain", PNG, 415, "unsupported_media_type"),
        ("/predict", "POST", "image/gif", b"GIF89a" + bytes(50), 422, "damaged"),
        ("/predict", "POST", "image/png", b"", 400, "empty"),
        ("/predict", "POST", "multipart/form-data", b"x", 400, "bad_form"),
        ("/predict", "POST", "multipart/form-data; boundary=q", b"nothing", 400, "bad_form"),
        ("/predict?top=0", "POST", "image/png", PNG, 400, "bad_parameter"),
        ("/predict?top=x", "POST", "image/png", PNG, 400, "bad_parameter"),
        ("/predict", "GET", "", None, 405, "wrong_method"),
        ("/nothing", "GET", "", None, 404, "not_found"),
        ("/static/..%2fapp.py", "GET", "", None, 404, "not_found"),
        ("/static/app.py", "GET", "", None, 404, "not_found"),
        ("/docs", "GET", "", None, 404, "not_found"),
    ],
)
def test_other_requests_are_refused_with_a_reason(service, path, method, kind, body, status, code):
    headers = {"Content-Type": kind} if kind else {}
    got, _, answer = request(service, path, method, body, headers)
    assert (got, answer["error"]["code"]) == (status, code)


def test_too_large_is_refused_with_and_without_a_stated_length(service):
    for size in (60_000, 2_000_000):
        got, _, answer = post(service, bytes(size))
        assert got == 413 and answer["error"]["code"] == "too_large"
    connection = connect(service)
    parts = iter([bytes(30_000)] * 4)
    headers = {"Content-Type": "image/png"}
    connection.request("POST", "/predict", body=parts, headers=headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_length_of_five_thousand_digits_is_refused(service):
    host, _, port = service.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {'9' * 5000}\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(200).split()[1] in (b"400", b"413")
    assert request(service, "/health")[0] == 200


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(service):
    """A bomb: a few bytes that state 60,000 by 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    bomb += chunk(b"IEND", b"")
    start = time.monotonic()
    got, _, answer = post(service, bomb)
    assert got == 413 and answer["error"]["code"] == "too_many_pixels"
    assert "60000 x 60000 pixels" in answer["error"]["message"] and time.monotonic() - start < 2


def test_after_all_that_it_still_answers(service):
    _, _, said = post(service, PNG, "/predict?top=4")
    np.testing.assert_allclose(probabilities(said["predictions"][0]), TRUTH[0], atol=1e-5)


# -- in this process: ASGI without a socket -------------------------------------------------------


class Waiting:
    """A predictor that waits until it may go on, and says how many images it was asked."""

    def __init__(self, predictor, *, broken=False):
        self.facts, self.view, self.runtime = predictor.facts, predictor.view, "waiting"
        self.exit_name, self.macs = predictor.exit_name, predictor.macs
        self.policy_state = predictor.policy_state
        self.go, self.asked, self.broken = threading.Event(), 0, broken

    def outputs(self, images):
        if images.any():  # not the warm-up's black ones
            self.go.wait(20)
            self.asked += len(images)
            if self.broken:
                raise RuntimeError("the network is broken")
        return Outputs(np.full((len(images), 4), 0.25), None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return open_model(tiny.save_model(tmp_path_factory.mktemp("plain")))


def talk(app, conversation):
    """Run ``conversation(client)`` with the application's lifespan."""
    httpx = pytest.importorskip("httpx")

    async def run():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x", timeout=30) as client,
        ):
            return await conversation(client)

    return asyncio.run(run())


def ask(client, count=1):
    files = [("file", (f"{n}.png", PNG)) for n in range(count)]
    return asyncio.create_task(client.post("/predict", files=files))


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


def test_a_refused_request_is_computed_for_nobody(plain, monkeypatch):
    """Room for all its images, or 503: before any of them is decoded."""
    network = Waiting(plain)
    decoded = []
    real = app_module.view_of_upload
    monkeypatch.setattr(
        app_module, "view_of_upload", lambda *a, **k: (decoded.append(1), real(*a, **k))[1]
    )
    app = app_module.create_app(network, max_batch=1, max_queue=4)

    async def conversation(client):
        health = lambda: client.get("/health")  # noqa: E731
        first = ask(client)
        for _ in range(500):
            said = (await health()).json()
            if said["waiting"] == 0 and len(decoded) == 1 and said["open_requests"] == 1:
                break
            await asyncio.sleep(0.005)
        kept = ask(client, 3)
        await until(lambda: len(decoded) == 4)
        refused = [await ask(client, 2) for _ in range(3)]
        assert len(decoded) == 4
        last = ask(client, 1)
        await until(lambda: len(decoded) == 5)
        network.go.set()
        return refused, [await one for one in (first, kept, last)], await ask(client, 5)

    refused, answered, never = talk(app, conversation)
    for one in refused:
        assert one.status_code == 503 and one.headers["retry-after"] == "1"
        assert one.json()["error"]["code"] == "busy"
    assert [one.status_code for one in answered] == [200] * 3
    assert never.status_code == 413 and "at most the 4" in never.json()["error"]["message"]
    assert network.asked == 5


def test_a_bad_image_frees_the_room_that_its_request_took(plain):
    app = app_module.create_app(plain, max_queue=3)

    async def conversation(client):
        files = [("file", ("a.png", PNG)), ("file", ("b.png", PNG[:90]))]
        statuses = [(await client.post("/predict", files=files)).status_code for _ in range(4)]
        return statuses, (await ask(client, 3)).status_code

    assert talk(app, conversation) == ([422] * 4, 200)


def test_too_many_open_requests_and_too_slow_ones_are_refused(plain):
    network = Waiting(plain)
    limits = Limits(max_requests=2, answer_seconds=0.3, read_seconds=0.2)
    app = app_module.create_app(network, max_batch=1, limits=limits)

    async def conversation(client):
        tasks = [ask(client), ask(client)]
        await asyncio.sleep(0.1)
        crowd = await ask(client)
        late = [await task for task in tasks]
        network.go.set()

        async def dribble():
            yield PNG[:10]
            await asyncio.sleep(1)

        headers = {"Content-Type": "image/png"}
        slow = await client.post("/predict", content=dribble(), headers=headers)
        return crowd, late, slow, await ask(client)

    crowd, late, slow, after = talk(app, conversation)
    assert crowd.status_code == 503 and "2 requests are open" in crowd.json()["error"]["message"]
    assert [one.status_code for one in late] == [503, 503]
    assert "no answer within 0.3 seconds" in late[0].json()["error"]["message"]
    assert slow.status_code == 408 and after.status_code == 200
    assert network.asked == 2  # the second of the late ones was taken out of the queue


def test_a_failure_of_the_network_is_500_and_the_next_is_answered(plain):
    network = Waiting(plain, broken=True)
    network.go.set()

    async def conversation(client):
        bad = (await ask(client, 2)).status_code
        network.broken = False
        return bad, (await ask(client)).status_code

    assert talk(app_module.create_app(network), conversation) == (500, 200)


def test_unknown_and_features_are_answered(tmp_path):
    facts = tiny.make_facts(unknown_threshold=1.0)
    app = app_module.create_app(open_model(tiny.save_model(tmp_path / "a", facts)))
    said = talk(app, ask).json()
    assert said["class"] == "unknown" and said["top"][0]["class"] in tiny.CLASSES
    facts = tiny.make_facts(task="embed", activation="none", class_names=())
    app = app_module.create_app(open_model(tiny.save_model(tmp_path / "b", facts)))
    (one,) = talk(app, ask).json()["predictions"]
    np.testing.assert_allclose(one["feature"], tiny.logits_by_hand(IMAGES[:1])[0], atol=1e-5)


def test_options_of_the_command_reach_the_service(plain, monkeypatch):
    seen = {}
    monkeypatch.setattr(app_module, "create_app", lambda predictor, **words: seen.update(words))
    monkeypatch.setattr(command, "listen", lambda host, port: (_ for _ in ()).throw(OSError()))
    options = ServeOptions(
        max_batch=3, max_wait_ms=7, max_queue=9, max_mb=0.5, max_megapixels=2.5, max_files=4,
        max_requests=5,
    )  # fmt: skip
    with pytest.raises(OSError):
        command.serve(plain, options)
    assert (seen["max_batch"], seen["max_wait"], seen["max_queue"]) == (3, 0.007, 9)
    limits = seen["limits"]
    assert (limits.max_bytes, limits.max_pixels) == (2**19, 2_500_000)
    assert (limits.max_files, limits.max_requests) == (4, 5)


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_answers_what_is_open_and_ends_well(chain, number):
    with started(chain, "--max-wait-ms", "1000") as (process, url):
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(post(url, PNG)[0])) for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        due = time.monotonic() + 10
        while True:  # all five are with the batcher, which waits for more
            said = request(url, "/health")[2]
            if said["waiting"] + said["images"] >= 5 or time.monotonic() > due:
                break
        process.send_signal(number)
        for thread in threads:
            thread.join(20)
        assert answers == [200] * 5
        assert process.wait(20) == 0
        assert process.stdout.read().strip() == "stopped"
        with pytest.raises(OSError):
            urllib.request.urlopen(url + "/health", timeout=2)


def test_errors_of_the_command_are_one_line(chain, tmp_path, capsys):
    def call(*words):
        try:
            code = run_command(smallvision.main, ["serve", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = call(chain, "--port", port)
    assert code == 1 and f"cannot listen on 127.0.0.1:{port}" in err and err.count("\n") == 1
    for words, said in (
        (["--max-mb", "-1"], "expected"),
        (["--max-wait-ms", "nan"], "expected"),
        (["--port", "70000"], "[0, 65535]"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ):
        code, err = call(chain, *words)
        assert code == 2 and said in err, (words, err)
    assert call(tmp_path / "none")[0] == 1


def test_the_command_says_what_is_missing(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"uvicorn.*shared-core\[serve\]"):
        command.serve(plain, ServeOptions())


# -- the page -------------------------------------------------------------------------------------


def test_the_page_is_packed_and_asks_for_nothing_else(service):
    names = {path.name for path in app_module.STATIC.iterdir()}
    assert names == set(app_module.PAGE)
    for path in app_module.STATIC.iterdir():
        assert "://" not in path.read_text(encoding="utf-8"), path
        assert "innerHTML" not in path.read_text(encoding="utf-8")  # names are no HTML
    packed = (ROOT / "pyproject.toml").read_text()
    for path, kind in app_module.PAGE.items():
        assert f'"shared_core/deploy/service/static/{path}"' in packed
        status, headers, _ = request(service, f"/static/{path}")
        assert status == 200 and headers["content-type"] == kind


@pytest.mark.skipif(browser.find_chromium() is None, reason="no chromium on the path")
def test_the_page_in_a_browser(service, files, tmp_path):
    text = tmp_path / "notes <b>.txt"
    text.write_text("no image")
    idle = "document.body.dataset.state == 'idle'"
    with browser.browser(language="de-DE") as page:
        page.open(service + "/")
        page.wait("document.querySelector('#model').textContent.includes('4 classes')")
        assert "Drop images here" in page.text() and page.run("document.title") == "tiny"
        page.drop([files[0], files[1], text], 500, 200)
        page.wait(f"document.querySelectorAll('.card').length == 3 && {idle}")
        page.choose("#files", [files[2]])
        page.wait(f"document.querySelectorAll('.card').length == 4 && {idle}")
        assert "3 classified, 1 refused" in page.text()
        cards = page.run(
            "[...document.querySelectorAll('.card')].map((c) => [c.querySelector('.file')"
            ".textContent, c.querySelector('.answer').textContent, c.classList.contains('fault'),"
            " [...c.querySelectorAll('progress')].map((p) => p.value),"
            " c.querySelector('.exit').textContent])"
        )
        by_name = {card[0]: card for card in cards}
        for n in range(3):
            _, answer, fault, bars, left = by_name[f"{n}.png"]
            assert answer == tiny.CLASSES[TRUTH[n].argmax()] and not fault
            np.testing.assert_allclose(bars, np.sort(TRUTH[n])[::-1][:3], atol=1e-4)
            share = f"{round(tiny.MACS[LEFT[n]] / 7)} % of the work"
            early = f"left early at block {(2, 5, 0)[LEFT[n]]}, {share}"
            assert left == ("ran to the end" if LEFT[n] == 2 else early)
        _, answer, fault, bars, _ = by_name[text.name]
        assert fault and "not a JPEG, PNG" in answer and bars == []
        assert page.run("document.querySelector('b') === null")  # names are no HTML
        page.run("document.querySelector('#language').click()")
        assert "把图片拖到这里" in page.text()
        assert page.screenshot(tmp_path / "page.png")[:4] == b"\x89PNG"
        outside = [u for u in page.requests if not u.startswith((service, f"blob:{service}"))]
        assert outside == []
        # The refused file is in the log of every browser; nothing else is.
        assert all("415" in error for error in page.errors) and len(page.errors) == 1


@pytest.mark.skipif(browser.find_chromium() is None, reason="no chromium on the path")
def test_a_chinese_browser_gets_a_chinese_page(service):
    with browser.browser(language="zh-CN") as page:
        page.open(service + "/")
        page.wait("document.body.innerText.includes('4 个类别')")
        assert page.run("document.documentElement.lang") == "zh" and page.errors == []

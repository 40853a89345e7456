"""The VisualDL page opens in any browser, shows the run's curves, and asks for nothing outside."""

import socket
import urllib.request
from pathlib import Path

import browser as driver
import numpy as np
import pytest
import vgc_tools as tools

from shared_core.runs import StageLog
from visiondistill_gc import visualdl_page
from visiondistill_gc.utils.visual_log import VisualLog

pytest.importorskip("visualdl")
EPOCHS = 6


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two folds, written by training's own log."""
    root = tmp_path_factory.mktemp("a run") / "logs"
    rng, net = np.random.default_rng(0), tools.make_net()
    labels = rng.integers(0, 4, 50)
    for fold in (0, 1):
        log = VisualLog(root / f"fold_{fold}")
        log.begin(f"fold {fold}", StageLog(tmp_path_factory.mktemp("metrics")))
        for epoch in range(EPOCHS):
            values = {"loss": 1 / (1 + epoch) + fold, "acc": 1 - 1 / (2 + epoch + fold)}
            log.epoch(epoch, values, values)
        log.image("train/views", rng.integers(0, 256, (32, 48, 3)).astype(np.uint8))
        scores = rng.random((50, 4)) + np.eye(4)[labels]
        log.pr_curves(scores / scores.sum(1, keepdims=True), labels, tools.CLASSES, step=EPOCHS)
        log.histograms(net.classifier, step=EPOCHS)
        log.close()
    return root


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(driver.find_chromium() is None, reason="no chromium on the path")
def test_the_page_shows_the_run_s_curves(logs, tmp_path):
    port = free_port()
    words = [tools.PACKAGE / "visualdl_page.py", "--logdir", logs, "--port", port]
    with tools.started(words, "/alive") as (_, url), driver.browser(language="de-DE") as page:
        page.open(url + "/")  # a German browser: `visualdl --logdir` alone answers it with 500
        page.wait("document.querySelectorAll('canvas').length >= 2")
        text = page.text()
        assert "Select Runs" in text  # the page is in English
        for what in ("train", "fold_0", "fold_1"):  # the charts' own titles are drawn, not text
            assert what in text, what
        for fold in (0, 1):
            for tag in ("train%2Floss", "train%2Facc"):
                asked = [u for u in page.requests if f"fold_{fold}&tag={tag}" in u]
                assert asked, (fold, tag)
        # Something is drawn: ink of both runs' colours, not an empty frame.
        page.wait(
            "[...document.querySelectorAll('canvas')].some((c) => { const d = c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data; const seen = new Set();"
            " for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200 && Math.max(d[i], d[i + 1],"
            " d[i + 2]) - Math.min(d[i], d[i + 1], d[i + 2]) > 120) seen.add(d[i] >> 5);"
            " return seen.size >= 2; })"
        )
        assert page.screenshot(tmp_path / "scalars.png")[:4] == b"\x89PNG"
        for tab, group, element in (
            ("image", "train", "img"),
            ("histogram", "weights", "canvas"),
            ("pr-curve", "pr", "canvas"),
        ):  # fmt: skip
            page.open(f"{url}/app/{tab}")
            page.wait(f"document.querySelectorAll('{element}').length >= 2")
            assert group in page.text().split() and "fold_1" in page.text()
            assert any(f"api/{tab}/list" in u and f"tag={group}%2F" in u for u in page.requests)
        outside = [u for u in page.requests if not u.startswith((url, "data:", f"blob:{url}"))]
        assert outside == [] and page.errors == []


def test_the_server_answers_a_request_without_a_language(logs):
    import json

    port = free_port()
    words = [tools.PACKAGE / "visualdl_page.py", "--logdir", logs, "--port", port]
    with tools.started([*words, "--language", "zh"], "/alive") as (_, url):
        with urllib.request.urlopen(f"{url}/app/index", timeout=10) as answer:
            assert answer.status == 200 and "vdl_lng=zh" in answer.headers["Set-Cookie"]
            assert b"63a600296f8a71f576c4806376a9245b" not in answer.read()  # its counter's key
        with urllib.request.urlopen(f"{url}/app/api/scalar/tags", timeout=10) as answer:
            found = json.load(answer)["data"]
    assert [Path(run).name for run in found["runs"]] == ["fold_0", "fold_1"]
    assert set(found["tags"][0]) == {"train/loss", "train/acc", "val/loss", "val/acc"}


def test_settings_turn_off_what_goes_outside(logs):
    chosen = visualdl_page.settings([logs])
    assert chosen["telemetry"] is False and chosen["language"] == "en"
    assert chosen["host"] == "127.0.0.1" and chosen["open_browser"] is False
    installers = {"x2paddle", "fastdeploy_server", "fastdeploy_client"}
    assert not installers & set(chosen["component_tabs"])


def test_bad_input_is_one_line(logs, tmp_path):
    for words, code, said in (
        (["--logdir", tmp_path / "none"], 1, "does not exist"),
        (["--logdir", tmp_path], 1, "holds no VisualDL log"),
        (["--runs", tmp_path], 1, "expected a run there"),
        (["--logdir", logs, "--port", "0"], 2, "[1, 65535]"),
        (["--logdir", logs, "--host", "no.such.host.invalid"], 2, "address of this machine"),
        (["--logdir", logs, "--language", "de"], 2, "invalid choice"),
    ):
        done = tools.call(visualdl_page, *words)
        assert done.code == code and said in done.err, done.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tools.call(visualdl_page, "--logdir", logs, "--port", port)
    assert done.code == 1 and f"cannot listen on 127.0.0.1:{port}" in done.err


def test_the_newest_run_is_the_default(tmp_path):
    import os

    for age, name in ((30, "a"), (10, "b"), (20, "c")):
        folder = tmp_path / name / "logs" / "fold_0"
        folder.mkdir(parents=True)
        (folder / "vdlrecords.1.log").write_bytes(b"")
        os.utime(folder / "vdlrecords.1.log", (1e9 - age, 1e9 - age))
    (tmp_path / "d" / "logs").mkdir(parents=True)  # empty, however new
    assert visualdl_page.newest_logs(tmp_path) == tmp_path / "b" / "logs"

"""Parts of the service alone: what an upload's header says, its limits, and the batcher."""

import asyncio
import importlib.util
import struct
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from visiondistill_gc import deploy_model
from visiondistill_gc.serve_batcher import Batcher, BusyError
from visiondistill_gc.serve_upload import Limits, UploadError, stated_size, view_of_upload

_path = Path(__file__).with_name("vgc_tools.py")
_spec = importlib.util.spec_from_file_location("vgc_tools", _path)
tools = importlib.util.module_from_spec(_spec)
sys.modules["vgc_tools"] = tools  # its dataclasses look themselves up
_spec.loader.exec_module(tools)

KINDS = (".jpg", ".png", ".bmp", ".tiff", ".webp")
PNG = tools.encode(tools.make_pixels(1)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 13), (40, 300)])
def test_the_stated_size_is_that_of_the_pixels(kind, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    assert stated_size(tools.encode(image, kind)) == shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_header_is_an_error_of_ours(kind):
    data = tools.encode(tools.make_pixels(1)[0], kind)
    for end in range(3, 40):
        try:
            stated_size(data[:end])
        except ValueError:
            continue
        assert end > 12  # enough was there to say it


def test_lossless_and_extended_webp_state_their_size():
    lossless = (
        b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + struct.pack("<I", (99) | (49 << 14)) + b"\0" * 8
    )
    assert stated_size(lossless) == (50, 100)
    sides = (299).to_bytes(3, "little") + (199).to_bytes(3, "little")
    assert stated_size(b"RIFF\0\0\0\0WEBPVP8X\0\0\0\0\0\0\0\0" + sides) == (200, 300)


def test_limits_of_an_upload():
    view = deploy_model.eval_view(8)
    limits = Limits(max_pixels=40 * 40)
    assert view_of_upload(PNG, name="a", view=view, limits=limits).shape == (8, 8, 3)
    with pytest.raises(UploadError, match="40 x 40 pixels, expected at most 1599") as caught:
        view_of_upload(PNG, name="a", view=view, limits=Limits(max_pixels=1599))
    assert caught.value.status == 413


# -- batches --------------------------------------------------------------------------------------


class Slow:
    """Sums of images; waits until it may go on."""

    def __init__(self):
        self.go, self.sizes = threading.Event(), []

    def __call__(self, images):
        self.go.wait(10)
        self.sizes.append(len(images))
        return images.reshape(len(images), -1).sum(axis=1, keepdims=True)


def test_images_that_wait_become_batches_and_keep_their_answers():
    run = Slow()
    batcher = Batcher(run, max_batch=4, max_wait=0.0, max_queue=100)
    images = [np.full((2, 2, 3), n, np.int64) for n in range(10)]
    answers = [batcher.submit(image) for image in images]
    run.go.set()
    assert [a.result(10)[0] for a in answers] == [12 * n for n in range(10)]
    assert sum(run.sizes) == 10 and max(run.sizes) == 4 and len(run.sizes) <= 4
    assert (batcher.images, batcher.largest) == (10, 4)
    batcher.close()


def test_a_full_queue_refuses_and_close_answers_what_waits():
    run = Slow()
    batcher = Batcher(run, max_batch=1, max_wait=0.0, max_queue=3)
    answers = [batcher.submit(np.ones((1, 1, 3)))]
    while batcher.waiting:  # the first is being worked on
        time.sleep(0.001)
    answers += [batcher.submit(np.ones((1, 1, 3))) for _ in range(3)]
    with pytest.raises(BusyError, match="3 images are waiting"):
        batcher.submit(np.ones((1, 1, 3)))
    assert answers[2].cancel()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.02)
    with pytest.raises(BusyError, match="shutting down"):
        batcher.submit(np.ones((1, 1, 3)))
    run.go.set()
    closing.join(10)
    assert [answers[n].result(1)[0] for n in (0, 1, 3)] == [3, 3, 3]
    with pytest.raises(CancelledError):
        answers[2].result(1)
    batcher.close()  # twice does no harm


def test_a_failure_of_the_network_reaches_those_who_wait_and_nobody_else():
    def run(images):
        if images.max() > 1:
            raise RuntimeError("broken")
        return images[:, 0, 0, :1]

    batcher = Batcher(run, max_batch=1)
    bad, good = batcher.submit(np.full((1, 1, 3), 5)), batcher.submit(np.ones((1, 1, 3)))
    with pytest.raises(RuntimeError, match="broken"):
        bad.result(10)
    assert good.result(10) == [1]
    batcher.close()


def test_a_batcher_refuses_nonsense():
    for words in ({"max_batch": 0}, {"max_wait": -1}, {"max_queue": 0}, {"max_wait": float("nan")}):
        with pytest.raises(ValueError, match="expected at least"):
            Batcher(lambda x: x, **words)


def test_a_full_queue_is_503_with_retry_after(tmp_path):
    """In this process, with a network that waits: ASGI without a socket."""
    httpx = pytest.importorskip("httpx")

    pytest.importorskip("fastapi")
    from visiondistill_gc.serve_app import create_app

    run = Slow()
    classifier = deploy_model.load_classifier(tools.save(tmp_path / "m.pdparams"))
    classifier.probabilities = lambda images: (run(images), np.full((len(images), 4), 0.25))[1]
    app = create_app(classifier, max_batch=1, max_queue=1, limits=Limits(max_requests=3))

    async def ask():
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
        ):

            def post():
                headers = {"Content-Type": "image/png"}
                return asyncio.create_task(client.post("/predict", content=PNG, headers=headers))

            tasks = []
            for _ in range(3):  # worked on, waiting, refused
                tasks.append(post())
                await asyncio.sleep(0.2)
            refused = await tasks[2]
            run.go.set()
            return refused, [await task for task in tasks[:2]]

    refused, answered = asyncio.run(ask())
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "busy"
    assert [a.status_code for a in answered] == [200, 200]

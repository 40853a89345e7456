"""Parts of the service alone: what an upload's header says, its limits, and the batcher."""

import struct
import threading
import time
import tracemalloc
from concurrent.futures import CancelledError

import cv2
import numpy as np
import pytest

from shared_core.datasets import EvalView
from shared_core.deploy.service.batcher import Batcher, BusyError
from shared_core.deploy.service.uploads import (
    Limits,
    UploadError,
    check_upload,
    stated_size,
    view_of_upload,
)

KINDS = (".jpg", ".png", ".bmp", ".tiff", ".webp")


def encode(image, kind=".png", *options):
    return cv2.imencode(kind, image[..., ::-1], list(options))[1].tobytes()


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 13), (40, 300)])
def test_the_stated_size_is_that_of_the_pixels(kind, shape):
    assert stated_size(encode(noise(*shape), kind)) == shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_header_is_an_error_of_ours(kind):
    data = encode(noise(20, 20), kind)
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


def tiff(*tags):
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def test_a_tiff_that_states_two_sizes_is_refused():
    """libtiff takes the first, other readers the last: 10x8 here is 14000x14000 there."""
    assert stated_size(tiff((256, 10), (257, 8))) == (8, 10)
    with pytest.raises(ValueError, match="twice"):
        stated_size(tiff((256, 14000), (257, 14000), (256, 10), (257, 8)))


def test_a_small_header_cannot_ask_for_much_memory():
    """An EXIF block whose 5,000 tags all claim its 60,000 bytes."""
    entries = b"".join(struct.pack("<HHII", 1000 + n, 1, 60_000, 8) for n in range(5000))
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + entries
    block += bytes(65_000 - len(block))
    image = encode(noise(8, 8), ".jpg")
    data = image[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + image[2:]
    tracemalloc.start()
    try:
        check_upload(data, name="a", limits=Limits())
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def refused(data, **limits):
    with pytest.raises(UploadError) as caught:
        check_upload(data, name="a", limits=Limits(**limits))
    return caught.value


def test_pixels_are_counted_before_they_are_decoded():
    data = encode(noise(40, 40))
    check_upload(data, name="a", limits=Limits(max_pixels=1600))
    error = refused(data, max_pixels=1599)
    assert error.status == 413 and "40 x 40 pixels, expected at most 1599" in str(error)


def test_scans_of_a_jpeg_are_counted_before_they_are_decoded():
    image = noise(64, 64)
    progressive = encode(image, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    scans = progressive.count(b"\xff\xda")
    assert scans > 3
    check_upload(progressive, name="a", limits=Limits(max_scans=scans))
    assert refused(progressive, max_scans=scans - 1).code == "too_many_scans"
    # Each scan goes over the whole picture: many scans of a large one are too many sooner.
    many = progressive[:-2] + b"\xff\xda\x00\x02" * 100 + progressive[-2:]
    assert refused(many, max_pixels=64 * 64).status == 413
    check_upload(encode(image, ".png") + b"\xff\xda" * 900, name="a", limits=Limits())
    assert all(encode(image, ".jpg").count(b"\xff\xda") == 1 for _ in range(3))


def test_a_view_of_an_upload_is_that_of_evaluation():
    image, view = noise(60, 80), EvalView(16, dct_scaled=False)
    for kind, off in ((".png", 0), (".jpg", 2)):
        data = encode(image, kind)
        got = view_of_upload(data, name="a", view=view)
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert got.shape == (16, 16, 3)
        np.testing.assert_allclose(got, view(np.ascontiguousarray(decoded)), atol=off)
    with pytest.raises(UploadError) as caught:
        view_of_upload(encode(image)[:300], name="a", view=view)
    assert caught.value.status == 422


# -- batches --------------------------------------------------------------------------------------


class Slow:
    """Sums of images; waits until it may go on."""

    def __init__(self):
        self.go, self.sizes = threading.Event(), []

    def __call__(self, images):
        self.go.wait(10)
        self.sizes.append(len(images))
        return images.reshape(len(images), -1).sum(axis=1)


def ones(count, value=1):
    return [np.full((1, 1, 3), value) for _ in range(count)]


def wait_until_working(batcher):
    while batcher.waiting:
        time.sleep(0.001)


@pytest.fixture
def slow():
    """A batcher that works on one image and lets three wait."""
    run = Slow()
    batcher = Batcher(run, max_batch=1, max_wait=0.0, max_queue=3)
    first = batcher.submit_many(ones(1))
    wait_until_working(batcher)
    yield run, batcher, first
    run.go.set()
    batcher.close()


def test_images_that_wait_become_batches_and_keep_their_answers():
    run = Slow()
    batcher = Batcher(run, max_batch=4, max_wait=0.0, max_queue=100)
    images = [np.full((2, 2, 3), n, np.int64) for n in range(10)]
    answers = [answer for n in range(10) for answer in batcher.submit_many(images[n : n + 1])]
    run.go.set()
    assert [a.result(10) for a in answers] == [12 * n for n in range(10)]
    assert sum(run.sizes) == 10 and max(run.sizes) == 4 and len(run.sizes) <= 4
    assert (batcher.images, batcher.largest) == (10, 4)
    batcher.close()


def test_the_first_image_waits_for_company():
    run = Slow()
    run.go.set()
    batcher = Batcher(run, max_batch=3, max_wait=5.0)
    answers = batcher.submit_many(ones(1))
    time.sleep(0.05)
    start = time.monotonic()
    answers += batcher.submit_many(ones(2))
    assert [a.result(10) for a in answers] == [3, 3, 3] and run.sizes == [3]
    assert time.monotonic() - start < 2  # a full batch waits no longer
    batcher.close()


def test_a_request_is_queued_whole_or_not_at_all(slow):
    """What is refused is never computed."""
    run, batcher, first = slow
    waiting = batcher.submit_many(ones(2))
    for _ in range(3):
        with pytest.raises(BusyError, match="2 images are waiting"):
            batcher.submit_many(ones(2, 100))
    assert batcher.waiting == 2
    waiting += batcher.submit_many(ones(1))
    run.go.set()
    assert [a.result(10) for a in first + waiting] == [3] * 4
    batcher.close()
    assert run.sizes == [1] * 4


def test_room_is_kept_while_images_are_decoded(slow):
    run, batcher, _ = slow
    with batcher.room(2) as put:
        with pytest.raises(BusyError):
            batcher.submit_many(ones(2))
        batcher.submit_many(ones(1))
        answers = put(ones(2))
        with pytest.raises(ValueError, match="0 have room"):
            put(ones(1))
    run.go.set()
    assert [a.result(10) for a in answers] == [3, 3]
    with pytest.raises(KeyError), batcher.room(3):  # decoding failed: the room is free again
        raise KeyError
    wait_until_working(batcher)
    assert len(batcher.submit_many(ones(3))) == 3


def test_close_answers_what_waits_and_the_cancelled_are_not_computed(slow):
    run, batcher, first = slow
    answers = batcher.submit_many(ones(3))
    assert answers[1].cancel()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.02)
    with pytest.raises(BusyError, match="shutting down"):
        batcher.submit_many(ones(1))
    run.go.set()
    closing.join(10)
    assert [a.result(1) for a in (first[0], answers[0], answers[2])] == [3, 3, 3]
    with pytest.raises(CancelledError):
        answers[1].result(1)
    assert run.sizes == [1, 1, 1]
    batcher.close()  # twice does no harm


def test_a_failure_of_the_network_reaches_those_who_wait_and_nobody_else():
    def run(images):
        if images.max() > 5:
            return images[:0]
        if images.max() > 1:
            raise RuntimeError("broken")
        return images[:, 0, 0, 0]

    batcher = Batcher(run, max_batch=1)
    bad, short, good = (batcher.submit_many(ones(1, value))[0] for value in (5, 6, 1))
    with pytest.raises(RuntimeError, match="broken"):
        bad.result(10)
    with pytest.raises(RuntimeError, match="0 answers for 1 images"):
        short.result(10)
    assert good.result(10) == 1
    batcher.close()


def test_a_batcher_refuses_nonsense():
    for words in ({"max_batch": 0}, {"max_wait": -1}, {"max_queue": 0}, {"max_wait": float("nan")}):
        with pytest.raises(ValueError, match="expected at least"):
            Batcher(lambda x: x, **words)

"""Files that lie, are damaged, or are of another kind than they seem: nothing is believed."""

import io
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, features

from shared_core.datasets.errors import DecodeError, UnsupportedImageError
from shared_core.datasets.reading.decode import EncodedImage, decode, read_bytes
from shared_core.datasets.reading.image_headers import MAX_PIXELS, MAX_SCANS, stated_size


def picture(height=120, width=100, seed=0):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + c) + np.cos(y / (7 + c)) for c in range(3)]
    noise = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    return np.clip(128 + 50 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


RGB = Image.fromarray(picture())


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def peak_of(call):
    """What ``call`` gives, and the most memory that NumPy and Python took for it."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- sizes ------------------------------------------------------------------------------------


def png(width, height, raw=b"", depth=8, color=6):
    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def tiff(tags, data=b"", order="<"):
    """A TIFF of one strip; ``tags``: (tag, kind, values) in the order given."""
    sizes = {3: ("H", 2), 4: ("I", 4)}
    start = 8 + 2 + 12 * len(tags) + 4
    entries, more = b"", b""
    for tag, kind, values in tags:
        code, size = sizes[kind]
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            place = struct.pack(order + "I", start + len(more))
            more += packed + b"\0" * (len(packed) % 2)
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + place
    at = start + len(more)
    entries = entries.replace(b"STRP", struct.pack(order + "I", at))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0" + more + data


def plain_tiff(width, height, bands, data, *, extra=None, photometric=2, bits=8, first=()):
    strip = int.from_bytes(b"STRP", "little")
    tags = [
        *first, (256, 4, (width,)), (257, 4, (height,)), (258, 3, (bits,) * bands), (259, 3, (1,)),
        (262, 3, (photometric,)), (273, 4, (strip,)), (277, 3, (bands,)), (278, 4, (height,)),
        (279, 4, (len(data),)),
    ]  # fmt: skip
    if extra is not None:
        tags.append((338, 3, extra))
    return tiff(tags, data)


def lying_jpeg(height, width):
    data = bytearray(encoded(RGB, "JPEG"))
    at = data.find(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def lying_bmp(width, height):
    data = bytearray(encoded(RGB, "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


LARGE = {
    "jpeg": lying_jpeg(65000, 65000),
    "small jpeg": lying_jpeg(9000, 9000),  # within the limit, but 6 KB cannot hold it
    "png": png(30000, 30000),
    "small png": png(10000, 9000, b"\0" * 100),
    "bmp": lying_bmp(40000, -40000),
    "tiff": plain_tiff(60000, 60000, 3, b"\0" * 64),
    "small tiff": plain_tiff(9000, 9000, 3, b"\0" * 64),
    "webp": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2,
    "gif": b"GIF89a" + struct.pack("<HH", 60000, 60000) + b"\0" * 20,
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_a_size_that_is_too_large_or_untrue_costs_nothing(kind):
    def refused():
        with pytest.raises(DecodeError) as error:
            EncodedImage(LARGE[kind], name="x")
        return error.value

    start = time.perf_counter()
    error, peak = peak_of(refused)
    assert peak < 1e6 and time.perf_counter() - start < 0.5
    if not kind.startswith("small"):
        assert isinstance(error, UnsupportedImageError) and f"at most {MAX_PIXELS}" in str(error)


def test_the_limit_is_inclusive():
    height, width = 10000, MAX_PIXELS // 10000
    assert stated_size(png(width, height)) == (height, width)
    with pytest.raises(DecodeError, match="cannot hold"):  # not: too large
        decode(png(width, height))
    with pytest.raises(UnsupportedImageError):
        decode(png(width + 1, height))


def test_a_tiff_that_states_its_size_twice_is_refused():
    data = bytes(range(12)) * 20
    first = [(256, 4, (14000,))]
    with pytest.raises(DecodeError, match="states its size twice"):
        decode(plain_tiff(10, 8, 3, data, first=first))
    assert decode(plain_tiff(10, 8, 3, data)).shape == (8, 10, 3)


def test_directories_that_claim_the_file_thousands_of_times_are_refused():
    tags = [(30000 + n, 4, (n,)) for n in range(5000)]
    data = bytearray(tiff(tags, b"\0" * 200_000))
    for n in range(5000):
        struct.pack_into("<II", data, 10 + 12 * n + 4, 40_000, 8)  # 160 KB each
    with pytest.raises(DecodeError):
        _, peak = peak_of(lambda: decode(bytes(data)))
        assert peak < 50e6
    block = b"Exif\0\0" + bytes(data[:60_000])
    base = encoded(RGB, "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    image, peak = peak_of(lambda: decode(base[:2] + segment + base[2:]))
    assert peak < 20e6 and image.shape == (120, 100, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_compositing_takes_a_block_at_a_time(dtype):
    image = np.zeros((3000, 3000, 4), dtype)
    image[::2] = np.iinfo(dtype).max
    data = cv2.imencode(".png", image)[1].tobytes()
    got, peak = peak_of(lambda: decode(data))
    assert (got[::2] == 255).all() and (got[1::2] == 255).all()  # white, and clear
    assert peak < image.nbytes + got.nbytes + 40e6


def test_many_scans_are_refused_and_a_usual_progressive_jpeg_is_not():
    data = encoded(RGB, "JPEG", progressive=True)
    assert decode(data).shape == (120, 100, 3)
    end = data.rfind(b"\xff\xd9")
    scan = data[data.find(b"\xff\xda") : data.find(b"\xff", data.find(b"\xff\xda") + 2)]
    many = data[:end] + scan * 4000 + data[end:]
    start = time.perf_counter()
    with pytest.raises(UnsupportedImageError, match=f"scans .* at most {MAX_SCANS}"):
        decode(many)
    assert time.perf_counter() - start < 0.2
    note = b"\xff\xfe\x00\x06\xff\xd9\xff\xda"  # a remark that looks like the end
    with pytest.raises(UnsupportedImageError, match="scans"):
        decode(data[:end] + note + scan * 4000 + data[end:])
    assert decode(data + b"\xff\xda" * 4000).shape == (120, 100, 3)  # a camera's film behind it


# -- bands and depths ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("extra", "alpha"), [(None, None), ((0,), None), ((1,), "premultiplied"), ((2,), "straight")]
)
def test_a_fourth_band_is_alpha_only_where_it_says_so(extra, alpha, bits):
    dtype, top = (np.uint8, 255) if bits == 8 else (np.uint16, 65535)
    image = np.random.default_rng(0).integers(0, top + 1, (9, 7, 4)).astype(dtype)
    if alpha == "premultiplied":
        image[..., :3] = image[..., :3] * (image[..., 3:] / top)
    data = plain_tiff(7, 9, 4, image.astype(f"<u{bits // 8}").tobytes(), extra=extra, bits=bits)
    plain = image.astype(float) / top
    clear = 1 - plain[..., 3:]
    want = {
        None: plain[..., :3],
        "straight": plain[..., :3] * plain[..., 3:] + clear,
        "premultiplied": plain[..., :3] + clear,
    }[alpha]
    read = EncodedImage(data, name="x")
    assert np.abs(read.pixels() - 255 * want).max() <= 1.01
    kinds = [remark.kind for remark in read.remarks]
    assert kinds == ([] if alpha else ["extra_band"])


@pytest.mark.parametrize(("bands", "photometric"), [(13, 1), (13, 2), (5, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("bits", [8, 16])
def test_other_numbers_of_bands_are_named_with_what_to_do(bands, photometric, bits):
    data = plain_tiff(
        4,
        4,
        bands,
        b"\1" * (16 * bands * bits // 8),
        extra=(0,),
        photometric=photometric,
        bits=bits,
    )
    with pytest.raises(UnsupportedImageError, match=f"x: {bands} bands, .*choose three") as error:
        decode(data, name="x")
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_twelve_bits_in_sixteen_are_noted_and_scaled_when_stated(kind):
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    data = encoded(Image.fromarray(levels), kind)
    dark = EncodedImage(data, name="x")
    assert dark.pixels().max() == 16
    assert [remark.kind for remark in dark.remarks] == ["dim"]
    assert "4095 of 65535" in dark.remarks[0].detail
    assert "--scale-max 4095" in dark.remarks[0].detail
    stated = EncodedImage(data, name="x", scale_max=4095)
    assert stated.remarks == ()
    want = np.floor(levels.astype(float) * 255 / 4095 + 0.5)
    np.testing.assert_array_equal(stated.pixels()[..., 1], want)
    np.testing.assert_array_equal(decode(data, scale_max=1000)[levels >= 1000], 255)  # no wrap
    full = EncodedImage(encoded(Image.fromarray(levels * 16), kind), name="x")
    assert full.remarks == ()
    colour = cv2.imencode("." + kind.lower(), np.dstack([levels] * 3))[1].tobytes()
    np.testing.assert_array_equal(decode(colour, scale_max=4095)[..., 0], want)


def test_bmps_of_os2_keep_their_colours():
    image = picture(5, 6)
    rows = b"".join(row[:, ::-1].tobytes().ljust(20, b"\0") for row in image[::-1])
    head = struct.pack("<IHHHH", 12, 6, 5, 1, 24)
    data = b"BM" + struct.pack("<IHHI", 26 + len(rows), 0, 0, 26) + head + rows
    np.testing.assert_array_equal(decode(data), image)
    with pytest.raises(DecodeError, match="bytes where the header promises"):
        decode(data[:-20])


@pytest.mark.parametrize("kind", ["GIF", "AVIF"])
def test_gif_and_avif_equal_pillow(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    second = Image.fromarray(picture(seed=5))
    data = encoded(RGB, kind, save_all=True, append_images=[second])
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), want)
    for keep in (30, len(data) // 2):
        with pytest.raises(DecodeError, match=kind):
            decode(data[: keep if kind == "AVIF" else min(keep, 400)])


# -- damage -------------------------------------------------------------------------------------

CODINGS = ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4", "group3", "tiff_ccitt"]


@pytest.mark.parametrize("strips", [1, 6])
@pytest.mark.parametrize("coding", CODINGS)
def test_damaged_strips_are_refused(coding, strips):
    source = RGB.convert("1") if coding in ("group4", "group3", "tiff_ccitt") else RGB
    row = 13 if source.mode == "1" else 300
    data = encoded(source, "TIFF", compression=coding, strip_size=row * 120 // strips)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), want)
    ruined = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        at = int(rng.integers(300, len(data) - 400))
        damaged = data[:at] + rng.bytes(64) + data[at + 64 :]
        try:
            ruined += float((decode(damaged) != want).any(-1).mean()) > 0.02
        except DecodeError as error:
            assert "\n" not in str(error)
    # Bytes that still are a valid code cannot be told from others.
    assert ruined <= (1 if coding in ("jpeg", "tiff_lzw") else 0)


def test_black_and_white_faxes_of_both_colours_are_whole():
    for photometric in (0, 1):
        for coding in ("group4", "group3", "tiff_ccitt"):
            data = encoded(
                RGB.convert("1"), "TIFF", compression=coding, tiffinfo={262: photometric}
            )
            want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            np.testing.assert_array_equal(decode(data), want)


def test_an_unknown_compression_is_named():
    data = bytearray(plain_tiff(4, 4, 3, b"\1" * 48))
    data[data.find(struct.pack("<HHI", 259, 3, 1)) + 8] = 99
    with pytest.raises(UnsupportedImageError, match="compression 99"):
        decode(bytes(data))


def test_big_endian_and_tiled_tiffs_are_read():
    image = picture(8, 10)
    swapped = [
        (256, 4, (10,)), (257, 4, (8,)), (258, 3, (8, 8, 8)), (259, 3, (1,)), (262, 3, (2,)),
        (273, 4, (int.from_bytes(b"STRP", "big"),)), (277, 3, (3,)), (278, 4, (8,)),
        (279, 4, (image.nbytes,)),
    ]  # fmt: skip
    np.testing.assert_array_equal(decode(tiff(swapped, image.tobytes(), ">")), image)


# -- what is no file ------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_devices_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    (tmp_path / "c.jpg").mkdir()
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 40)
    start = time.perf_counter()
    for name, why in (
        ("pipe", "a pipe"),
        ("zero", "a device"),
        ("c", "a folder"),
        ("hole", "at most"),
    ):
        with pytest.raises(DecodeError, match=why):
            read_bytes(tmp_path / f"{name}.jpg")
    assert time.perf_counter() - start < 1


CAMPAIGN = """
import io, resource, sys
import numpy as np
from PIL import Image
from shared_core.datasets.errors import DatasetError
from shared_core.datasets.reading.decode import EncodedImage

resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
rng = np.random.default_rng(1)
image = Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8))
plain = ("JPEG", "PNG", "BMP", "GIF", "TIFF")
kinds = [(kind, {}) for kind in plain] + [("JPEG", {"progressive": True})]
kinds += [("WEBP", {"lossless": True}), ("WEBP", {"quality": 80})]
kinds += [("TIFF", {"compression": c}) for c in ("tiff_lzw", "packbits", "jpeg", "tiff_deflate")]
files = []
for kind, options in kinds:
    out = io.BytesIO()
    image.save(out, kind, **options)
    files.append(out.getvalue())
refused = 0
for number in range(int(sys.argv[1])):
    data = bytearray(files[number % len(files)])
    for _ in range(int(rng.integers(1, 8))):
        place = int(rng.integers(0, min(len(data), 200 if rng.random() < 0.6 else len(data))))
        data[place] = int(rng.choice([0, 1, 127, 255, int(rng.integers(0, 256))]))
    if rng.random() < 0.2:
        data = data[: int(rng.integers(0, len(data)))]
    try:
        EncodedImage(bytes(data), name="x").pixels()
    except DatasetError as error:
        assert chr(10) not in str(error)
        refused += 1
print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("number", [1500, pytest.param(30_000, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted otherwise")
def test_mutated_images_never_crash_hang_or_fill_memory(number):
    """A campaign in a process of its own, so that a crash is seen and memory is counted."""
    done = subprocess.run(
        [sys.executable, "-c", CAMPAIGN, str(number)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    refused, megabytes = map(int, done.stdout.split())
    assert refused > number / 6 and megabytes < 2000

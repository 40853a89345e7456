"""Decoding against Pillow, which reads the same files with other code."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from shared_core.datasets.errors import DatasetError, DecodeError
from shared_core.datasets.reading.decode import EncodedImage, dct_factor, decode


def picture(height=61, width=83, seed=0):
    """A smooth coloured picture with some noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + c) + np.cos(y / (7 + c)) for c in range(3)]
    noise = rng.normal(0, 4, (height, width, 3))
    return np.clip(128 + 50 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def on_white(image):
    """Pillow's compositing."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))


RGB = Image.fromarray(picture())
ALPHA = Image.fromarray(picture(seed=1)[..., 0])
RGBA = Image.merge("RGBA", [*RGB.split(), ALPHA])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_lossless_formats_equal_pillow(kind, options, mode):
    if mode in ("P", "1") and kind == "WEBP":
        pytest.skip("WebP has no such mode")
    if mode == "1" and options:
        pytest.skip("one mode is enough")
    data = encoded(RGB.convert(mode), kind, **options)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    got = decode(data)
    assert got.dtype == np.uint8 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow(subsampling, progressive):
    data = encoded(RGB, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    want = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(decode(data) - want).max() <= 1


def test_grey_jpeg():
    data = encoded(RGB.convert("L"), "JPEG", quality=95)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data) - want).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = Image.frombytes("CMYK", RGB.size, np.asarray(RGBA).tobytes())
    data = encoded(image, kind, **({"quality": 95} if kind == "JPEG" else {}))
    stored = np.asarray(Image.open(io.BytesIO(data))).astype(float)
    want = (255 - stored[..., :3]) * (255 - stored[..., 3:]) / 255
    assert np.abs(decode(data) - want).max() <= 2


def test_ycck_jpeg():
    """A CMYK JPEG whose Adobe marker says YCCK: the colours must not come out as CMYK."""
    image = Image.frombytes("CMYK", RGB.size, np.asarray(RGBA).tobytes())
    data = bytearray(encoded(image, "JPEG", quality=95))
    at = data.find(b"Adobe")
    data[at + 11] = 2  # colour transform: YCCK
    want = np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB")).astype(int)
    assert np.abs(decode(bytes(data)) - want).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white(kind):
    data = encoded(RGBA, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    want = on_white(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(decode(data) - want).max() <= 1


@pytest.mark.parametrize(
    ("mode", "key"), [("P", 3), ("L", 128), ("RGB", tuple(int(v) for v in picture()[5, 7]))]
)
def test_a_transparent_colour_becomes_white(mode, key):
    image = RGB.quantize(16) if mode == "P" else RGB.convert(mode)
    data = encoded(image, "PNG", transparency=key)
    want = on_white(Image.open(io.BytesIO(data)))
    assert (want == 255).all(-1).any()  # the case is not empty
    np.testing.assert_array_equal(decode(data), want)


def test_grey_with_alpha():
    image = Image.merge("LA", [RGB.convert("L"), ALPHA])
    for kind in ("PNG", "TIFF"):
        data = encoded(image, kind)
        assert np.abs(decode(data) - on_white(image).astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = decode(encoded(Image.fromarray(levels), kind))
    want = np.floor(levels * 255.0 / 65535.0 + 0.5)
    for channel in range(3):
        np.testing.assert_array_equal(got[..., channel], want)


def test_float_tiff_is_refused():
    data = encoded(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(DecodeError, match="float32"):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(RGB, kind, exif=exif, **options)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    got = decode(data)
    assert got.shape == want.shape
    assert np.abs(got - want.astype(int)).max() <= 1
    assert (EncodedImage(data, name="x").height, EncodedImage(data, name="x").width) == want.shape[
        :2
    ]


def test_big_endian_exif_and_nonsense_orientation():
    base = encoded(RGB, "JPEG", quality=95)
    for value, turned in ((6, True), (77, False)):
        entry = b"\x01\x12\x00\x03\x00\x00\x00\x01" + value.to_bytes(2, "big") + b"\0\0"
        block = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + b"\0\0\0\0"
        segment = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
        got = decode(base[:2] + segment + base[2:])
        want = decode(base)
        np.testing.assert_array_equal(got, np.rot90(want, -1) if turned else want)


def test_paths_in_any_script(tmp_path):
    path = tmp_path / "влаг 图像 ü.png"
    RGB.save(path)
    np.testing.assert_array_equal(decode(path), np.asarray(RGB))
    np.testing.assert_array_equal(decode(str(path)), np.asarray(RGB))
    with pytest.raises(FileNotFoundError, match="not here.png"):
        decode(tmp_path / "not here.png")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})],
)
def test_truncated_files_are_named_and_silent(kind, options, tmp_path, capfd):
    data = encoded(RGB, kind, **options)
    path = tmp_path / f"broken.{kind.lower()}"
    for keep in (0, 3, 20, len(data) // 2, len(data) - 40, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(DecodeError, match="broken") as error:
            decode(path)
        assert "\n" not in str(error.value)
    assert isinstance(error.value, DatasetError)
    assert capfd.readouterr().err == ""


def test_damaged_png_and_no_image():
    data = bytearray(encoded(RGB, "PNG"))
    data[len(data) // 2] ^= 0x55
    with pytest.raises(DecodeError, match="IDAT"):
        decode(bytes(data))
    with pytest.raises(DecodeError, match=r"readme\.txt: not a JPEG"):
        decode(b"hello, this is a text file", name="readme.txt")
    with pytest.raises(DecodeError, match="image data: empty"):
        decode(b"")


def test_left_over_bytes_do_not_matter():
    data = encoded(RGB, "JPEG", quality=90)
    np.testing.assert_array_equal(decode(data[:-2] + b"\0abc\0" * 20 + data[-2:]), decode(data))
    np.testing.assert_array_equal(decode(data + b"\0" * 100), decode(data))


def test_dct_factor_by_brute_force():
    for height in (1, 7, 16, 33, 224, 449):
        for asked in (1, 2, 5, 28, 112, 113, 224, 225):
            fits = [f for f in (1, 2, 4, 8) if -(-height // f) >= asked]
            assert dct_factor((height, 4096), (asked, 1)) == max(fits, default=1)
            assert dct_factor((4096, height), (1, asked)) == max(fits, default=1)


@pytest.mark.parametrize("size", [(64, 64), (61, 83), (255, 130)])
@pytest.mark.parametrize("asked", [(1, 1), (16, 20), (31, 42), (40, 40), (500, 500)])
def test_reduced_decode_is_exactly_the_factor_and_never_too_small(size, asked):
    data = encoded(Image.fromarray(picture(*size)), "JPEG", quality=95, subsampling=2)
    factor = dct_factor(size, asked)
    got = decode(data, min_size=asked)
    assert got.shape == (-(-size[0] // factor), -(-size[1] // factor), 3)
    assert (got.shape[0] >= asked[0] and got.shape[1] >= asked[1]) or factor == 1
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    # The mean over blocks is the ideal of a reduced decode; edges may be incomplete blocks.
    inner = (size[0] // factor, size[1] // factor)
    cut = whole.crop((0, 0, inner[1] * factor, inner[0] * factor))
    want = np.asarray(cut.reduce(factor) if factor > 1 else cut).astype(int)
    assert np.abs(got[: inner[0], : inner[1]] - want).mean() < 3


def test_other_formats_are_never_reduced():
    assert decode(encoded(RGB, "PNG"), min_size=(4, 4)).shape == (61, 83, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"subsampling": 2, "progressive": True},
        {"subsampling": 2, "restart_marker_blocks": 3},
        {"subsampling": 2, "optimize": True},
    ],
)
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_the_rows_of_a_partial_decode_equal_those_of_a_whole_one(options, factor):
    data = encoded(Image.fromarray(picture(203, 120)), "JPEG", quality=88, **options)
    image = EncodedImage(data, name="x")
    whole = image.pixels(factor=factor)
    shorter = 0
    for rows in range(1, whole.shape[0] + 1, 5):
        part = image.pixels(factor=factor, rows=rows)
        assert part.shape[0] >= rows
        shorter += part.shape[0] < whole.shape[0]
        np.testing.assert_array_equal(part[:rows], whole[:rows])
    assert shorter > 0 or "progressive" in options


def test_partial_decode_still_notices_a_truncated_file():
    data = encoded(Image.fromarray(picture(203, 120)), "JPEG", quality=88)
    for keep in (len(data) // 3, len(data) - 200, len(data) - 2):
        with pytest.raises(DecodeError, match="cut"):
            EncodedImage(data[:keep], name="cut").pixels(rows=40)

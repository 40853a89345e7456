"""A few lines of Python that answer as the model folder does, with ONNX Runtime, NumPy and Pillow.

The resize is computed with NumPy by the view's own formula, since Pillow's filters are others: it
differs from OpenCV's by a grey level at some pixels, no more. What the lines do not do: put
transparent pixels on white, and read images of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared_core.deploy.facts import ModelError, ModelFacts

_HEAD = '''"""Classify images as this model folder does: python snippet.py photo.jpg

It needs onnxruntime, numpy and Pillow, and the files beside it.
"""

import json
import pathlib
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

here = pathlib.Path(__file__).parent
'''

_NAMES = 'names = json.loads((here / "model.json").read_text("utf-8"))["class_names"]'

# Rows are new pixels, columns old ones: what each new pixel takes of each old one.
_WEIGHTS = {
    "linear": """
def weights(old, new):  # linear interpolation between the centres of pixels
    at = np.clip((np.arange(new)[:, None] + 0.5) * old / new - 0.5, 0, old - 1)
    return np.clip(1 - abs(at - np.arange(old)), 0, 1)
""",
    "area": """
def weights(old, new, shrinks):  # the mean over what each new pixel covers
    i, k = np.arange(new)[:, None], np.arange(old)
    if not shrinks:  # OpenCV takes two neighbours where a side grows
        at = i * old // new
        part = i + 1 - (at + 1) * new / old
        part = np.where(part > 0, part % 1, 0)
        return (k == at) * (1 - part) + (k == np.minimum(at + 1, old - 1)) * part
    shared = np.minimum((i + 1) * old / new, k + 1) - np.maximum(i * old / new, k)
    return np.clip(shared, 0, 1) * new / old
""",
    "cubic": """
def weights(old, new):  # cubic convolution, a = -0.75; the border is repeated
    x = abs((np.arange(new)[:, None] + 0.5) * old / new - 0.5 - np.arange(-2, old + 2))
    near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
    w = np.where(x < 1, near, np.where(x < 2, far, 0))
    w[:, 2] += w[:, :2].sum(axis=1)
    w[:, -3] += w[:, -2:].sum(axis=1)
    return w[:, 2:-2]
""",
}

_BLOCKS = """    r, c = max(1, pixels.shape[0] // th), max(1, pixels.shape[1] // tw)
    if r * c > 1:  # the mean of whole blocks first
        y, x = pixels.shape[0] % r // 2, pixels.shape[1] % c // 2
        h, w = pixels.shape[0] // r, pixels.shape[1] // c
        pixels = pixels[y : y + h * r, x : x + w * c].reshape(h, r, w, c, 3).mean(axis=(1, 3))
        pixels = np.floor(pixels + 0.5)
"""

_REDUCE = """    if image.getexif().get(274, 1) == 1:
        image.draft("RGB", (tw, th))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
    pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.float64)
"""
_FLOOR = """    shrink = round(max(h / pixels.shape[0], w / pixels.shape[1]))
    pixels = pixels[: h // shrink, : w // shrink]
"""
_WHOLE = """    pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.float64)
"""


def snippet(facts: ModelFacts, form: str, *, int8: bool = False) -> str:
    """The text of ``snippet.py`` for a model folder that holds the files of one form.

    Args:
        form: ``onnx`` or ``onnx-int8``: whose files are taken.
        int8: whether these compute in 8 bits.

    Raises:
        ModelError: a view, or a rule of early exits, that is not put into few lines.
    """
    parts = [
        _HEAD,
        _view(facts.view),
        (_plain if facts.exits is None else _chain)(facts, form, int8),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _view(view: Mapping[str, Any]) -> str:
    height, width = view["size"]
    letterbox = view["view"] == "letterbox"
    if letterbox:
        tall = f"    if {height} * w <= {width} * h:\n        return"
        fit = f"""
def fit(h, w):  # the largest size of the whole image that fits in
{tall} {height}, max(1, (2 * w * {height} + h) // (2 * h))
    return max(1, (2 * h * {width} + w) // (2 * w)), {width}

"""
        sizes = "    th, tw = fit(h, w)\n"
        last = f"""    whole = np.full(({height}, {width}, 3), {view["fill"]}, np.uint8)
    top, left = ({height} - th) // 2, ({width} - tw) // 2
    whole[top : top + th, left : left + tw] = pixels
    return whole[None]
"""
        cuts = "", ""
    else:
        fit = ""
        last = """    return pixels[None]
"""
        cuts = "", ""
        if view["resize_ratio"] is None:
            sizes = f"    th, tw = {height}, {width}\n"
        else:
            short = round(max(height, width) * view["resize_ratio"])
            sizes = f"""    short = {short}
    th, tw = (short, short * w // h) if h <= w else (short * h // w, short)
    top, left = round((th - {height}) / 2), round((tw - {width}) / 2)
"""
            cuts = f"[top : top + {height}]", f"[left : left + {width}]"
    method = view["method"]
    read = _REDUCE if view["dct_scaled"] else _WHOLE
    read += _FLOOR if view["dct_scaled"] and not letterbox else ""
    read += "    th, tw = fit(*pixels.shape[:2])\n" if letterbox else ""
    shrinks = ""
    if method == "area":
        shrinks = ", shrinks"
        read += "    shrinks = pixels.shape[0] >= th and pixels.shape[1] >= tw\n"
    return f"""{_WEIGHTS["linear" if method == "reduced" else method]}
{fit}
def view(image):  # what the network sees: uint8 (1, {height}, {width}, 3)
    w, h = image.size if image.getexif().get(274, 1) < 5 else image.size[::-1]
{sizes}{read}{_BLOCKS if method == "reduced" else ""}\
    rows = weights(pixels.shape[0], th{shrinks}){cuts[0]}
    columns = weights(pixels.shape[1], tw{shrinks}){cuts[1]}
    pixels = np.einsum("ih,hwc,jw->ijc", rows, pixels, columns, optimize=True)
    pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
{last}"""


def _session(int8: bool) -> str:
    if not int8:
        return ""
    return """options = onnxruntime.SessionOptions()  # exact sums of 8 bits on every processor:
options.add_session_config_entry("session.x64quantprecision", "1")
"""


def _plain(facts: ModelFacts, form: str, int8: bool) -> str:
    (file,) = facts.files[form]
    asked = ", options" if int8 else ""
    return f"""
{_session(int8)}{_NAMES}
session = onnxruntime.InferenceSession(here / "{file}"{asked})
for path in sys.argv[1:]:
    p = session.run(None, {{"images": view(Image.open(path))}})[0][0]
    print(path, {_chosen(facts)}, float(p.max()), sep="\\t")
"""


_SCORES = {
    "max_prob": "p.max()",
    "margin": "np.sort(p)[-1] - np.sort(p)[-2]",
    "entropy": "1 + (p * np.log(np.maximum(p, 1e-300))).sum() / np.log(len(p))",
    "gate": '1 / (1 + np.exp(-float(out["gate_logit"][0])))',
}


def _chain(facts: ModelFacts, form: str, int8: bool) -> str:
    assert facts.exits is not None
    policy = facts.exits.policy or {"kind": "max_prob", "thresholds": [2.0], "temperatures": [1.0]}
    if policy["kind"] not in _SCORES or facts.activation != "softmax":
        raise ModelError(f"exits by {policy['kind']} are not put into a few lines")
    count = len(facts.exits.after)
    limits = list(policy["thresholds"]) * (count if len(policy["thresholds"]) == 1 else 1)
    heat = list(policy["temperatures"])
    heat = heat * (count + 1) if len(heat) == 1 else heat + [1.0] * (count + 1 - len(heat))
    asked = ", options" if int8 else ""
    return f"""
{_session(int8)}{_NAMES}
files = {list(facts.files[form])}
chain = [onnxruntime.InferenceSession(here / file{asked}) for file in files]
thresholds, temperatures = {[*limits, 0.0]}, {heat}


def answer(image):  # probabilities (K,) of the first exit that is sure enough
    values = [view(image)]
    for part, threshold, temperature in zip(chain, thresholds, temperatures):
        keys = [one.name for one in part.get_outputs()]
        fed = {{one.name: value for one, value in zip(part.get_inputs(), values)}}
        out = dict(zip(keys, part.run(None, fed)))
        p = out["logits"][0].astype(np.float64) / temperature
        p = np.exp(p - p.max())
        p /= p.sum()
        if part is chain[-1] or np.float32({_SCORES[policy["kind"]]}) >= np.float32(threshold):
            return p.astype(np.float32)
        values = [out[key] for key in keys if key not in ("logits", "gate_logit")]


for path in sys.argv[1:]:
    p = answer(Image.open(path))
    print(path, {_chosen(facts)}, float(p.max()), sep="\\t")
"""


def _chosen(facts: ModelFacts) -> str:
    limit = facts.unknown_threshold
    return "names[p.argmax()]" + (
        "" if limit is None else f' if p.max() >= {limit!r} else "unknown"'
    )

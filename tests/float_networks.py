"""Float networks of a few numbers, as exporters write them, and what they say by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from tiny_models import _node, _value

from shared_core.datasets import EvalView
from shared_core.deploy.facts import ModelFacts

SIZE = (6, 4)  # height, width: not a square, so that an exchange of the two is seen
MEAN, STD = (0.2, 0.5, 0.7), (0.3, 0.1, 0.2)
CLASSES = ("left", "middle", "right")


def facts(**changes: Any) -> ModelFacts:
    """Of a network for images of ``SIZE``."""
    size = changes.get("input_size", SIZE)
    words: dict[str, Any] = {
        "project": "by-hand",
        "architecture": "layers",
        "class_names": CLASSES,
        "input_size": size,
        "view": EvalView(size, resize_ratio=None).settings(),
        "mean": MEAN,
        "std": STD,
    }
    return ModelFacts(**{**words, **changes})


def images(count: int, size: tuple[int, int] = SIZE, seed: int = 3) -> np.ndarray:
    """Noise, uint8 ``(count, H, W, 3)``."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(np.uint8)


def normalised(pixels: np.ndarray, *, bgr: bool = False) -> np.ndarray:
    """float64 ``(N, 3, H, W)``, by the formula."""
    values = (pixels.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    return np.moveaxis(values[..., ::-1] if bgr else values, 3, 1)


def layers(*widths: int, seed: int = 0, scale: float = 1.0) -> list[np.ndarray]:
    """Weights ``(in, out)`` of linear layers for images of ``SIZE``."""
    rng = np.random.default_rng(seed)
    sizes = (3 * SIZE[0] * SIZE[1], *widths)
    return [
        (scale * rng.normal(size=(a, b)) / np.sqrt(a)).astype(np.float32)
        for a, b in zip(sizes[:-1], sizes[1:], strict=True)
    ]


def outputs(pixels: np.ndarray, weights: list[np.ndarray], *, bgr: bool = False) -> np.ndarray:
    """What the layers give, with a ReLU between them: float64 ``(N, K)``."""
    values = normalised(pixels, bgr=bgr).reshape(len(pixels), -1)
    for number, weight in enumerate(weights):
        values = np.maximum(values, 0) if number else values
        values = values @ weight.astype(np.float64)
    return values


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Rows that sum to 1."""
    powers = np.exp(logits / temperature - (logits / temperature).max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def network(
    weights: list[np.ndarray],
    *,
    opset: int = 17,
    batch: Any = "batch",
    size: tuple[int, int] = SIZE,
    names: tuple[str, str] = ("image", "logits"),
    product: str = "Gemm",
) -> Any:
    """The layers as an ONNX model: normalised ``(N, 3, H, W)`` to logits; layers ``layer0`` ..."""
    from onnx import helper, numpy_helper

    taken, given = names
    nodes, last = [_node("Flatten", taken, "flat", axis=1, name="flatten")], "flat"
    for number in range(len(weights)):
        result = given if number == len(weights) - 1 else f"sum{number}"
        nodes.append(_node(product, f"{last} w{number}", result, name=f"layer{number}"))
        if result != given:
            nodes.append(_node("Relu", result, f"relu{number}", name=f"relu{number}"))
            last = f"relu{number}"
    graph = helper.make_graph(
        nodes, "by-hand", [_value(taken, "FLOAT", batch, 3, *size)],
        [_value(given, "FLOAT", batch, weights[-1].shape[1])],
        [numpy_helper.from_array(w, f"w{n}") for n, w in enumerate(weights)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def segment(weight: np.ndarray, head: np.ndarray, *, first: bool, last: bool) -> Any:
    """A segment of a chain: tokens times ``weight``, ReLU, then the head's logits and a gate."""
    from onnx import helper, numpy_helper

    taken = "image" if first else "tokens_in"
    shape = ("batch", 3, *SIZE) if first else ("batch", weight.shape[0])
    nodes = [_node("Flatten", taken, "flat", axis=1)] if first else []
    nodes += [
        _node("Gemm", f"{'flat' if first else taken} w", "sums", name="layer"),
        _node("Relu", "sums", "tokens", name="relu"),
        _node("Gemm", "tokens head", "logits", name="head"),
    ]
    given = [_value("logits", "FLOAT", "batch", head.shape[1])]
    if not last:
        nodes += [_node("ReduceMean", "logits", "gate_logit", axes=[1], keepdims=0)]
        given = [_value("tokens", "FLOAT", "batch", weight.shape[1]), *given,
                 _value("gate_logit", "FLOAT", "batch")]  # fmt: skip
    graph = helper.make_graph(
        nodes, "segment", [_value(taken, "FLOAT", *shape)], given,
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(head, "head")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

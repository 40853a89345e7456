"""Finished models of a few numbers, made by hand: what they answer can be computed by hand, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from shared_core.datasets import EvalView
from shared_core.deploy.facts import METADATA_KEY, Exits, ModelFacts, write_facts

CLASSES = ("blue", "green", "red", "grey <b>")
SIDE = 8  # pixels
MACS = (100.0, 250.0, 700.0)


def make_facts(**changes: Any) -> ModelFacts:
    """Facts of the little network."""
    view = EvalView(SIDE, resize_ratio=None, method="area")
    words: dict[str, Any] = {
        "project": "tiny",
        "architecture": "colour-means",
        "class_names": CLASSES,
        "input_size": (SIDE, SIDE),
        "view": view.settings(),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "files": {"onnx": ("model.onnx",)},
        "costs": {"macs": 1000.0},
    }
    return ModelFacts(**{**words, **changes})


# Mean of red, green, blue in [0, 1] to four logits.
WEIGHTS = np.array([[-6, -4, 12, 0], [-4, 12, -5, 0], [12, -5, -4, 0]], np.float32)
BIAS = np.array([0, 0, 0, 2.5], np.float32)


def logits_by_hand(images: np.ndarray) -> np.ndarray:
    """``(N, 4)`` of uint8 images."""
    means = images.astype(np.float64).mean(axis=(1, 2)) / 255
    return means @ WEIGHTS + BIAS


def probabilities_by_hand(images: np.ndarray) -> np.ndarray:
    """``(N, 4)`` of uint8 images."""
    powers = np.exp(logits_by_hand(images))
    return powers / powers.sum(axis=1, keepdims=True)


def make_onnx(path: Path, nodes: list, inputs: list, outputs: list, weights: dict, facts=None):
    """Write an ONNX file of these nodes; facts go into its metadata."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.helper.make_graph(
        nodes, "tiny", inputs, outputs,
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    if facts is not None:
        entry = model.metadata_props.add()
        entry.key, entry.value = METADATA_KEY, json.dumps(facts.as_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))


def _node(kind: str, takes: str, gives: str, **words: Any):
    from onnx import helper

    return helper.make_node(kind, takes.split(), gives.split(), **words)


def _value(name: str, kind: str, *shape: Any):
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)


MEANS = [
    ("Cast", "images", "float", {"to": 1}),
    ("ReduceMean", "float", "sums", {"axes": [1, 2], "keepdims": 0}),
    ("Div", "sums top", "means", {}),
]


def save_model(folder: Path, facts: ModelFacts | None = None, *, weights=WEIGHTS) -> Path:
    """A model folder whose network takes mean colours, times weights, through a softmax."""
    facts = make_facts() if facts is None else facts
    last = "Identity" if facts.task == "embed" else "Softmax"
    nodes = [_node(kind, takes, gives, **words) for kind, takes, gives, words in MEANS]
    nodes += [_node("MatMul", "means w", "product"), _node("Add", "product b", "logits")]
    nodes += [_node(last, "logits", "answers")]
    make_onnx(
        folder / facts.files[facts.default][0], nodes,
        [_value("images", "UINT8", "N", SIDE, SIDE, 3)], [_value("answers", "FLOAT", "N", 4)],
        {"w": weights, "b": BIAS, "top": np.float32(255)}, facts,
    )  # fmt: skip
    write_facts(folder, facts)
    return folder


EXIT_SCALES = (0.5, 0.8, 1.0)  # of the logits at each head: later heads are surer
EXIT_TEMPERATURES = (1.0, 0.9, 0.5)


def exit_policy_state(threshold: float = 0.6, kind: str = "max_prob") -> dict[str, Any]:
    """As a run records it."""
    return {
        "version": 1, "kind": kind, "thresholds": [threshold],
        "temperatures": list(EXIT_TEMPERATURES),
    }  # fmt: skip


def exit_facts(**changes: Any) -> ModelFacts:
    """Facts of a network with two exits, after blocks 2 and 5."""
    exits = Exits(
        after=(2, 5), costs=MACS, plain_cost=650.0, policy=exit_policy_state(),
        points={"careful": exit_policy_state(0.9), "fast": exit_policy_state(0.3)},
        rules={"margin": exit_policy_state(0.5, "margin")},
    )  # fmt: skip
    files = {"onnx": tuple(f"segment{n}.onnx" for n in range(3))}
    return make_facts(exits=exits, files=files, **changes)


def save_chain(folder: Path, facts: ModelFacts | None = None) -> Path:
    """A chain of three segments: the same logits at every head, times ``EXIT_SCALES``."""
    facts = exit_facts() if facts is None else facts
    for n, scale in enumerate(EXIT_SCALES):
        shared = {"w": WEIGHTS * np.float32(scale), "b": BIAS * np.float32(scale)}
        nodes = [_node("MatMul", "means w", "product"), _node("Add", "product b", "logits")]
        outputs = [_value("logits", "FLOAT", "N", 4)]
        inputs = [_value("carried", "FLOAT", "N", 3)]
        if n == 0:
            nodes = [_node(k, takes, gives, **words) for k, takes, gives, words in MEANS] + nodes
            inputs = [_value("images", "UINT8", "N", SIDE, SIDE, 3)]
            shared["top"] = np.float32(255)
        else:
            nodes = [_node("Identity", "carried", "means"), *nodes]
        if n < 2:
            outputs = [_value("means", "FLOAT", "N", 3), *outputs]
        make_onnx(folder / facts.files["onnx"][n], nodes, inputs, outputs, shared, facts)
    write_facts(folder, facts)
    return folder


def exits_by_hand(images: np.ndarray, threshold: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Exit ``(N,)`` under max_prob, and the probabilities there ``(N, 4)``."""
    left, answers = [], []
    for row in logits_by_hand(images):
        for n, (scale, temperature) in enumerate(zip(EXIT_SCALES, EXIT_TEMPERATURES, strict=True)):
            powers = np.exp(row * scale / temperature)
            p = powers / powers.sum()
            if p.max() >= threshold or n == 2:
                break
        left.append(n)
        answers.append(p)
    return np.array(left), np.array(answers)


def make_images(count: int = 9) -> np.ndarray:
    """Images of one colour each, plus a little noise: uint8 ``(count, 8, 8, 3)``."""
    rng = np.random.default_rng(5)
    colours = rng.integers(0, 256, (count, 1, 1, 3))
    return np.clip(colours + rng.integers(-9, 10, (count, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def encode(image: np.ndarray, kind: str = ".png") -> bytes:
    """An image file's bytes."""
    return cv2.imencode(kind, image[..., ::-1])[1].tobytes()


def write_images(folder: Path, images: np.ndarray) -> list[Path]:
    """``0.png``, ``1.png`` ... in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{n}.png" for n in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(encode(image))
    return paths

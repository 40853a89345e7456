"""Runs a network with exits that was written as a chain of ONNX segments.

ONNX Runtime runs a segment, the same :class:`ExitPolicy` as everywhere decides, and only the
samples that are left go into the next segment: real exits, the same decisions as torch's.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gfnet_dynn.models.exit_policy import ExitPolicy, keep_rows

CHAIN_FILE = "chain.json"
CHAIN_VERSION = 1


class ChainResult(NamedTuple):
    """``logits (N, K)`` float32 and ``exit_index (N,)`` int64 in 0..G, in the input's order."""

    logits: np.ndarray
    exit_index: np.ndarray


def input_name(index: int) -> str:
    """The name of a segment's only input."""
    return "image" if index == 0 else "tokens_in"


def session(path: str | Path, *, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU that says nothing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxEarlyExit:
    """Runs a chain of segments with real exits.

    Args:
        folder: where ``chain.json`` lies.
        threads: of ONNX Runtime.

    Raises:
        FileNotFoundError: no chain there.
        ValueError: a chain of another version, or one that lacks entries.
    """

    def __init__(self, folder: str | Path, *, threads: int = 1) -> None:
        path = Path(folder) / CHAIN_FILE
        if not path.is_file():
            raise FileNotFoundError(f"chain: got {path}, expected an existing file")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"chain: {path} is not JSON: {error}") from error
        needed = {"version", "segments", "exits", "img_size", "num_classes", "policy"}
        if not isinstance(facts, dict) or facts.get("version") != CHAIN_VERSION:
            raise ValueError(f"chain: {path} has no version {CHAIN_VERSION}")
        if missing := needed - facts.keys():
            raise ValueError(f"chain: {path} lacks {sorted(missing)}")
        self.facts = facts
        self.img_size = tuple(facts["img_size"])
        self.policy = None if facts["policy"] is None else ExitPolicy.from_state(facts["policy"])
        self.sessions = []
        for name in facts["segments"]:
            segment = path.parent / Path(name).name
            if not segment.is_file():
                raise FileNotFoundError(f"chain: got {segment}, expected an existing file")
            self.sessions.append(session(segment, threads=threads))

    def run(self, images: np.ndarray, policy: ExitPolicy | None = None) -> ChainResult:
        """Classify normalised images float32 ``(N, 3, H, W)``.

        Args:
            policy: None takes the chain's own.
        """
        policy = self.policy if policy is None else policy
        if policy is None:
            raise ValueError("policy: got none, and the chain has none; expected an ExitPolicy")
        if images.ndim != 4 or tuple(images.shape[2:]) != self.img_size:
            raise ValueError(
                f"images: got shape {images.shape}, expected (N, 3, {self.img_size[0]}, "
                f"{self.img_size[1]})"
            )
        num_gates = len(self.sessions) - 1
        policy.check(num_gates)
        n, classes = len(images), self.facts["num_classes"]
        out = np.empty((n, classes), np.float32)
        exit_index = np.full(n, num_gates, np.int64)
        rows, value, state = np.arange(n), images, {}
        for index, part in enumerate(self.sessions):
            if not len(rows):
                break
            results = part.run(None, {input_name(index): value})
            if index == num_gates:
                out[rows] = results[0]
                break
            tokens, logits, gate_logit = results
            leaving = policy.leave(
                index, torch.from_numpy(logits), torch.from_numpy(gate_logit), state
            ).numpy()
            if not leaving.any():
                value = tokens
                continue
            gone, stay = rows[leaving], np.flatnonzero(~leaving)
            out[gone], exit_index[gone] = logits[leaving], index
            rows, value = rows[stay], tokens[stay]
            keep_rows(state, torch.from_numpy(stay))
        return ChainResult(out, exit_index)

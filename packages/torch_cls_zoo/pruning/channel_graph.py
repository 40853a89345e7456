"""Which channels of a network hang together, found by walking its graph once.

Every channel of every tensor gets a number. A convolution makes new ones, BatchNorm, activations
and pooling pass them on, a sum or product makes those of its sides one, a concatenation lines them
up. What is then one number can only be cut off as one. Whatever the walk does not understand (a
grouped convolution, a channel shuffle, a normalisation over channels) keeps its channels whole:
they are *fixed*. So are the network's outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Tracer
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

Ids = NDArray[np.int64]

_PASS_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid,
    nn.ELU, nn.Hardtanh, nn.Tanh, nn.Mish, nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
# By the function's own name: torch's, and what torchvision and timm wrap.
_PASS_NAMES = {
    "relu", "relu_", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "sigmoid_",
    "dropout", "dropout_", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "contiguous",
    "stochastic_depth", "clone", "boolean_dispatch",
}  # fmt: skip
_JOIN_NAMES = {"add", "add_", "iadd", "mul", "mul_", "imul"}
_SHAPE_NAMES = {"size", "getattr", "dim"}  # tell about a tensor, and change none
_FLAT_NAMES = {"flatten", "view", "reshape"}


class ChannelGraph:
    """The channels of a network and what each layer reads and writes.

    Args:
        model: in eval mode.
        image: one input ``(1, 3, H, W)``.

    Raises:
        ValueError: the network cannot be traced, for it decides by its data where to go.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.modules = dict(model.named_modules())
        self.parent: list[int] = []
        self.fixed: set[int] = set()
        self.reads: dict[str, Ids] = {}  # by layer: ids of its input channels
        self.writes: dict[str, Ids] = {}  # by layer: ids of its output channels
        try:
            graph = _Leaves().trace(model)
            traced = GraphModule(model, graph)
            with torch.no_grad():
                ShapeProp(traced).propagate(image)
        except Exception as error:  # tracing runs the network's own code, which may raise anything
            reason = " ".join(str(error).split())[:120]
            raise ValueError(
                f"{type(model).__name__} cannot be traced, so its channels cannot be cut ({reason})"
            ) from error
        self._ids: dict[Node, Ids | None] = {}
        for node in graph.nodes:
            self._ids[node] = self._visit(node)

    def root(self, channel: int) -> int:
        """The number that stands for all channels that hang together with this one."""
        while self.parent[channel] != channel:
            self.parent[channel] = self.parent[self.parent[channel]]
            channel = self.parent[channel]
        return channel

    def roots(self, ids: Ids) -> Ids:
        """:meth:`root` of each."""
        return np.array([self.root(int(channel)) for channel in ids], dtype=np.int64)

    def fixed_roots(self) -> set[int]:
        """Groups that must stay."""
        return {self.root(channel) for channel in self.fixed}

    # -- the walk ----------------------------------------------------------------------------

    def _new(self, count: int, *, fixed: bool = False) -> Ids:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        if fixed:
            self.fixed.update(range(first, first + count))
        return np.arange(first, first + count)

    def _fix(self, ids: Ids | None) -> None:
        if ids is not None:
            self.fixed.update(int(channel) for channel in ids)

    def _join(self, sides: list[Ids]) -> Ids:
        for other in sides[1:]:
            for a, b in zip(sides[0], other, strict=True):
                self.parent[self.root(int(b))] = self.root(int(a))
        return sides[0]

    def _visit(self, node: Node) -> Ids | None:
        shape = _shape(node)
        inputs = [self._ids.get(source) for source in node.all_input_nodes]
        known = [ids for ids in inputs if ids is not None]
        if node.op == "placeholder":
            return None if shape is None else self._new(shape[1], fixed=True)
        if node.op == "call_module":
            return self._layer(node, known, shape)
        name = node.target if isinstance(node.target, str) else _name(node.target)
        if name in _SHAPE_NAMES or (node.target is operator.getitem and shape is None):
            return None
        if node.op in ("call_function", "call_method") and shape is not None:
            if name == "cat" and _axis(node) == 1 and len(known) == len(inputs):
                joined = np.concatenate(known)
                if len(joined) == shape[1]:
                    return joined
            elif name in _JOIN_NAMES and known and all(len(k) == shape[1] for k in known):
                return self._join(known)
            elif name in _FLAT_NAMES and len(known) == 1 and len(shape) == 2:
                before = _shape(node.all_input_nodes[inputs.index(known[0])])
                if before is not None and len(before) == 4 and before[0] == shape[0]:
                    return np.repeat(known[0], before[2] * before[3])
            elif name in _PASS_NAMES and len(known) == 1 and self._same(node, shape, known[0]):
                return known[0]
        for ids in known:
            self._fix(ids)
        if shape is None or len(shape) < 2 or node.op == "output":
            return None
        return self._new(shape[1], fixed=True)

    def _same(self, node: Node, shape: tuple[int, ...], ids: Ids) -> bool:
        """Whether axis 1 of the output is axis 1 of the input."""
        before = _shape(node.all_input_nodes[0])
        if before is None or len(before) < 2 or before[1] != shape[1] or len(ids) != shape[1]:
            return False
        # A mean over places keeps axis 1; one over channels would have another length or order.
        return len(shape) == len(before) or (len(before) == 4 and len(shape) == 2)

    def _layer(self, node: Node, known: list[Ids], shape: tuple[int, ...] | None) -> Ids | None:
        layer = self.modules[str(node.target)]
        name = str(node.target)
        if name in self.reads:  # one layer at work in two places
            for ids in [*known, self.reads[name], self.writes[name]]:
                self._fix(ids)
        elif len(known) == 1 and shape is not None:
            ids = known[0]
            before = _shape(node.all_input_nodes[0]) or ()
            if isinstance(layer, nn.Conv2d) and layer.groups == 1:
                self.reads[name], self.writes[name] = ids, self._new(layer.out_channels)
                return self.writes[name]
            if (
                isinstance(layer, nn.Conv2d)
                and layer.groups == layer.in_channels == layer.out_channels
            ):  # depthwise: channel in, channel out
                self.reads[name] = self.writes[name] = ids
                return ids
            if isinstance(layer, nn.Linear) and len(before) == 2:
                self.reads[name], self.writes[name] = ids, self._new(shape[1], fixed=True)
                return self.writes[name]
            if isinstance(layer, _BatchNorm):
                self.reads[name] = self.writes[name] = ids
                return ids
            passes = isinstance(layer, _PASS_MODULES) or type(layer).__name__ in (
                "StochasticDepth", "DropPath", "SelectAdaptivePool2d",
            )  # fmt: skip
            if passes and len(ids) == shape[1]:
                return ids
            flat = isinstance(layer, nn.Flatten) or type(layer).__name__ == "SelectAdaptivePool2d"
            if flat and len(shape) == 2 and len(before) == 4 and layer_start(layer) == 1:
                return np.repeat(ids, shape[1] // len(ids))
        for ids in known:
            self._fix(ids)
        return None if shape is None or len(shape) < 2 else self._new(shape[1], fixed=True)


def layer_start(layer: nn.Module) -> int:
    """The first axis that a flattening layer flattens."""
    return int(getattr(layer, "start_dim", 1))


def _shape(node: Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    found = getattr(meta, "shape", None)
    return None if found is None else tuple(int(side) for side in found)


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target)).lstrip("_")


def _axis(node: Node) -> int:
    axis = node.kwargs.get(
        "dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0)
    )
    return axis if isinstance(axis, int) else -1


class _Leaves(Tracer):
    """Does not look into layers that pass channels on or normalise them."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        whole = ("StochasticDepth", "DropPath", "SelectAdaptivePool2d")
        return (
            isinstance(module, _BatchNorm)
            or type(module).__name__ in whole
            or super().is_leaf_module(module, qualified_name)
        )


def layers_of(graph: ChannelGraph, kinds: tuple[type, ...]) -> Iterable[tuple[str, Any]]:
    """The layers of ``kinds`` that the walk met, with their names."""
    for name in graph.writes:
        if isinstance(graph.modules[name], kinds):
            yield name, graph.modules[name]

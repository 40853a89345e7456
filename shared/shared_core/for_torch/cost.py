"""Parameters and MACs of each layer of any module, measured during one forward.

Forward hooks tell which module is at work; the matrix products, convolutions, attentions
and FFTs that PyTorch then runs are counted with the formulas of ``metrics.cost``. So
functional calls are counted too (``F.linear`` on a module's own weights, ``einsum``,
``scaled_dot_product_attention``), and a tensor on the ``meta`` device costs nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from shared_core.metrics.cost import LayerCost, fft_macs

# Given (module, inputs, output), the MACs of one call of a module.
Formula = Callable[[nn.Module, tuple[Any, ...], Any], int]


def layer_costs(
    model: nn.Module,
    *inputs: Any,
    formulas: Mapping[type[nn.Module], Formula] | None = None,
) -> list[LayerCost]:
    """What each layer of ``model`` costs in one forward of ``inputs``.

    The model runs once in eval mode without gradients; its modes, hooks and buffers are
    then as before. MACs are those of the whole batch: give a batch of 1 for "per image".

    Args:
        model: any module.
        inputs: what its forward takes; ``meta`` tensors with a ``meta`` model will do.
        formulas: MACs by module class, instead of what such a module computes inside. For
            example a global filter that multiplies with a DFT matrix, or calls an FFT
            that is to be counted by another convention.

    Returns:
        One entry for each module that has parameters of its own or computes something, in
        the order of ``named_modules``. A parameter that several modules share counts once,
        at the first.
    """
    names = {module: name or "(model)" for name, module in model.named_modules()}
    chosen = formulas or {}
    modes = {module: module.training for module in names}
    counter = _Counter()
    handles: list[RemovableHandle] = []
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused encoder kernels hide their products.
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        for module, name in names.items():
            formula = _formula_for(module, chosen)
            handles.append(module.register_forward_pre_hook(counter.enter(name, formula)))
            handles.append(
                module.register_forward_hook(counter.leave(name, formula), always_call=True)
            )
        with torch.no_grad(), counter:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
        torch.backends.mha.set_fastpath_enabled(fast_path)
    costs = []
    seen: set[int] = set()
    for module, name in names.items():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        params = sum(p.numel() for p in own)
        cost = LayerCost(name, params, counter.macs[name], counter.elementwise[name])
        if cost.params or cost.macs or cost.elementwise:
            costs.append(cost)
    return costs


def count_params(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters (each once); ``trainable``: only those with a gradient.

    Buffers, such as the running statistics of BatchNorm, are not parameters.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _formula_for(module: nn.Module, formulas: Mapping[type[nn.Module], Formula]) -> Formula | None:
    for kind in type(module).__mro__:  # the nearest class decides
        if kind in formulas:
            return formulas[kind]
    return None


class _Counter(TorchDispatchMode):
    """Adds the cost of each operation to the module that runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: dict[str, int] = defaultdict(int)
        self.elementwise: dict[str, int] = defaultdict(int)
        self.running: list[str] = []  # modules at work, the innermost last
        self.silent = 0  # modules at work that are counted by a formula

    def enter(self, name: str, formula: Formula | None) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.running.append(name)
            self.silent += formula is not None

        return hook

    def leave(self, name: str, formula: Formula | None) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.running.pop()
            if formula is not None:
                self.silent -= 1
                if self.silent == 0 and output is not None:
                    self.macs[name] += int(formula(module, inputs, output))

        return hook

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.silent == 0 and self.running:
            name = func.overloadpacket.__name__
            self.macs[self.running[-1]] += _macs(name, args, kwargs or {}, output)
            if name == "native_layer_norm":
                self.elementwise[self.running[-1]] += 5 * args[0].numel()
        return output


def _macs(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> int:
    """MACs of one ATen operation; 0 for all that multiply no matrices."""
    if name == "mm":
        return _product(args[0], args[1])
    if name == "addmm":
        return _product(args[1], args[2])
    if name == "bmm":
        return _product(args[0], args[1])
    if name == "baddbmm":
        return _product(args[1], args[2])
    if name in ("mv", "dot", "vdot"):
        return int(args[0].numel())
    if name == "addmv":
        return int(args[1].numel())
    if name in ("convolution", "_convolution"):
        data, weight, transposed = args[0], args[1], args[6]
        # weight is (out, in / groups, ...), transposed (in, out / groups, ...): in both cases
        # all but its first axis meets each output pixel (transposed: each input pixel).
        reach = math.prod(weight.shape[1:])
        return int((data if transposed else output).numel() * reach)
    if name.startswith("_scaled_dot_product"):
        query, key, value = args[:3]
        pairs = query.numel() // query.shape[-1] * key.shape[-2]
        return int(pairs * (query.shape[-1] + value.shape[-1]))
    if name in ("_fft_r2c", "_fft_c2r", "_fft_c2c"):
        data, axes = args[0], args[1]
        points = math.prod(data.shape[axis] for axis in axes)
        return fft_macs(points, data.numel() // points)
    return 0


def _product(left: Any, right: Any) -> int:
    """``(..., n, k) @ (..., k, m)``."""
    return int(left.numel() * right.shape[-1])

"""From a plain network's ONNX file to one that takes images and gives answers, its facts inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.checkpoints.atomic import atomic_write
from shared_core.deploy.check import ExportError
from shared_core.deploy.facts import METADATA_KEY, ModelFacts

INPUT = "images"  # uint8 (N, H, W, 3), RGB
LOGITS = "logits"  # of a segment's head
PROBABILITIES, FEATURES = "probabilities", "features"  # float32 (N, K), (N, D)
LEAST_OPSET = 13  # of softmax over one axis, and of a scale for each channel in int8
OWN = "smallvision/"  # begins the names of what is added
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # what has a weight
_TINY = 1e-12  # the least length that features are divided by


def wrap_network(source: str | Path | Any, facts: ModelFacts) -> Any:
    """``images`` uint8 ``(N, H, W, 3)`` in, ``probabilities`` float32 ``(N, K)`` out, any batch.

    Normalisation, temperature and softmax or sigmoid lie inside; for the task ``embed`` the output
    is ``features (N, D)``, of length 1 if the facts say ``unit``. The facts stand in the metadata.

    Args:
        source: an ONNX file, or a ``ModelProto``: float32 normalised images ``(N, 3, H, W)`` to
            logits (features) ``(N, K)``, as torch.onnx and Paddle2ONNX write it.

    Returns:
        An ``onnx.ModelProto``.

    Raises:
        ExportError: the network is not of that form, or not of the classes or the size of the
            facts.
    """
    model = _load(source)
    _take_images(model, facts)
    _give_answers(model, facts)
    return _finished(model, facts)


def wrap_chain(sources: Sequence[str | Path | Any], facts: ModelFacts) -> list[Any]:
    """The same for a network with early exits that was cut into segments.

    The first segment takes uint8 images like a whole network. Temperatures and softmax stay
    outside, because the exit policy wants the logits.

    Args:
        sources: G+1 of them; each gives ``logits`` and what the next one takes (see
            ``deploy.exit_chain``), the last ``logits`` alone.

    Raises:
        ExportError: another number of segments than the facts have exits, or other outputs.
    """
    exits = facts.exits
    if exits is None or len(sources) != len(exits.costs):
        expected = "none" if exits is None else len(exits.costs)
        raise ExportError(f"{len(sources)} segments of a chain, expected {expected}")
    made = []
    for index, source in enumerate(sources):
        model = _load(source)
        heads = [one for one in model.graph.output if one.name == LOGITS]
        if len(heads) != 1 or (index == len(sources) - 1 and len(model.graph.output) > 1):
            names = ", ".join(one.name for one in model.graph.output)
            raise ExportError(f"segment {index} gives {names}; expected {LOGITS} (the last: alone)")
        if index == 0:
            _take_images(model, facts)
        _check_width(heads[0], facts)
        made.append(_finished(model, facts))
    return made


def input_of(model: Any) -> Any:
    """The one input of a model that is no constant.

    Raises:
        ExportError: it has none or several.
    """
    constants = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs) or "none"
        raise ExportError(f"the network's inputs are {names}; expected one")
    return inputs[0]


def set_facts(path: Path, facts: ModelFacts) -> None:
    """Put other facts into the metadata of a file; it is replaced at once."""
    import onnx

    model = onnx.load(str(path))
    _describe(model, facts)
    atomic_write(path, lambda scratch: onnx.save(model, str(scratch)))


def _load(source: str | Path | Any) -> Any:
    import onnx

    model = onnx.ModelProto()
    if isinstance(source, str | Path):
        model = onnx.load(str(source))
    else:
        model.CopyFrom(source)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < LEAST_OPSET:
        raise ExportError(f"the network has opset {opset}, expected {LEAST_OPSET} or more")
    # What exporters note of the code that they came through: file names of this machine.
    graph = model.graph
    noted = [graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]
    for part in (model, *noted):
        part.doc_string = ""
        if part is not model and hasattr(part, "metadata_props"):
            del part.metadata_props[:]
    _name_layers(graph)
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    if taken & {INPUT, PROBABILITIES, FEATURES} or any(n.startswith(OWN) for n in taken):
        # Values alone: layers that stay float are known by the names of their nodes.
        model = onnx.compose.add_prefix(model, "network/", rename_nodes=False)
    return model


def _name_layers(graph: Any) -> None:
    """Call a layer as its network calls it, where its weight ``blocks.0.conv.weight`` says so."""
    weights = {one.name for one in graph.initializer if one.name.endswith(".weight")}
    used = {node.name for node in graph.node}
    for node in graph.node:
        name = node.input[1].removesuffix(".weight") if len(node.input) > 1 else ""
        if name and node.op_type in LAYERS and node.input[1] in weights and name not in used:
            node.name = name
            used.add(name)


def _take_images(model: Any, facts: ModelFacts) -> None:
    """Put the normalisation in front: bytes are turned first, which costs least."""
    from onnx import TensorProto, helper

    old = input_of(model)
    shape = _dims(old)
    if old.type.tensor_type.elem_type != TensorProto.FLOAT or len(shape) != 4:
        raise ExportError(f"the input {old.name!r} is no float32 (N, 3, H, W)")
    if isinstance(shape[0], int):
        raise ExportError(f"the network takes batches of {shape[0]} alone, expected any batch")
    for got, wanted in zip(shape[1:], (3, *facts.input_size), strict=True):
        if isinstance(got, int) and got != wanted:
            raise ExportError(
                f"the network's images are {shape[1:]}, expected (3, H, W) of {facts.input_size}"
            )
    scale, shift = facts.scale_and_shift()
    order = [2, 1, 0] if facts.bgr else [0, 1, 2]
    nodes = [helper.make_node("Transpose", [INPUT], [OWN + "planes"], perm=[0, 3, 1, 2])]
    last = OWN + "planes"
    if facts.bgr:
        _constant(model, "bgr", np.array(order, np.int64))
        nodes.append(helper.make_node("Gather", [last, OWN + "bgr"], [OWN + "turned"], axis=1))
        last = OWN + "turned"
    _constant(model, "scale", scale[order].reshape(1, 3, 1, 1))
    _constant(model, "shift", shift[order].reshape(1, 3, 1, 1))
    nodes += [
        helper.make_node("Cast", [last], [OWN + "floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [OWN + "floats", OWN + "scale"], [OWN + "scaled"]),
        helper.make_node("Add", [OWN + "scaled", OWN + "shift"], [old.name]),
    ]
    _add(model, nodes, front=True)
    images = helper.make_tensor_value_info(
        INPUT, TensorProto.UINT8, ["batch", *facts.input_size, 3]
    )
    model.graph.input.remove(old)
    model.graph.input.insert(0, images)


def _give_answers(model: Any, facts: ModelFacts) -> None:
    """Put temperature and activation behind the only output."""
    from onnx import TensorProto, helper

    if len(model.graph.output) != 1:
        raise ExportError(f"the network has {len(model.graph.output)} outputs, expected one")
    old = model.graph.output[0]
    width = _check_width(old, facts)
    name = PROBABILITIES if facts.task == "classify" else FEATURES
    last, nodes = old.name, []
    if old.type.tensor_type.elem_type != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [last], [OWN + "out"], to=TensorProto.FLOAT))
        last = OWN + "out"
    if facts.temperature != 1:
        _constant(model, "temperature", np.array(facts.temperature, np.float32))
        nodes.append(helper.make_node("Div", [last, OWN + "temperature"], [OWN + "cooled"]))
        last = OWN + "cooled"
    if facts.activation == "softmax":
        nodes.append(helper.make_node("Softmax", [last], [name], axis=1))
    elif facts.activation == "sigmoid":
        nodes.append(helper.make_node("Sigmoid", [last], [name]))
    elif facts.activation == "unit":
        nodes += _unit_length(model, last, name)
    else:
        nodes.append(helper.make_node("Identity", [last], [name]))
    _add(model, nodes)
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
    )


def _unit_length(model: Any, features: str, name: str) -> list[Any]:
    from onnx import helper

    _constant(model, "axes", np.array([1], np.int64))
    _constant(model, "tiny", np.array(_TINY, np.float32))
    square, total, length, divisor = (OWN + n for n in ("square", "total", "length", "divisor"))
    return [
        helper.make_node("Mul", [features, features], [square]),
        helper.make_node("ReduceSum", [square, OWN + "axes"], [total], keepdims=1),
        helper.make_node("Sqrt", [total], [length]),
        helper.make_node("Max", [length, OWN + "tiny"], [divisor]),
        helper.make_node("Div", [features, divisor], [name]),
    ]


def _check_width(output: Any, facts: ModelFacts) -> int | str:
    shape = _dims(output)
    if len(shape) != 2:
        raise ExportError(f"the output {output.name!r} has {len(shape)} axes, expected (N, K)")
    if facts.class_names and isinstance(shape[1], int) and shape[1] != len(facts.class_names):
        raise ExportError(
            f"the network has {shape[1]} outputs an image, expected {len(facts.class_names)} "
            "for the classes of its facts"
        )
    return len(facts.class_names) or shape[1]


def _finished(model: Any, facts: ModelFacts) -> Any:
    import onnx

    _describe(model, facts)
    onnx.checker.check_model(model)
    return model


def _describe(model: Any, facts: ModelFacts) -> None:
    text = json.dumps(facts.as_dict(), ensure_ascii=False)
    others = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    model.metadata_props.add(key=METADATA_KEY, value=text)


def _dims(value: Any) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param for d in dims
    ]


def _constant(model: Any, name: str, value: Any) -> None:
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(value, OWN + name))


def _add(model: Any, nodes: Sequence[Any], *, front: bool = False) -> None:
    for node in nodes:
        node.name = OWN + node.op_type.lower() + "/" + node.output[0].rpartition("/")[2]
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old] if front else [*old, *nodes])

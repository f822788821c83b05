"""Repeat the graph of one block with the weights of others: exporting one is enough where all are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import onnx
from onnx import numpy_helper

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Weights = Mapping[str, "NDArray[np.float32]"]


class Repeatable(NamedTuple):
    """The graph of one block, (B, N, C) to (B, N, C), and which weight each initializer holds.

    `places`: initializer -> (name of the weight, is it transposed). The other initializers are constants.
    """

    graph: onnx.ModelProto
    places: dict[str, tuple[str, bool]]


def repeatable(model: onnx.ModelProto, weights: Weights) -> Repeatable | None:
    """Find the weights that `model` was exported with, no two of them equal, among its initializers.

    None where an initializer with several floats is no weight: the exporter has computed it from weights.
    """
    whole = {(w.shape, w.tobytes()): name for name, w in weights.items()}
    turned = {(w.T.shape, w.T.tobytes()): name for name, w in weights.items() if w.ndim == 2}
    places = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        key = (array.shape, array.tobytes())
        if key in whole:
            places[tensor.name] = (whole[key], False)
        elif key in turned:
            places[tensor.name] = (turned[key], True)
        elif array.dtype.kind == "f" and array.size > 1:
            return None
    return Repeatable(model, places)


def chained(block: Repeatable, weights: Sequence[Weights]) -> onnx.ModelProto:
    """The graph of a block once for each of `weights`, one after another.

    Nodes, values and weights get the index of their block in front of their names; constants are shared.
    """
    model, source = onnx.ModelProto(), block.graph.graph
    model.CopyFrom(block.graph)
    graph = model.graph
    for field in ("node", "value_info", "initializer"):
        graph.ClearField(field)
    graph.initializer.extend(tensor for tensor in source.initializer if tensor.name not in block.places)
    shared = {"", *(tensor.name for tensor in graph.initializer)}
    entering = source.input[0].name
    for index, own in enumerate(weights):
        names = {source.input[0].name: entering}
        if index == len(weights) - 1:
            names[source.output[0].name] = source.output[0].name
        for tensor, (name, transposed) in block.places.items():
            array = own[name].T.copy() if transposed else own[name]
            graph.initializer.append(numpy_helper.from_array(array, f"{index}.{tensor}"))
        for node in source.node:
            added = graph.node.add()
            added.CopyFrom(node)
            added.name = f"{index}.{node.name}"
            for field in (added.input, added.output):
                field[:] = [n if n in shared else names.get(n, f"{index}.{n}") for n in field]
        entering = names.get(source.output[0].name, f"{index}.{source.output[0].name}")
    return model

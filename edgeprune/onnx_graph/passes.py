"""Passes over a graph: opset 17 from torch's 18, 19 for FP8, GELU in the form that runtimes fuse, no source paths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from edgeprune.errors import REPORT, ExportError

OPSET, OPSET_FP8 = 17, 19
REDUCTIONS = {
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}
CHANGED_IN_18 = {"Resize", "ScatterElements", "ScatterND", "GroupNormalization"}


def lower_opset(model: onnx.ModelProto) -> None:
    """Convert opset 18 to 17 in place: axes of reductions become an attribute, Split takes the number of its outputs.

    Pad is the same in both but for its axes, a fourth input. Raises ExportError, naming the operator, for other
    operators that changed in opset 18 and for unequal parts.
    """
    constants = {t.name: t for t in model.graph.initializer}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*model.graph.value_info, *model.graph.input)}
    for node in model.graph.node:
        if node.op_type in REDUCTIONS and len(node.input) == 2:
            axes = onnx.numpy_helper.to_array(constants[node.input.pop()])
            _keep(node, "keepdims")
            node.attribute.append(onnx.helper.make_attribute("axes", axes.tolist()))
        elif node.op_type == "Split" and _parts_are_known(node, shapes.get(node.input[0], ())):
            _keep(node, "axis")
        elif node.op_type in {*CHANGED_IN_18, "Split"} or (node.op_type == "Pad" and len(node.input) > 3):
            raise ExportError(f"{node.op_type} has no opset-{OPSET} form here: {REPORT}")
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = OPSET
    drop_unused(model.graph)
    model.ir_version = 8  # the ONNX IR of opset 17


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove, in place, the initializers that no node reads."""
    used = {name for node in graph.node for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)


def raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an opset-17 graph in opset 19, which has FP8: the reverse of what `lower_opset` does to nodes.

    Raises ExportError, naming the operator, for other operators that changed in opset 18.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for node in out.graph.node:
        axes = [a for a in node.attribute if a.name == "axes"]
        if node.op_type in REDUCTIONS and axes:
            name = "axes_" + "_".join(str(axis) for axis in axes[0].ints)
            node.attribute.remove(axes[0])
            node.input.append(name)
            if all(tensor.name != name for tensor in out.graph.initializer):
                values = np.array(axes[0].ints, np.int64)
                out.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        elif node.op_type == "Split" and len(node.input) == 1:
            node.attribute.append(onnx.helper.make_attribute("num_outputs", len(node.output)))
        elif node.op_type in CHANGED_IN_18:
            raise ExportError(f"{node.op_type} has no opset-{OPSET_FP8} form here: {REPORT}")
    for opset in out.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = OPSET_FP8
    out.ir_version = 9  # the ONNX IR of opset 19
    return out


def _keep(node: onnx.NodeProto, name: str) -> None:
    """Remove all attributes of a node except one."""
    kept = [a for a in node.attribute if a.name == name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _parts_are_known(node: onnx.NodeProto, dims: Sequence[onnx.TensorShapeProto.Dimension]) -> bool:
    """Are the sizes of the parts of a Split given, or is a tensor of these dimensions split into equal parts?"""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    size = dims[axis].dim_value if -len(dims) <= axis < len(dims) else 0
    return len(node.input) == 2 or (size > 0 and size % len(node.output) == 0)


def canonical_gelu(model: onnx.ModelProto) -> None:
    """Rewrite GELU from torch's x * (0.5 * (1 + erf)) to (x * (1 + erf)) * 0.5, which runtimes fuse; exact.

    Source of the pattern: ONNX Runtime's GeluFusion. Without fusion it is five operators on the widest tensor.
    """
    made = {output: node for node in model.graph.node for output in node.output}
    erf = {output for output, node in made.items() if node.op_type == "Erf"}
    plus_one = {output for output, node in made.items() if node.op_type == "Add" and erf & set(node.input)}
    for outer in (node for node in model.graph.node if node.op_type == "Mul"):
        for x, product in permutations(list(outer.input)):
            inner = made.get(product)
            if inner is None or inner.op_type != "Mul" or not plus_one & set(inner.input):
                continue
            plus, half = sorted(inner.input, key=lambda name: name not in plus_one)
            inner.input[:] = [x, plus]
            outer.input[:] = [product, half]


def drop_idle_casts(model: onnx.ModelProto) -> None:
    """Remove casts to the type that a value already has, in place, from a graph with inferred types."""
    values = (*model.graph.value_info, *model.graph.input)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    outputs = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        if node.op_type == "Cast" and types.get(node.input[0]) == to and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's stack traces and source paths: a file must not depend on where it was made."""
    graph = model.graph
    model.producer_name, model.producer_version, model.doc_string = "edgeprune", "", ""
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    model.ClearField("metadata_props")

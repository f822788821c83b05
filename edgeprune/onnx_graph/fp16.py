"""An fp32 graph in fp16 with fp32 islands."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto

from edgeprune.onnx_graph.graph import infer
from edgeprune.onnx_graph.islands import MOVING_OPS, REDUCTIONS, islands
from edgeprune.onnx_graph.passes import drop_unused

# In fp32 wherever they are: norms can overflow (TRT#2564), and the scores of a cut decide which tokens are kept.
ISLAND_OPS = REDUCTIONS | {"LayerNormalization", "TopK", "ArgMax", "Log"}
# In fp32 because their type is an attribute, or because the standard wants it: that of Q/DQ before opset 19.
FP32_OPS = {"Constant", "ConstantOfShape", "Range", "CumSum"}
QUANTISERS, QUANTISES_FP16_FROM = {"QuantizeLinear", "DequantizeLinear"}, 19
FP32, FP16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
LARGEST = float(np.finfo(np.float16).max)
SUFFIX = {FP32: "_fp32", FP16: "_fp16"}

Nodes = list[onnx.NodeProto]


def fp16(model: onnx.ModelProto, in_fp32: Collection[str] | None = None) -> onnx.ModelProto:
    """Convert to fp16, with fp32 inputs, outputs and islands; softmax of blocks without a cut is fp16 and can fuse.

    `in_fp32` names the nodes that stay in fp32 besides ISLAND_OPS; by default `islands`. A cast
    stands only where a value passes from one type to the other, so nothing between two fp32 nodes is ever rounded.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    infer(out)  # the types of all values
    graph = out.graph
    values = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == FP32}
    real = {n for n, v in values.items() if v.type.tensor_type.elem_type == FP32 and n not in weights}
    opset = next(entry.version for entry in out.opset_import if entry.domain in ("", "ai.onnx"))
    ops = ISLAND_OPS | FP32_OPS | (QUANTISERS if opset < QUANTISES_FP16_FROM else set())
    kinds = _kinds(graph, ops, islands(model) if in_fp32 is None else in_fp32, real)
    held = {value.name: FP32 for value in graph.input if value.name in real}  # type of each value
    made: dict[tuple[str, int], str] = {}  # its name in another type
    nodes: Nodes = []
    halves: list[TensorProto] = []

    def typed(name: str, kind: int) -> str:
        if (name not in weights and name not in held) or held.get(name, FP32) == kind:
            return name
        if (name, kind) not in made:
            made[name, kind] = other = name + SUFFIX[kind]
            if name in weights:
                halves.append(_half(weights[name], other))
            else:
                nodes.append(onnx.helper.make_node("Cast", [name], [other], other, to=kind))
        return made[name, kind]

    for node, kind in zip(list(graph.node), kinds, strict=True):
        node.input[:] = [typed(name, kind) for name in node.input]
        held.update((name, kind) for name in node.output if name in real)
        if node.op_type == "Cast" and node.output[0] in real:
            node.attribute[0].i = kind
        nodes.append(node)
    ends = [value.name for value in graph.output if held.get(value.name) == FP16]
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [name + "_made" if name in ends else name for name in names]
    nodes += [onnx.helper.make_node("Cast", [end + "_made"], [end], end, to=FP32) for end in ends]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(halves)
    drop_unused(graph)
    del graph.value_info[:]  # the types of before
    infer(out)
    return out


def _half(tensor: TensorProto, name: str) -> TensorProto:
    """A weight in fp16; what is beyond its range becomes the largest number."""
    values = onnx.numpy_helper.to_array(tensor)
    kept = np.where(np.isfinite(values), np.clip(values, -LARGEST, LARGEST), values)
    return onnx.numpy_helper.from_array(kept.astype(np.float16), name)


def _kinds(graph: onnx.GraphProto, ops: Collection[str], in_fp32: Collection[str], real: set[str]) -> list[int]:
    """The floating-point type of each node: fp32 for `ops` and `in_fp32` (names), and that of all its ends."""
    nodes = list(graph.node)
    wide = [n.name in in_fp32 or n.op_type in ops for n in nodes]
    wanted = {value.name for value in graph.output}  # values that something takes in fp32
    for node, each in zip(reversed(nodes), reversed(wide), strict=True):
        if each or (node.op_type in MOVING_OPS and wanted.intersection(node.output)):
            wanted.update(node.input)
    made = {value.name for value in graph.input}  # values that are fp32
    for index, node in enumerate(nodes):
        if node.op_type in MOVING_OPS and wanted.intersection(node.output):
            wide[index] = made.issuperset(real.intersection(node.input))
        if wide[index]:
            made.update(node.output)
    return [FP32 if each else FP16 for each in wide]

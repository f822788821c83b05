"""The type that each node of an ONNX graph computes in: fp32 islands of an fp16 graph."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from edgeprune.onnx_graph.graph import infer

SWITCHES = {"Cast", "QuantizeLinear", "DequantizeLinear", "Constant"}  # they have a type of their own
FLOATS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}


def computed_in(model: onnx.ModelProto) -> dict[str, str | None]:
    """For each output of each node: "fp32" or "fp16" as the node computes, None for integers, casts and Q/DQ.

    A node that compares or ranks fp32 values computes in fp32, whatever its output is. Empty where no node computes
    in fp16, because nothing is an island there.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    infer(whole)
    graph = whole.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {t.name: t.data_type for t in graph.initializer}
    found: dict[str, str | None] = {}
    for node in graph.node:
        kinds = {FLOATS.get(types.get(name, 0)) for name in (*node.input, *node.output)} - {None}
        kind = None if node.op_type in SWITCHES else "fp32" if "fp32" in kinds else "fp16" if kinds else None
        found |= {name: kind for name in node.output if name}
    return found if "fp16" in found.values() else {}

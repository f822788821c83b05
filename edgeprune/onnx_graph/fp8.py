"""FP8 (E4M3FN) as explicit Q/DQ on the linear layers of an fp16 graph, for TensorRT 10 and later."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto

from edgeprune.onnx_graph.fp16 import fp16
from edgeprune.onnx_graph.graph import linear_layers
from edgeprune.onnx_graph.int8 import NOMINAL
from edgeprune.onnx_graph.islands import islands
from edgeprune.onnx_graph.passes import raise_opset

LARGEST = 448.0  # of E4M3FN
SMALLEST_SCALE = float(np.finfo(np.float16).tiny)  # a smaller one would be subnormal in fp16


def fp8(model: onnx.ModelProto, ranges: Mapping[str, float] | None = None) -> onnx.ModelProto:
    """Quantise linear layers to FP8, weights and activations per tensor; the rest becomes fp16 (opset 19).

    `ranges` gives the largest magnitude of each tensor, nominal ones where it is None. Scales are fp16, so that no
    cast stands between Q/DQ and the product, which would keep TensorRT from fusing them (source:
    NVIDIA/Model-Optimizer#1289, which removes such casts). Weights are quantised in the graph. Raises ExportError as
    raise_opset does.
    """
    out = raise_opset(model)
    layers = {node.name for node in linear_layers(model)}
    weights = {tensor.name: tensor for tensor in out.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    restored: dict[str, str] = {}

    def pair(name: str, limit: float) -> str:
        """The name of a tensor of values up to `limit` after QuantizeLinear and DequantizeLinear; made once."""
        if name not in restored:
            scale, zero, middle = f"{name}_scale", f"{name}_zero", f"{name}_fp8"
            value = np.asarray(max(limit / LARGEST, SMALLEST_SCALE), np.float32)
            out.graph.initializer.extend(
                [
                    onnx.numpy_helper.from_array(value, scale),
                    TensorProto(name=zero, data_type=TensorProto.FLOAT8E4M3FN, raw_data=b"\0"),
                ]
            )
            restored[name] = f"{name}_restored"
            for kind, ends in (("QuantizeLinear", (name, middle)), ("DequantizeLinear", (middle, restored[name]))):
                made = onnx.helper.make_node(kind, [ends[0], scale, zero], [ends[1]], f"{name}_{kind}")
                nodes.append(made)
        return restored[name]

    for node in out.graph.node:
        if node.name in layers:
            entering, weight = node.input
            largest = float(np.abs(onnx.numpy_helper.to_array(weights[weight])).max())
            node.input[:] = [pair(entering, NOMINAL if ranges is None else ranges[entering]), pair(weight, largest)]
        nodes.append(node)
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    return fp16(out, islands(model))

"""INT8 as explicit Q/DQ on the linear layers of an fp32 graph; the rest stays fp32, or becomes fp16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from edgeprune.io import sha256_bytes
from edgeprune.onnx_graph.fp16 import fp16
from edgeprune.onnx_graph.graph import infer, linear_layers
from edgeprune.onnx_graph.islands import islands
from edgeprune.onnx_graph.passes import drop_unused
from edgeprune.records import Int8Ranges

LARGEST = 127  # quantised values are -127 to 127: symmetric, as TensorRT requires
NOMINAL = 8.0  # range of an activation when only latency matters, so that no picture is needed


class Int8Layer(NamedTuple):
    """A linear layer of an fp32 graph, as INT8 will have it."""

    weights: str  # hash of its fp32 weights, (in, out)
    limit: float | None  # largest magnitude of its input; None: it stays in floating point


def int8_layers(model: onnx.ModelProto, found: Int8Ranges) -> tuple[Int8Layer, ...]:
    """The linear layers of a graph in order, with the ranges and exceptions of its calibration."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return tuple(
        Int8Layer(
            sha256_bytes(onnx.numpy_helper.to_array(weights[node.input[1]]).tobytes()),
            None if node.name in found.kept else found.ranges[node.input[0]],
        )
        for node in linear_layers(model)
    )


def int8(
    model: onnx.ModelProto,
    ranges: Mapping[str, float] | None = None,
    kept: Sequence[str] = (),
    fp32_weights: bool = False,
) -> onnx.ModelProto:
    """Quantise linear layers to INT8: weights per output channel, activations per tensor, both symmetric.

    `ranges` gives the largest magnitude of each tensor; without it nominal ranges are used, which is enough to
    measure latency. Layers (node names) in `kept` are not quantised. The file holds INT8 weights; with
    `fp32_weights` it holds fp32 ones and quantises them in the graph, to the same values.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    layers = {node.name for node in linear_layers(model) if node.name not in kept}
    weights = {tensor.name: tensor for tensor in out.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    tensors: dict[str, Any] = {}
    restored: dict[str, str] = {}

    def pair(name: str, scale: Any, **axis: int) -> str:
        """The name of a tensor after QuantizeLinear and DequantizeLinear; made once."""
        if name not in restored:
            tensors[f"{name}_scale"], tensors[f"{name}_zero"] = scale, np.zeros(scale.shape, np.int8)
            if axis and not fp32_weights:
                values = onnx.numpy_helper.to_array(weights[name])
                tensors[f"{name}_int8"] = np.clip(np.rint(values / scale), -LARGEST, LARGEST).astype(np.int8)
            else:
                nodes.append(_node("QuantizeLinear", name, name, f"{name}_int8", axis))
            nodes.append(_node("DequantizeLinear", name, f"{name}_int8", f"{name}_restored", axis))
            restored[name] = f"{name}_restored"
        return restored[name]

    for node in out.graph.node:
        if node.name in layers:
            entering, weight = node.input
            largest = np.abs(onnx.numpy_helper.to_array(weights[weight])).max(axis=0)
            per_channel = np.where(largest > 0, largest, 1).astype(np.float32) / LARGEST
            limit = np.float32(NOMINAL if ranges is None else ranges[entering])
            node.input[:] = [pair(entering, np.asarray(limit / LARGEST)), pair(weight, per_channel, axis=1)]
        nodes.append(node)
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    out.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in tensors.items())
    drop_unused(out.graph)
    infer(out)
    return out


def int8_on_fp16(
    model: onnx.ModelProto, ranges: Mapping[str, float] | None = None, kept: Sequence[str] = ()
) -> onnx.ModelProto:
    """INT8 linear layers in an fp16 graph, in the one form that TensorRT 8.6 and 10 both read (opset 17).

    Weights are fp32 and quantised in the graph, because TensorRT 8.x refuses INT8 weights (TRT#2163, #2361). Scales
    are fp32, which opset 17 demands, so fp16 values are cast before Q and after DQ. NVIDIA's own exporter
    writes the same for fp16 models (Model-Optimizer, modelopt/torch/quantization/export_onnx.py).
    """
    return fp16(int8(model, ranges, kept, fp32_weights=True), islands(model))


def _node(kind: str, name: str, entering: str, leaving: str, axis: dict[str, Any]) -> onnx.NodeProto:
    scale, zero = f"{name}_scale", f"{name}_zero"
    return onnx.helper.make_node(kind, [entering, scale, zero], [leaving], f"{name}_{kind}", **axis)

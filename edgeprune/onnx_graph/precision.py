"""What the ONNX files of a precision hold, which depends on the runtime, and how to convert an fp32 graph to it."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from edgeprune.onnx_graph.fp8 import fp8
from edgeprune.onnx_graph.fp16 import fp16
from edgeprune.onnx_graph.int8 import int8, int8_on_fp16

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]

QUANTISED: dict[str, Callable[..., onnx.ModelProto]] = {
    "int8": int8,
    "int8-fp16": int8_on_fp16,
    # With the ranges of INT8. Layers that INT8 would spoil are quantised, too: FP8 copes with outliers (method.md).
    "fp8": lambda model, ranges=None, kept=(): fp8(model, ranges),
}
CONVERSIONS: dict[str, Convert] = {"fp16": fp16, **QUANTISED}  # from fp32; INT8 and FP8 with nominal ranges


def onnx_precision(precision: str, runtime: str) -> str:
    """The precision of the ONNX files for a runtime: fp32, fp16, int8, int8-fp16, or fp8.

    TensorRT leaves what is not INT8 in the type it finds (strong typing), so that is fp16 there: an fp32 rest runs at
    half of fp16's speed and its attention is not fused (NVIDIA/Model-Optimizer#167). ONNX Runtime has no fp16
    kernels on CPUs, so it is fp32 there.
    """
    return "int8-fp16" if (precision, runtime) == ("int8", "trt") else precision

"""What tests ask of ONNX graphs: their outputs on ONNX Runtime, and the types of their values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import shape_inference


def images(batch: int = 2, seed: int = 0) -> NDArray[np.float32]:
    """Noise for the tiny models, (batch, 3, 16, 16)."""
    return np.random.default_rng(seed).standard_normal((batch, 3, 16, 16), dtype=np.float32)


def run(model: onnx.ModelProto, feed: NDArray[Any]) -> NDArray[np.float32]:
    """The first output."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: feed})[0]
    return result


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value, inferred again."""
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    del fresh.graph.value_info[:]
    graph = shape_inference.infer_shapes(fresh, strict_mode=True, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return found | {t.name: t.data_type for t in graph.initializer}

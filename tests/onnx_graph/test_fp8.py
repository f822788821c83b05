"""FP8: which layers are quantised, in which types, and outputs close to fp32 in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from support.graphs import images, run, types

from edgeprune.errors import ExportError
from edgeprune.onnx_graph import calibration
from edgeprune.onnx_graph.attention_fusion import attention_forms
from edgeprune.onnx_graph.fp8 import SMALLEST_SCALE, fp8
from edgeprune.onnx_graph.graph import linear_layers, onnx_precision_of, precision_of, static_or_raise
from edgeprune.onnx_graph.passes import lower_opset, raise_opset


def executed(model: onnx.ModelProto, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs in ONNX Runtime, whose optimizers move FP8 through operators that it has not got in FP8."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: pictures})[0]
    return found


@pytest.mark.parametrize("method", ["topk", "fold", "tome"])
def test_linear_layers_are_fp8_and_the_rest_is_fp16(method: str, model: Callable[[str], onnx.ModelProto]) -> None:
    full = model(method)
    names = sorted({node.input[0] for node in linear_layers(full)})
    ranges = calibration._histograms(full, names, [images(seed=seed) for seed in range(4)], lambda *_: None)
    low = fp8(full, ranges["percentile"])
    onnx.checker.check_model(low, full_check=True)
    static_or_raise(low)
    assert [o.version for o in low.opset_import] == [19] and low.ir_version == 9
    assert precision_of(low) == onnx_precision_of(low) == "fp8"
    made = {output: node for node in low.graph.node for output in node.output}
    tensors = {tensor.name: tensor for tensor in low.graph.initializer}
    kinds = types(low)
    layers = {node.name for node in linear_layers(full)}
    quantised = [node for node in low.graph.node if node.name in layers]
    assert len(quantised) == len(layers) > 8
    for node in quantised:
        for name in node.input:
            back = made[name]
            there = made[back.input[0]]
            assert (there.op_type, back.op_type) == ("QuantizeLinear", "DequantizeLinear"), "no cast in between"
            assert kinds[back.input[0]] == TensorProto.FLOAT8E4M3FN and kinds[name] == TensorProto.FLOAT16
            scale, zero = tensors[back.input[1]], tensors[back.input[2]]
            assert scale.data_type == TensorProto.FLOAT16 and not scale.dims, "one scale per tensor"
            assert zero.data_type == TensorProto.FLOAT8E4M3FN and not any(zero.raw_data)
    assert attention_forms(low, TensorProto.FLOAT16)[-1]
    assert np.corrcoef(executed(low, images(seed=9)).ravel(), run(full, images(seed=9)).ravel())[0, 1] > 0.99


def test_scales_are_normal_numbers_in_fp16(model: Callable[[str], onnx.ModelProto]) -> None:
    """A layer of tiny weights and one that sees nothing: 448 times less would be zero in fp16."""
    full = model("topk")
    weight = {t.name: t for t in full.graph.initializer}[linear_layers(full)[0].input[1]]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e-8), weight.name))
    low = fp8(full, {node.input[0]: 1e-6 for node in linear_layers(full)})
    scales = [numpy_helper.to_array(t) for t in low.graph.initializer if "_scale" in t.name]
    assert min(scales) == np.float16(SMALLEST_SCALE) > 0
    assert np.isfinite(executed(low, images())).all()


def test_opset_19_is_the_way_back_to_opset_18(model: Callable[[str], onnx.ModelProto]) -> None:
    """The same outputs; and what was never lowered is refused."""
    full = model("pomt")
    raised = raise_opset(full)
    onnx.checker.check_model(raised, full_check=True)
    np.testing.assert_array_equal(run(raised, images()), run(full, images()))
    reduced = [n for n in raised.graph.node if n.op_type == "ReduceMax"]
    assert reduced and all(len(n.input) == 2 for n in reduced)
    lower_opset(raised)
    np.testing.assert_array_equal(run(raised, images()), run(full, images()))
    full.graph.node.append(onnx.helper.make_node("Resize", ["images"], ["made"]))
    with pytest.raises(ExportError, match="Resize has no opset-19 form"):
        raise_opset(full)

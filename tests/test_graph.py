"""Graphs by hand: which attention counts as fusable, what is refused, and GELU in the form that runtimes fuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.errors import ExportError
from edgeprune.graph import attention_forms, canonical_gelu, lower_opset, static_or_raise


def attention(*changes: str) -> onnx.ModelProto:
    """One head by hand in the form that TensorRT fuses, less the changes named."""
    node, nodes = helper.make_node, []
    if "scale after" in changes:
        nodes += [node("MatMul", ["q", "k"], ["raw"]), node("Mul", ["raw", "scale"], ["scores"])]
    elif "no scale" in changes:
        nodes += [node("MatMul", ["q", "k"], ["scores"])]
    else:
        nodes += [node("Mul", ["q", "scale"], ["scaled"]), node("MatMul", ["scaled", "k"], ["scores"])]
    last = "scores"
    if "bias" in changes:
        nodes += [node("Log", ["sizes"], ["bias"]), node("Add", ["scores", "bias"], ["biased"])]
        last = "biased"
    nodes += [node("Softmax", [last], ["weights"], axis=-1), node("MatMul", ["weights", "v"], ["out"])]
    taps = {"softmax used twice": "weights", "scores used twice": "scores", "biased used twice": "biased"}
    nodes += [node("ReduceMax", [taps[change]], [f"max {taps[change]}"]) for change in changes if change in taps]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "qkv"}
    values["sizes"] = helper.make_tensor_value_info("sizes", TensorProto.FLOAT, [1, 4])
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [4, 4])]
    if "softmax is an output" in changes:
        out.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, [4, 4]))
    scale = [numpy_helper.from_array(np.array(0.5, np.float32), "scale")]
    graph = helper.make_graph(nodes, "head", list(values.values()), out, scale)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("changes", [(), ("bias",)])
def test_the_fusable_form_is_recognised(changes: tuple[str, ...]) -> None:
    assert attention_forms(attention(*changes)) == [True]


@pytest.mark.parametrize(
    "changes",
    [
        ("scale after",),
        ("no scale",),
        ("scale after", "bias"),
        ("softmax used twice",),
        ("scores used twice",),
        ("scores used twice", "bias"),
        ("biased used twice", "bias"),
        ("softmax is an output",),
    ],
)
def test_other_forms_do_not_count_as_fusable(changes: tuple[str, ...]) -> None:
    onnx.checker.check_model(attention(*changes))
    assert True not in attention_forms(attention(*changes))


@pytest.mark.parametrize(
    ("dimension", "shown"), [({"dim_param": "rows"}, "rows"), ({"dim_value": 0}, r"\?"), ({}, r"\?")]
)
def test_a_dynamic_dimension_is_refused_by_name(dimension: dict[str, Any], shown: str) -> None:
    model = onnx.shape_inference.infer_shapes(attention())
    static_or_raise(model)
    rows = model.graph.input[1].type.tensor_type.shape.dim[0]
    rows.Clear()
    rows.MergeFrom(onnx.TensorShapeProto.Dimension(**dimension))
    with pytest.raises(ExportError, match=rf"k has the dynamic shape \({shown}, 4\)"):
        static_or_raise(model)


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="the shape of scaled is unknown"):
        static_or_raise(attention())


def test_an_operator_that_opset_17_lacks_is_refused_by_name() -> None:
    model = attention()
    model.graph.node.append(helper.make_node("Pad", ["out", "pads"], ["padded"]))
    with pytest.raises(ExportError, match="Pad has no opset-17 form"):
        lower_opset(model)


def gelu(swapped: bool) -> onnx.ModelProto:
    """GELU as torch exports it: x * (0.5 * (1 + erf(x / sqrt 2))), each product in one order or the other."""
    node, way = helper.make_node, -1 if swapped else 1
    nodes = [
        node("Div", ["x", "root"], ["scaled"]),
        node("Erf", ["scaled"], ["erf"]),
        node("Add", ["erf", "one"][::way], ["plus"]),
        node("Mul", ["half", "plus"][::way], ["halved"]),
        node("Mul", ["x", "halved"][::way], ["out"]),
    ]
    numbers = {"root": math.sqrt(2), "one": 1.0, "half": 0.5}
    constants = [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in numbers.items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 9]) for name in ("x", "out")]
    graph = helper.make_graph(nodes, "gelu", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("swapped", [False, True])
def test_gelu_is_brought_into_the_form_that_runtimes_fuse(swapped: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, 9), dtype=np.float32)
    before, after = gelu(swapped), gelu(swapped)
    canonical_gelu(after)
    onnx.checker.check_model(after, full_check=True)
    results, fused = [], []
    for number, model in enumerate((before, after)):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / f"{number}.onnx")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"x": x})[0])
        fused.append("Gelu" in [node.op_type for node in onnx.load(tmp_path / f"{number}.onnx").graph.node])
    np.testing.assert_allclose(results[1], results[0], atol=1e-6, rtol=1e-6)
    assert fused == [False, True]


def test_a_product_that_is_no_gelu_stays() -> None:
    model = attention("bias")
    before = model.SerializeToString()
    canonical_gelu(model)
    assert model.SerializeToString() == before

"""Graphs by hand: which attention counts as fusable, what is refused, GELU as runtimes fuse it, weights outside."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.errors import ExportError
from edgeprune.onnx_graph import graph as graphs
from edgeprune.onnx_graph.attention_fusion import attention_forms
from edgeprune.onnx_graph.graph import (
    ALIGNED_BYTES,
    copy_graph,
    infer,
    save_graph,
    static_or_raise,
    weights_of,
)
from edgeprune.onnx_graph.passes import canonical_gelu, lower_opset


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
    for name, inputs in (("Resize", ["out"]), ("Pad", ["out", "pads", "", "axes"])):
        model = attention()
        model.graph.node.append(helper.make_node(name, inputs, ["made"]))
        with pytest.raises(ExportError, match=f"{name} has no opset-17 form"):
            lower_opset(model)
    model.graph.node[-1].input[:] = ["out", "pads"]  # hybrids of ResNet and ViT have it
    lower_opset(model)


@pytest.mark.parametrize(
    ("width", "axis", "given"), [(8, -1, False), (8, 1, False), (9, -1, False), (None, -1, False), (8, -1, True)]
)
def test_a_split_counts_its_parts_by_its_outputs(width: int | None, axis: int, given: bool) -> None:
    """SwiGLU with packed weights as torch exports it (DINOv2 giant); parts of given sizes stay as they are."""
    how = {} if given else {"num_outputs": 2}
    nodes = [
        helper.make_node("Split", ["x", "sizes"] if given else ["x"], ["gate", "value"], axis=axis, **how),
        helper.make_node("Identity", ["value"], ["out"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, w]) for n, w in (("x", width), ("out", None))]
    sizes = [numpy_helper.from_array(np.array([4, 4]), "sizes")]
    graph = helper.make_graph(nodes, "split", values[:1], values[1:], sizes)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    if width != 8:
        with pytest.raises(ExportError, match="Split has no opset-17 form"):
            lower_opset(model)
        return
    lower_opset(model)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x[:, 4:])


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


def two_layers(seed: int = 0) -> onnx.ModelProto:
    """Two linear layers and a small bias, the first matrix of an odd size."""
    rng = np.random.default_rng(seed)
    weights = {"first": (8, 333), "bias": (333,), "second": (333, 40)}
    tensors = [numpy_helper.from_array(rng.standard_normal(s, dtype=np.float32), k) for k, s in weights.items()]
    node = helper.make_node
    nodes = [node("MatMul", ["x", "first"], ["wide"]), node("Add", ["wide", "bias"], ["moved"])]
    nodes.append(node("MatMul", ["moved", "second"], ["y"]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 8]), ("y", [2, 40]))]
    made = helper.make_graph(nodes, "layers", ends[:1], ends[1:], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outputs(path: Path) -> Any:
    session = ort.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, 8), np.float32)})[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_weights_lie_outside_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = two_layers(), tmp_path / "one" / "layers.onnx"
    total = sum(len(t.raw_data) for t in model.graph.initializer)
    monkeypatch.setattr(graphs, "INLINE_BYTES", total)
    save_graph(model, path)
    wanted = outputs(path)
    assert names(path.parent) == ["layers.onnx"] and weights_of(path) == ()
    monkeypatch.setattr(graphs, "INLINE_BYTES", total - 1)
    before = model.SerializeToString()
    save_graph(model, path)
    assert model.SerializeToString() == before
    (weights,) = weights_of(path)
    assert names(path.parent) == sorted(["layers.onnx", weights.name]) and weights.name.startswith("layers-")
    assert path.stat().st_size < 1024 < weights.stat().st_size
    light = onnx.load(path, load_external_data=False)
    assert [len(t.raw_data) for t in light.graph.initializer] == [0, 0, 0]
    for tensor in light.graph.initializer:
        offset = next(int(e.value) for e in tensor.external_data if e.key == "offset")
        assert offset % ALIGNED_BYTES == 0
    onnx.checker.check_model(os.fspath(path), full_check=True)
    np.testing.assert_array_equal(outputs(path), wanted)


def test_bytes_of_an_onnx_file_depend_on_weights_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whatever is kept under the hash of the file is never that of other weights."""
    monkeypatch.setattr(graphs, "INLINE_BYTES", 0)
    contents = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_graph(two_layers(seed), tmp_path / folder / "layers.onnx")
        contents.append((tmp_path / folder / "layers.onnx").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_interrupted_save_leaves_the_earlier_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "INLINE_BYTES", 0)
    path = tmp_path / "layers.onnx"
    save_graph(two_layers(), path)
    wanted, before = outputs(path), names(tmp_path)
    replacing = graphs.replacing

    def full(place: Path) -> Any:
        if place == path:
            raise OSError("no space left")
        return replacing(place)

    monkeypatch.setattr(graphs, "replacing", full)
    with pytest.raises(OSError, match="no space left"):
        save_graph(two_layers(1), path)
    assert set(names(tmp_path)) > set(before), "the new weights are there, under a name of their own"
    np.testing.assert_array_equal(outputs(path), wanted)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_copy_takes_the_weights_along(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "INLINE_BYTES", limit)
    path, out = tmp_path / "from" / "layers.onnx", tmp_path / "to" / "other.onnx"
    save_graph(two_layers(), path)
    wanted = outputs(path)
    copy_graph(path, out)
    for file in path.parent.iterdir():
        file.unlink()
    assert len(weights_of(out)) == (0 if limit else 1)
    np.testing.assert_array_equal(outputs(out), wanted)


def test_shapes_are_inferred_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = onnx.shape_inference.infer_shapes
    monkeypatch.setattr(
        graphs.shape_inference, "infer_shapes", lambda m, **k: seen.append(m.ByteSize()) or real(m, **k)
    )
    model, known = two_layers(), real(two_layers(), strict_mode=True, data_prop=True)
    infer(model)
    assert model == known and seen[0] < 1024 < model.ByteSize()
    static_or_raise(model)

"""fp32 islands of an fp16 ONNX on a weakly typed TensorRT, as TensorRT 8.6 is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.fake_trt import Fake

from edgeprune.devices import load_device
from edgeprune.onnx_graph.value_types import computed_in
from edgeprune.records import Setup, TrtOptions
from edgeprune.runtimes.trt import TensorRT

SETUP = Setup(device="cuda", machine="Orin", runtime="trt", runtime_version="1", precision="fp16", batch=1)


def island(path: Path, fp16: bool) -> onnx.ModelProto:
    """x · W, and a choice by the mean of fp32 scores; with `fp16` all but the choice is fp16."""
    kind = TensorProto.FLOAT16 if fp16 else TensorProto.FLOAT
    weight = np.ones((4, 4), np.float16 if fp16 else np.float32)
    node = helper.make_node
    nodes = [
        node("Cast", ["x"], ["half"], to=kind),
        node("MatMul", ["half", "w"], ["product"]),
        node("Cast", ["product"], ["wide"], to=TensorProto.FLOAT),
        node("ReduceMean", ["wide"], ["scores"], axes=[0], keepdims=0),
        node("TopK", ["scores", "k"], ["best", "places"]),
        node("Equal", ["best", "best"], ["same"]),
        node("Cast", ["best"], ["narrow"], to=kind),
        node("Add", ["narrow", "narrow"], ["sum"]),
        node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
        node("Identity", ["places"], ["z"]),
    ]
    values = [("x", TensorProto.FLOAT, [4, 4]), ("y", TensorProto.FLOAT, [2]), ("z", TensorProto.INT64, [2])]
    ends = [helper.make_tensor_value_info(*value) for value in values]
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([2]), "k")]
    graph = helper.make_graph(nodes, "island", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return model


def compiled(fake: Fake, onnx_file: Path, typing: str = "strong") -> Any:
    """The network of a compilation."""
    device = load_device("cuda")
    runtime = TensorRT(device)
    runtime.options = TrtOptions(typing=typing)
    runtime.compile(onnx_file, SETUP, onnx_file.with_suffix(".engine"))
    return fake.networks[-1]


@pytest.mark.parametrize(("version", "typing"), [("8.6.2", "strong"), ("10.3.0", "weak")])
def test_layers_of_an_island_are_fixed_and_others_are_not(
    version: str, typing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also layers that the parser adds for a node, and those with integer outputs; casts have a type of their own."""
    fake = Fake(version).install(monkeypatch)
    island(tmp_path / "model.onnx", fp16=True)
    layers = compiled(fake, tmp_path / "model.onnx", typing).layers
    fixed = {layer.get_output(0).name: layer for layer in layers if layer.precision is not None}
    unnamed = {name for name in fixed if name.startswith("(Unnamed")}
    assert set(fixed) - unnamed == {"scores", "best", "same"} and len(unnamed) == 2
    float_ = fake.trt.DataType.FLOAT
    assert {layer.precision for layer in fixed.values()} == {float_}
    assert fixed["best"].types == [float_, None] and fixed["same"].types == [None], "integers stay what they are"
    assert fake.configs[0].flags == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}


def test_strong_typing_needs_no_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("10.3.0").install(monkeypatch)
    island(tmp_path / "model.onnx", fp16=True)
    assert all(layer.precision is None for layer in compiled(fake, tmp_path / "model.onnx").layers)
    assert fake.configs[0].flags == set()


def test_nothing_is_fixed_where_all_is_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An INT8 ONNX without fp16 leaves the choice to the builder."""
    fake = Fake("8.6.2").install(monkeypatch)
    model = island(tmp_path / "model.onnx", fp16=False)
    assert computed_in(model) == {}
    assert all(layer.precision is None for layer in compiled(fake, tmp_path / "model.onnx").layers)
    assert "OBEY_PRECISION_CONSTRAINTS" not in fake.configs[0].flags

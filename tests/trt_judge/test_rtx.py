"""NVIDIA's parser and compiler of the 10 and 11 line take every kind of file, and refuse what they should.

TensorRT-RTX builds on a CPU. Skipped by name where there is no wheel of it: requirements-dev.txt says where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.trt_files import BATCHES, PRECISIONS, every

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has no wheel for this Python or machine")

from support.trt_rtx import judge


def accepted(model: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """The verdict on a model that has to be taken, built, and warned of in no way but the known one."""
    onnx.save(model, path)
    found = judge(path)
    assert found["parsed"] and found["built"], (found["errors"], found["log"])
    assert found["plan_bytes"] > 1000
    assert not [text for text in found["log"] if "ubnormal" in text or "verflow" in text], found["log"]
    return found


@every()
def test_every_file_is_built(
    method: str, prefix_last: bool, batch: int, precision: str,
    network: Callable[..., onnx.ModelProto], tmp_path: Path,
) -> None:  # fmt: skip
    """With the types and the shapes that the ONNX says, in the number of layers that it has."""
    model = network(method, prefix_last, batch, precision)
    found = accepted(model, tmp_path / "model.onnx")
    assert [(kind, shape) for _, kind, shape in found["inputs"]] == [("FLOAT", (batch, 3, 16, 16))]
    assert [(kind, shape) for _, kind, shape in found["outputs"]] == [("FLOAT", (batch, 7))]
    wanted, kinds = Counter(node.op_type for node in model.graph.node), Counter(row[1] for row in found["layers"])
    assert kinds["TOPK"] == wanted["TopK"] + wanted["ArgMax"] and kinds["SOFTMAX"] == wanted["Softmax"]
    assert kinds["NORMALIZATION"] == wanted["LayerNormalization"]
    assert kinds["QUANTIZE"] == wanted["QuantizeLinear"] and kinds["DEQUANTIZE"] == wanted["DequantizeLinear"]
    assert (kinds["QUANTIZE"] > 0) is (precision == "int8-fp16")
    elements = {"FLOAT": TensorProto.FLOAT, "HALF": TensorProto.FLOAT16, "INT8": TensorProto.INT8}
    values = {v.name: v.type.tensor_type for v in (*model.graph.value_info, *model.graph.output)}
    compared = 0
    for _, _, outputs in found["layers"]:
        for name, kind, shape in outputs:
            if name in values and kind in elements:
                assert values[name].elem_type == elements[kind], name
                assert tuple(dim.dim_value for dim in values[name].shape.dim) == shape, name
                compared += 1
    assert compared > 50
    if precision != "fp32":
        softmax = [out[0][1] for _, kind, out in found["layers"] if kind == "SOFTMAX"]
        assert softmax[-1] == "HALF", "the attention of the last block is in fp16, or it would not fuse"
        assert {out[0][1] for _, kind, out in found["layers"] if kind == "NORMALIZATION"} == {"FLOAT"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_profiling_models_are_built(precision: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Trunk, block, last block, embedding with head, and a cut, fixed to counts as `profile` does it."""
    from edgeprune.onnx_graph.graph import fix_tokens
    from edgeprune.vit.profiling_models import export_profiling_models

    export_profiling_models(tiny("cls", 1), ("topk",), BATCHES[-1], tmp_path, precision, tensorrt=True)
    for name in ("trunk", "block", "last"):
        for count in (17, 6):
            fix_tokens(tmp_path / f"{name}.onnx", count, tmp_path / f"{name}-{count}.onnx")
            found = judge(tmp_path / f"{name}-{count}.onnx")
            assert found["parsed"] and found["built"], (found["errors"], found["log"])
            assert found["inputs"][0][2] == (4, count, 48)
            assert found["outputs"][0][2] == (4, 1 if name == "last" else count, 48)
    for path in (tmp_path / "fixed.onnx", tmp_path / "dense.onnx", *tmp_path.glob("cut-*.onnx")):
        found = judge(path)
        assert found["parsed"] and found["built"], (path, found["errors"], found["log"])


def of_nodes(nodes: list[onnx.NodeProto], shape: list[int], leaving: int = TensorProto.FLOAT, **tensors: Any) -> Any:
    """A graph from x, fp32 of a shape, to y."""
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("y", leaving, None),
    ]
    weights = [numpy_helper.from_array(np.asarray(values), name) for name, values in tensors.items()]
    graph = helper.make_graph(nodes, "control", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def topk(count: int) -> Any:
    node = helper.make_node("TopK", ["x", "k"], ["values", "y"], "sort")
    return of_nodes([node], [1, 4096], TensorProto.INT64, k=np.array([count]))


CONTROLS = {
    "unknown operator": (lambda: of_nodes([helper.make_node("Nonsense", ["x"], ["y"])], [2, 4]), "Nonsense"),
    "mixed types": (
        lambda: of_nodes(
            [helper.make_node("Add", ["x", "half"], ["y"], "mixed")], [2, 4], half=np.ones(4, np.float16)
        ),
        "mixed",
    ),
    "a TopK above 3840": (lambda: topk(3841), "3840"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_what_is_wrong_is_refused(control: str, tmp_path: Path) -> None:
    """So that being taken means something."""
    make, reason = CONTROLS[control]
    onnx.save(make(), tmp_path / "model.onnx")
    found = judge(tmp_path / "model.onnx")
    assert not (found["parsed"] and found["built"])
    assert reason in " ".join((*found["errors"], *found["log"])), (found["errors"], found["log"])


def test_the_limit_of_topk_is_ours(tmp_path: Path) -> None:
    """What export refuses is what TensorRT refuses, and nothing less."""
    from edgeprune.errors import ExportError
    from edgeprune.onnx_graph.graph import MOST_SORTED, sorts_or_raise

    accepted(topk(MOST_SORTED), tmp_path / "model.onnx")
    sorts_or_raise(topk(MOST_SORTED))
    with pytest.raises(ExportError, match="a cut sorts 3841 tokens, TensorRT at most 3840: cut later"):
        sorts_or_raise(topk(MOST_SORTED + 1))

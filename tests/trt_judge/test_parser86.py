"""The ONNX parser of TensorRT 8.6.0, JetPack 6.0's line, takes every kind of file, and refuses what it should.

`make trt86` downloads it (819 MB) and runs this; skipped by name elsewhere. It parses, it does not build.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from support.trt86.parser import judge_apart
from support.trt_files import PRECISIONS, controls, converted, every

from edgeprune.onnx_graph.graph import onnx_precision_of
from edgeprune.onnx_graph.int8 import int8
from edgeprune.onnx_graph.precision import onnx_precision
from edgeprune.onnx_graph.value_types import computed_in
from edgeprune.runtimes.trt_layers import keep_islands

# Of 8.6 on any model of ours, and without effect: shapes and indices are INT64 in ONNX.
KNOWN = ("generated with INT64 weights", "outside the range of INT32 was clamped")


UNTYPED = ("Constant", "Cast", "Quantize", "Dequantize")  # kinds that take no type from the builder
TRT86 = SimpleNamespace(
    BuilderFlag=SimpleNamespace(OBEY_PRECISION_CONSTRAINTS="obey"),
    DataType=SimpleNamespace(FLOAT="FLOAT", HALF="HALF"),
    LayerType=SimpleNamespace(**{kind.upper(): kind for kind in UNTYPED}),
)


def as_binding(row: dict[str, Any]) -> SimpleNamespace:
    """A layer that the parser added, as TensorRT's Python API shows it."""
    outputs = [SimpleNamespace(name=name, dtype=kind) for name, _, kind in row["outputs"]]
    inputs = [SimpleNamespace(dtype=kind) for kind in row["inputs"]]
    return SimpleNamespace(
        type=row["type"], precision=None, num_inputs=len(inputs), num_outputs=len(outputs),
        get_input=inputs.__getitem__, get_output=outputs.__getitem__, set_output_type=lambda i, kind: None,
        kinds=[output.dtype for output in outputs], ends=row["inputs"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def parser() -> Path:
    """The folder that support.trt86.fetch made."""
    folder = os.environ.get("EDGEPRUNE_TRT86")
    if not folder:
        pytest.skip("EDGEPRUNE_TRT86 is not set: `make trt86` downloads TensorRT 8.6's parser, 819 MB")
    if platform.machine() != "x86_64":
        pytest.skip("TensorRT 8.6's parser was fetched for x86-64")
    return Path(folder)


def verdict(model: onnx.ModelProto, folder: Path, path: Path) -> dict[str, Any]:
    """What the parser says; a file that the stand-in network does not know fails."""
    onnx.save(model, path)
    found = judge_apart(folder, path)
    assert not found["no_verdict"], found["no_verdict"]
    return found


@every([name for name in PRECISIONS if name != "fp8"])  # opset 17 is the newest that it reads
def test_every_file_is_taken(
    method: str, prefix_last: bool, batch: int, precision: str,
    network: Callable[..., onnx.ModelProto], parser: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """With no rule broken, and the types that the ONNX says: 8.6 is asked for an fp32 island as a cast to FLOAT."""
    model = network(method, prefix_last, batch, precision)
    found = verdict(model, parser, tmp_path / "model.onnx")
    assert found["parsed"] and not found["errors"] and not found["complaints"], (found["errors"], found["complaints"])
    assert not [text for text in found["warnings"] if not any(known in text for known in KNOWN)]
    assert [row[1:] for row in found["outputs"]] == [[[batch, 7], "FLOAT"]]
    wanted, kinds = (
        Counter(node.op_type for node in model.graph.node),
        Counter(row["type"] for row in found["layers"]),
    )
    assert kinds["SoftMax"] == wanted["Softmax"] and kinds["Normalization"] == wanted["LayerNormalization"]
    assert kinds["Quantize"] == wanted["QuantizeLinear"] and kinds["Dequantize"] == wanted["DequantizeLinear"]
    types = {kind: {row["outputs"][0][2] for row in found["layers"] if row["type"] == kind} for kind in kinds}
    assert types["Normalization"] == {"FLOAT"}
    if method != "none":
        assert types["TopK"] == {"FLOAT"}
    if precision != "fp32":
        assert "HALF" in types["SoftMax"] and types["Convolution"] == {"HALF"}


@every([onnx_precision(name, "trt") for name in ("fp16", "int8")])
def test_fp32_islands_are_constrained(
    method: str, prefix_last: bool, batch: int, precision: str,
    network: Callable[..., onnx.ModelProto], parser: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """8.6 types weakly: of the layers that its parser adds, those that give fp32 are fixed to it, and no others."""
    model = network(method, prefix_last, batch, precision)
    rows = verdict(model, parser, tmp_path / "model.onnx")["layers"]
    layers, config = [as_binding(row) for row in rows], SimpleNamespace(set_flag=set().add)
    asked = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    count = keep_islands(TRT86, asked, config, computed_in(model))
    fixed = [layer for layer in layers if layer.precision]
    assert len(fixed) == count > 0 and {layer.precision for layer in fixed} == {"FLOAT"}
    floats = [layer for layer in layers if "FLOAT" in layer.kinds and layer.type not in UNTYPED]
    assert all(layer.precision for layer in floats), [layer.type for layer in floats if not layer.precision]
    halves = [layer for layer in layers if layer.kinds == ["HALF"] and "FLOAT" not in layer.ends]
    assert halves and not any(layer.precision for layer in halves)


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp8"])
def test_dense_features_are_taken(precision: str, tiny: Callable[..., Any], parser: Path, tmp_path: Path) -> None:
    """Several outputs, restored to the grid after one cut and after two."""
    from edgeprune.features import with_layers
    from edgeprune.vit import export

    model = tiny("cls")
    model = replace(model, vit=with_layers(model.vit, (1, 3)), task="dense")
    export.onnx_of_schedule(model, "fold", (13, 13, 9), False, 2, tmp_path / "dense.onnx", tensorrt=True)
    found = verdict(converted(onnx.load(tmp_path / "dense.onnx"), precision), parser, tmp_path / "model.onnx")
    assert found["parsed"] and not found["errors"] and not found["complaints"], (found["errors"], found["complaints"])
    wanted = {"features_1": [2, 4, 4, 48], "features_3": [2, 4, 4, 48], "embedding": [2, 7]}
    assert {name: shape for name, shape, _ in found["outputs"]} == wanted


def test_int8_for_onnx_runtime_is_not_for_8_6(
    network: Callable[..., onnx.ModelProto], parser: Path, tmp_path: Path
) -> None:
    """Its INT8 weights become Constant layers of INT8, which TensorRT 8.x refuses (TRT#2163, #2361)."""
    model = int8(network("fold", False, 1, "fp32"))
    assert onnx_precision_of(model) == "int8"
    found = verdict(model, parser, tmp_path / "model.onnx")
    assert any("invalid weights type of Int8" in text for text in found["complaints"])


def test_scales_in_fp16_are_not_for_8_6(
    network: Callable[..., onnx.ModelProto], parser: Path, tmp_path: Path
) -> None:
    """The other form of INT8 on fp16, opset 19 without casts: the reason why scales are fp32."""
    model = network("fold", False, 1, "int8-fp16")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.opset_import[0].version = 19
    scales = {n.input[1] for n in changed.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for tensor in changed.graph.initializer:
        if tensor.name in scales:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    found = verdict(changed, parser, tmp_path / "model.onnx")
    assert not found["parsed"] or any("scale of type HALF" in text for text in found["complaints"])


@pytest.mark.parametrize("control", controls())
def test_what_is_wrong_is_refused(control: str, parser: Path, tmp_path: Path) -> None:
    """So that being taken means something."""
    found = verdict(controls()[control][0], parser, tmp_path / "model.onnx")
    assert found["errors"] or found["complaints"]

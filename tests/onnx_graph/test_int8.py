"""INT8: which layers are quantised, in which form for which runtime, and outputs close to fp32."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from support.graphs import images, run, types

from edgeprune.errors import EngineError
from edgeprune.onnx_graph import calibration, graph
from edgeprune.onnx_graph.attention_fusion import attention_forms
from edgeprune.onnx_graph.graph import fix_tokens, linear_layers, onnx_precision_of, precision_of, static_or_raise
from edgeprune.onnx_graph.int8 import int8, int8_on_fp16
from edgeprune.onnx_graph.onnx_runtime import SLOW_OPTIMIZERS
from edgeprune.onnx_graph.precision import CONVERSIONS, QUANTISED, onnx_precision
from edgeprune.tasks import CLASSIFY, Classify
from edgeprune.vit import export
from edgeprune.vit.pruned import Trunk


@pytest.mark.parametrize("convert", [CONVERSIONS["fp16"], int8_on_fp16])
def test_trunk_in_another_precision_is_fixed_like_any(convert: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    found, path = tiny("cls"), tmp_path / "trunk.onnx"
    module = Trunk(list(found.module.blocks), found.family)
    export.trunk_from_module(module, torch.zeros(2, 17, 48), path, convert)
    fix_tokens(path, 9, tmp_path / "trunk-9.onnx")
    session = ort.InferenceSession(os.fspath(tmp_path / "trunk-9.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == session.get_outputs()[0].shape == [2, 9, 48]
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = module(x).numpy()
    result = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.corrcoef(result.ravel(), wanted.ravel())[0, 1] > 0.99


INT8 = [kind for kind in QUANTISED if kind != "fp8"]  # test_fp8.py is about that
FIXED = {"int8": "fp32", "int8-fp16": "fp16", "fp8": "fp16"}  # embedding and head have no layers to quantise


def test_profiling_models_have_their_precision(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """So that fp32 models are never measured as fp16 or INT8."""
    from edgeprune.errors import InputError
    from edgeprune.latency.profiling import staircase_of_folder
    from edgeprune.runtimes.target import target_for
    from edgeprune.vit.profiling_models import export_profiling_models

    found = tiny("cls", depth=1)
    for kind in CONVERSIONS:
        export_profiling_models(found, (), 1, tmp_path / kind, kind)
        for name in ("trunk", "dense", "fixed", "block", "last"):
            graph = onnx.load(tmp_path / kind / f"{name}.onnx", load_external_data=False)
            assert onnx_precision_of(graph) == (FIXED.get(kind, kind) if name == "fixed" else kind), name
    target = target_for("cpu", "fp16", work=tmp_path / "work")
    with pytest.raises(InputError, match="holds int8 models, not fp16: pass --precision int8"):
        staircase_of_folder(target, tmp_path / "int8" / "trunk.onnx", ())
    target = target_for("cpu", "int8", work=tmp_path / "work")
    with pytest.raises(InputError, match="holds int8 models for another runtime: export again with --device"):
        staircase_of_folder(target, tmp_path / "int8-fp16" / "trunk.onnx", ())


@pytest.mark.parametrize("kind", INT8)
def test_int8_quantises_linear_layers_alone(kind: str, model: Callable[[str], onnx.ModelProto]) -> None:
    full = model("fold")
    layers = linear_layers(full)
    found = calibration.calibrated(full, [images(seed=seed) for seed in range(4)], CLASSIFY)
    assert found.way in calibration.WAYS and set(found.ranges) == {node.input[0] for node in layers}
    low = QUANTISED[kind](full, found.ranges, found.kept)
    onnx.checker.check_model(low, full_check=True)
    static_or_raise(low)
    assert [o.version for o in low.opset_import] == [17], "the newest that TensorRT 8.6 reads"
    made = {o: n for n in low.graph.node for o in n.output}
    constants = {t.name: numpy_helper.to_array(t) for t in low.graph.initializer}

    def restored(name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear behind a value, past a cast."""
        node = made.get(name)
        node = made.get(node.input[0]) if node is not None and node.op_type == "Cast" else node
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    products = [node for node in low.graph.node if node.op_type == "MatMul" and restored(node.input[0])]
    assert {node.name for node in products} == {n.name for n in layers} - set(found.kept) and len(products) > 8
    for node in low.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not constants[node.input[2]].any(), "TensorRT takes zero points of zero alone"
            assert constants[node.input[2]].dtype == np.int8 and constants[node.input[1]].dtype == np.float32
    weights = [restored(node.input[1]) for node in products]
    assert min(constants[node.input[1]].size for node in weights if node) >= 48, "a scale per channel"
    close = np.corrcoef(run(low, images(seed=9)).ravel(), run(full, images(seed=9)).ravel())[0, 1]
    assert close > 0.99
    assert attention_forms(low)[-1]
    assert precision_of(low) == "int8" and onnx_precision_of(low) == kind


def test_what_is_not_quantised_is_fp16_for_tensorrt(model: Callable[[str], onnx.ModelProto]) -> None:
    """Without it TensorRT runs the rest in fp32, at half of fp16's speed, and fuses no attention."""
    low = int8_on_fp16(model("fold"))
    kind = types(low)
    assert attention_forms(low, TensorProto.FLOAT16)[-1]
    assert {kind[n.output[0]] for n in low.graph.node if n.op_type in ("Erf", "Conv")} == {TensorProto.FLOAT16}
    linear = {node.name for node in linear_layers(model("fold"))}
    assert {kind[n.output[0]] for n in low.graph.node if n.name in linear} == {TensorProto.FLOAT16}
    assert onnx_precision("int8", "trt") == "int8-fp16"
    assert {onnx_precision("int8", "ort-cpu"), onnx_precision("int8", "ort-cuda")} == {"int8"}


def test_weights_quantised_in_the_graph_are_the_same(model: Callable[[str], onnx.ModelProto]) -> None:
    """TensorRT 8.x wants fp32 weights with a Q/DQ pair (TRT#2163, #2361); INT8 weights are smaller for the others."""
    full = model("topk")
    whole, small = int8(full, fp32_weights=True), int8(full)
    np.testing.assert_array_equal(run(whole, images()), run(small, images()))
    for converted, count in ((whole, 0), (small, len(linear_layers(full)))):
        lone = [t for t in converted.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 2]
        assert len(lone) == count
    assert small.ByteSize() < 0.5 * whole.ByteSize()


def test_sensitive_layers_stay_in_floating_point(
    model: Callable[[str], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer with an outlier among its activations: as in ViT-Tiny's block 8, whose fc2 sees 200 beside 5."""
    full = model("topk")
    [weight] = [t for t in full.graph.initializer if t.name.endswith("blocks.1.norm2.weight")]
    values = numpy_helper.to_array(weight).copy()
    values[3] *= 3000
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    layer = next(n for n in linear_layers(full) if n.input[0] in {
        o for n in full.graph.node if weight.name in n.input for o in n.output})  # fmt: skip
    after = {t.name: t for t in full.graph.initializer}[layer.input[1]]
    rows = numpy_helper.to_array(after).copy()
    rows[3] /= 3000
    after.CopyFrom(numpy_helper.from_array(rows, after.name))
    monkeypatch.setattr(Classify, "sensitive", 1e-3)
    batches = [images(seed=seed) for seed in range(4)]
    found = calibration.calibrated(full, batches, CLASSIFY)
    assert layer.name in found.kept
    everything = int8(full, found.ranges)
    spread = [np.abs(run(m, batches[0]) - run(full, batches[0])).max()
              for m in (int8(full, found.ranges, found.kept), everything)]  # fmt: skip
    assert spread[0] < spread[1]


@pytest.mark.parametrize("kind", ["fp16", *INT8])
def test_what_never_fits_into_one_file_is_converted_alike(
    kind: str, model: Callable[[str], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranges, conversion and what runs in between, with all weights outside."""

    def converted(full: onnx.ModelProto) -> onnx.ModelProto:
        if kind not in QUANTISED:
            return CONVERSIONS[kind](full)
        found = calibration.calibrated(full, [images()], CLASSIFY)
        return QUANTISED[kind](full, found.ranges, found.kept)

    wanted = converted(model("topk"))
    monkeypatch.setattr(graph, "INLINE_BYTES", 0)
    graph.save_graph(model("topk"), tmp_path / "full.onnx")
    assert graph.weights_of(tmp_path / "full.onnx")
    graph.save_graph(converted(onnx.load(tmp_path / "full.onnx")), tmp_path / "converted.onnx")
    np.testing.assert_array_equal(run(onnx.load(tmp_path / "converted.onnx"), images()), run(wanted, images()))


def test_layers_are_judged_on_the_graph_that_runs(
    model: Callable[[str], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the optimisers and the threads of the engine; a file that cannot be loaded is one line."""
    made: list[Any] = []
    session = ort.InferenceSession

    def recorded(path: str, options: Any, **how: Any) -> Any:
        made.append((options.intra_op_num_threads, how["disabled_optimizers"]))
        return session(path, options, **how)

    monkeypatch.setattr(ort, "InferenceSession", recorded)
    monkeypatch.setenv("EDGEPRUNE_THREADS", "1")
    full = model("fold")
    calibration._outputs(full, [images()])
    assert made == [(1, SLOW_OPTIMIZERS)]
    full.graph.node[0].op_type = "Unknown"
    with pytest.raises(EngineError, match=r"^the model to calibrate: ONNX Runtime cannot load it .*: export it "):
        calibration._outputs(full, [images()])

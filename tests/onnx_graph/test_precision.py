"""fp16 and INT8: which operators are converted and which are not, and outputs close to fp32."""

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
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper, shape_inference
from support.builds import Shallow

from edgeprune.defaults import REDUCERS
from edgeprune.onnx_graph import graph, precision
from edgeprune.onnx_graph.graph import attention_forms, fix_tokens, precision_of, static_or_raise
from edgeprune.vit import export
from edgeprune.vit.pruned import PrunedViT, Trunk
from edgeprune.vit.reducers import reducer_named

CUT = (17, 9, 9)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], onnx.ModelProto]:
    """model(method) is the tiny model with a cut in block 1, as ONNX."""

    def make(method: str) -> onnx.ModelProto:
        found, path = tiny("cls"), tmp_path_factory.mktemp("fp32") / "model.onnx"
        module = PrunedViT(found.module, found.family, found.vit, CUT, reducer_named(method), True)
        export.onnx_from_module(module, torch.zeros(2, 3, 16, 16), path)
        return onnx.load(path)

    return make


def images(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((2, 3, 16, 16), dtype=np.float32)


def run(model: onnx.ModelProto, feed: NDArray[np.float32]) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: feed})[0]
    return result


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor, inferred again."""
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    del fresh.graph.value_info[:]
    graph = shape_inference.infer_shapes(fresh, strict_mode=True, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return found | {t.name: t.data_type for t in graph.initializer}


@pytest.mark.parametrize("method", REDUCERS)
def test_fp16(method: str, model: Callable[[str], onnx.ModelProto]) -> None:
    full = model(method)
    half = precision.fp16(full)
    onnx.checker.check_model(half, full_check=True)
    static_or_raise(half)
    kind = types(half)
    assert kind["images"] == kind["logits"] == TensorProto.FLOAT
    products = [
        node for node in half.graph.node if node.op_type == "MatMul" and kind[node.output[0]] == TensorProto.FLOAT16
    ]
    assert len(products) >= 3 * 4 + 2, "linear layers and attention of uncut blocks are fp16"
    for node in half.graph.node:
        if node.op_type in (*precision.ISLAND_OPS, "TopK"):
            assert kind[node.input[0]] == TensorProto.FLOAT, node.name
    softmax = [kind[node.output[0]] for node in half.graph.node if node.op_type == "Softmax"]
    assert softmax.count(TensorProto.FLOAT16) >= 2, "softmax of an uncut block must stay fp16, or it would not fuse"
    assert attention_forms(half).count(True) >= 2
    np.testing.assert_allclose(run(half, images()), run(full, images()), atol=0.05, rtol=0.05)


def test_a_cut_is_an_island(model: Callable[[str], onnx.ModelProto]) -> None:
    """What decides who is kept, and the sums of what is folded, never pass through fp16."""
    full = model("fold")
    names, made = precision.islands(full), {o: n for n in full.graph.node for o in n.output}
    for node in full.graph.node:
        if node.op_type in ("TopK", "ArgMax"):
            assert made[node.input[0]].name in names
    assert [n.op_type for n in full.graph.node if n.op_type == "Softmax" and n.name in names] == ["Softmax"]
    assert not names & {n.name for n in precision.linear_layers(full)}


@pytest.mark.parametrize("convert", [precision.fp16, precision.int8])
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


def test_profiling_models_have_their_precision(tiny: Callable[..., Any], shallow: Shallow, tmp_path: Path) -> None:
    """So that fp32 models are never measured as fp16 or INT8."""
    from edgeprune.errors import InputError
    from edgeprune.latency.profiling import staircase_of_folder
    from edgeprune.runtimes.target import target_for
    from edgeprune.vit.profiling_models import export_profiling_models

    found = tiny("cls", depth=1)
    for kind in ("fp16", "int8"):
        export_profiling_models(found, (), 1, tmp_path / kind, kind)
    for kind, folder in {"fp32": shallow.models, "fp16": tmp_path / "fp16", "int8": tmp_path / "int8"}.items():
        for name in ("trunk", "dense", "fixed", "block", "last"):
            graph = onnx.load(folder / f"{name}.onnx", load_external_data=False)
            assert precision_of(graph) == (kind if name != "fixed" or kind == "fp16" else "fp32"), name
    target = target_for("cpu", "fp16", work=tmp_path / "work")
    with pytest.raises(InputError, match="holds int8 models, not fp16: pass --precision int8"):
        staircase_of_folder(target, tmp_path / "int8" / "trunk.onnx", ())


def test_int8_quantises_linear_layers_alone(model: Callable[[str], onnx.ModelProto]) -> None:
    full = model("fold")
    layers = precision.linear_layers(full)
    found = precision.calibrated(full, [images(seed) for seed in range(4)])
    assert found.way in precision.WAYS and set(found.ranges) == {node.input[0] for node in layers}
    low = precision.int8(full, found.ranges, found.kept)
    onnx.checker.check_model(low, full_check=True)
    static_or_raise(low)
    made = {o: n for n in low.graph.node for o in n.output}
    constants = {t.name: numpy_helper.to_array(t) for t in low.graph.initializer}
    quantised = {n.name for n in low.graph.node if n.op_type == "MatMul" and n.input[0] in made
                 and made[n.input[0]].op_type == "DequantizeLinear"}  # fmt: skip
    assert quantised == {n.name for n in layers} - set(found.kept) and len(quantised) > 8
    for node in low.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not constants[node.input[2]].any(), "TensorRT takes zero points of zero alone"
            assert constants[node.input[2]].dtype == np.int8
    channels = [constants[made[n.input[1]].input[1]].size for n in low.graph.node if n.name in quantised]
    assert min(channels) >= 48, "weights have a scale per channel"
    close = np.corrcoef(run(low, images(9)).ravel(), run(full, images(9)).ravel())[0, 1]
    assert close > 0.99
    assert attention_forms(low) == attention_forms(full)


def test_sensitive_layers_stay_in_floating_point(
    model: Callable[[str], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer with an outlier among its activations: as in ViT-Tiny's block 8, whose fc2 sees 200 beside 5."""
    full = model("topk")
    [weight] = [t for t in full.graph.initializer if t.name.endswith("blocks.1.norm2.weight")]
    values = numpy_helper.to_array(weight).copy()
    values[3] *= 3000
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    layer = next(n for n in precision.linear_layers(full) if n.input[0] in {
        o for n in full.graph.node if weight.name in n.input for o in n.output})  # fmt: skip
    after = {t.name: t for t in full.graph.initializer}[layer.input[1]]
    rows = numpy_helper.to_array(after).copy()
    rows[3] /= 3000
    after.CopyFrom(numpy_helper.from_array(rows, after.name))
    monkeypatch.setattr(precision, "SENSITIVE_KL", 1e-3)
    batches = [images(seed) for seed in range(4)]
    found = precision.calibrated(full, batches)
    assert layer.name in found.kept
    everything = precision.int8(full, found.ranges)
    spread = [np.abs(run(m, batches[0]) - run(full, batches[0])).max()
              for m in (precision.int8(full, found.ranges, found.kept), everything)]  # fmt: skip
    assert spread[0] < spread[1]


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_what_never_fits_into_one_file_is_converted_alike(
    kind: str, model: Callable[[str], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranges, conversion and what runs in between, with all weights outside."""

    def converted(full: onnx.ModelProto) -> onnx.ModelProto:
        if kind == "fp16":
            return precision.fp16(full)
        found = precision.calibrated(full, [images()])
        return precision.int8(full, found.ranges, found.kept)

    wanted = converted(model("topk"))
    monkeypatch.setattr(graph, "INLINE_BYTES", 0)
    graph.save_graph(model("topk"), tmp_path / "full.onnx")
    assert graph.weights_of(tmp_path / "full.onnx")
    graph.save_graph(converted(onnx.load(tmp_path / "full.onnx")), tmp_path / "converted.onnx")
    np.testing.assert_array_equal(run(onnx.load(tmp_path / "converted.onnx"), images()), run(wanted, images()))

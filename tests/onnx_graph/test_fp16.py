"""fp16: which operators are converted and which are not, and outputs close to fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support.graphs import images, run, types
from support.models import shake

from edgeprune.defaults import REDUCERS
from edgeprune.features import with_layers
from edgeprune.onnx_graph.attention_fusion import attention_forms
from edgeprune.onnx_graph.fp16 import ISLAND_OPS, fp16
from edgeprune.onnx_graph.graph import linear_layers, static_or_raise
from edgeprune.onnx_graph.islands import islands
from edgeprune.tasks import output_names
from edgeprune.vit.reducers import reducer_named

FP32, FP16 = TensorProto.FLOAT, TensorProto.FLOAT16
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather")


@pytest.mark.parametrize("method", REDUCERS)
def test_conversion(method: str, model: Callable[[str], onnx.ModelProto]) -> None:
    full = model(method)
    half = fp16(full)
    onnx.checker.check_model(half, full_check=True)
    static_or_raise(half)
    kind = types(half)
    assert kind["images"] == kind["logits"] == FP32
    products = [node for node in half.graph.node if node.op_type == "MatMul" and kind[node.output[0]] == FP16]
    assert len(products) >= 3 * 4 + 2, "linear layers and attention of uncut blocks are fp16"
    for node in half.graph.node:
        if node.op_type in ISLAND_OPS:
            assert kind[node.input[0]] == FP32, node.name
    softmax = [kind[node.output[0]] for node in half.graph.node if node.op_type == "Softmax"]
    assert softmax[-1] == FP16, "softmax of an uncut block must stay fp16, or it would not fuse"
    assert attention_forms(half, FP16)[-1] and not any(attention_forms(full, FP16))
    np.testing.assert_allclose(run(half, images()), run(full, images()), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("method", REDUCERS)
def test_nothing_between_two_fp32_nodes_is_rounded(method: str, model: Callable[[str], onnx.ModelProto]) -> None:
    """No value is cast to fp16 and back, not even where it is reshaped or gathered in between."""
    half = fp16(model(method))
    made = {output: node for node in half.graph.node for output in node.output}
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    assert {helper.get_node_attr_value(cast, "to") for cast in casts} == {FP32, FP16}
    for cast in casts:
        origin = made.get(cast.input[0])
        while origin is not None and origin.op_type in MOVES:
            origin = made.get(origin.input[0])
        assert origin is None or origin.op_type != "Cast", f"{origin.name} and {cast.name}"


@pytest.mark.parametrize("method", REDUCERS)
def test_a_cut_is_an_island(method: str, model: Callable[[str], onnx.ModelProto]) -> None:
    """What decides who is kept, and the sums of what is folded, are computed in fp32."""
    full = model(method)
    half = fp16(full)
    kind, made = types(half), {output: node for node in half.graph.node for output in node.output}
    first = next(node for node in half.graph.node if node.op_type == "Softmax")
    # Token Merging compares keys and does not look at attention.
    assert kind[first.output[0]] == (FP16 if method == "tome" else FP32)
    for node in half.graph.node:
        if node.op_type in ("TopK", "ArgMax"):
            assert made[node.input[0]].op_type != "Cast", f"{node.name} sorts what was rounded"
        if node.op_type == "Div" and kind[node.output[0]] == FP16:
            divisor = made.get(node.input[1])
            assert divisor is None, f"{node.name} divides by {divisor and divisor.name} in fp16: GELU alone may"
    assert not islands(full) & {node.name for node in linear_layers(full)}


def test_fold_compares_in_fp32_and_leaves_the_stream_in_fp16(model: Callable[[str], onnx.ModelProto]) -> None:
    """Similarities of all pairs of tokens and which is attended to more are fp32; the residual stream is not."""
    half = fp16(model("fold"))
    kind, made = types(half), {output: node for node in half.graph.node for output in node.output}
    compared = [node for node in half.graph.node if node.op_type == "Greater"]
    assert compared and all(kind[name] == FP32 for node in compared for name in node.input)
    lengths = [node for node in half.graph.node if node.op_type == "ReduceL2"]
    assert lengths and all(made[node.input[0]].op_type == "Cast" for node in lengths), "the stream itself is fp16"
    for node in half.graph.node:
        if node.op_type == "Div" and made.get(node.input[1]) in lengths:
            assert kind[node.output[0]] == FP32


def test_constants_too_small_for_fp16_stay_fp32(model: Callable[[str], onnx.ModelProto]) -> None:
    """EViT's clamp of 1e-7 would be subnormal, which TensorRT warns of."""
    half = fp16(model("evit"))
    scalars = [numpy_helper.to_array(t) for t in half.graph.initializer if not t.dims and t.data_type in (FP16, FP32)]
    assert any(0 < value < 6.1e-5 for value in scalars if value.dtype == np.float32), "the clamp is gone"
    assert not any(0 < abs(value) < 6.1e-5 for value in scalars if value.dtype == np.float16)


def test_a_weight_for_both_types_is_not_rounded_for_fp32() -> None:
    """And inputs, outputs, and values that are both output and input of a node keep their names and types."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["y"], "mul"),
        helper.make_node("LayerNormalization", ["y", "w"], ["z"], "norm"),
        helper.make_node("Erf", ["z"], ["e"], "erf"),
    ]
    ends = {n: helper.make_tensor_value_info(n, FP32, [2, 4]) for n in ("x", "y", "z", "e")}
    weight = numpy_helper.from_array(np.array([1 + 2**-14, 1e5, -1e6, 3], np.float32), "w")
    graph = helper.make_graph(nodes, "both", [ends["x"]], [ends["e"], ends["y"]], [weight])
    half = fp16(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    onnx.checker.check_model(half, full_check=True)
    kind = types(half)
    assert {name: kind[name] for name in ("x", "e", "y")} == dict.fromkeys(("x", "e", "y"), FP32)
    [norm] = [node for node in half.graph.node if node.name == "norm"]
    held = {t.name: numpy_helper.to_array(t) for t in half.graph.initializer}
    np.testing.assert_array_equal(held[norm.input[1]], [1 + 2**-14, 1e5, -1e6, 3])
    [halved] = [values for values in held.values() if values.dtype == np.float16]
    np.testing.assert_array_equal(halved, np.array([1, 65504, -65504, 3], np.float16))


@pytest.mark.parametrize("method", ["none", "fold", "evit"])
@pytest.mark.parametrize("kind", ["rms", "pooled"])
def test_large_values_of_the_residual_stream_do_not_overflow(kind: str, method: str, tmp_path: Path) -> None:
    """RMSNorm squares them, pooling by sizes multiplies them. ONNX's own evaluator computes in fp16 for real.

    ONNX Runtime does not: on a CPU it computes such operators in fp32.
    """
    import timm.layers
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from edgeprune.vit import export
    from edgeprune.vit.families import family_of
    from edgeprune.vit.pruned import PrunedViT

    torch.manual_seed(0)
    options: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
    if kind == "rms":
        options = {"norm_layer": timm.layers.RmsNorm, "qk_norm": True}
    net = shake(VisionTransformer(16, 4, num_classes=7, embed_dim=48, depth=3, num_heads=3, **options))
    with torch.no_grad():
        net.pos_embed[..., 5] += 1000 if kind == "rms" else 30000
    _, family = family_of(net)
    vit = family.describe(net, kind, "0" * 64)
    tokens = (vit.tokens,) * 3 if method == "none" else (vit.tokens, vit.prefix + 3, vit.prefix + 3)
    module = PrunedViT(net, family, vit, tokens, reducer_named(method))
    export.onnx_from_module(module, torch.zeros(2, 3, 16, 16), tmp_path / "model.onnx")
    full, feed = onnx.load(tmp_path / "model.onnx"), images()
    feed[:, :, :12] = 0.5  # alike, so that they become one token
    half = fp16(full)
    assert "MatMul" in {n.op_type for n in half.graph.node if types(half).get(n.output[0]) == FP16}
    [found] = ReferenceEvaluator(half).run(None, {"images": feed})
    wanted = run(full, feed)
    assert np.abs(found - wanted).max() < 0.05 * wanted.std()


@pytest.mark.parametrize("method", ["fold", "pomt", "topk"])
def test_features_without_a_prefix(method: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Restoring compares tokens, not the stream that they are from, which stays in fp16."""
    import torch

    from edgeprune.vit import export
    from edgeprune.vit.pruned import PrunedViT

    found, counts = tiny("map"), []
    for layers in ((), (3,)):
        vit, path = with_layers(found.vit, layers), tmp_path / "model.onnx"
        module = PrunedViT(found.module, found.family, vit, (16, 9, 9), reducer_named(method))
        names = ("images", *output_names("dense", vit)) if layers else ("images", "logits")
        export.onnx_from_module(module, torch.zeros(2, 3, 16, 16), path, names)
        half = fp16(onnx.load(path))
        kind = types(half)
        counts.append(sum(node.op_type == "Add" and kind[node.output[0]] == FP32 for node in half.graph.node))
    assert counts[1] <= counts[0] + 1, "the sum of a patch's own stream and its token's updates, at most"

"""Exports: static shapes, opset 17, equal logits, fusable attention, and no trace of the exporting machine."""

from __future__ import annotations

import copy
import os
import site
import socket
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeprune.defaults import REDUCERS
from edgeprune.devices import load_device
from edgeprune.errors import InputError
from edgeprune.onnx_graph import graph
from edgeprune.onnx_graph.attention_fusion import attention_forms
from edgeprune.onnx_graph.chain import chained, repeatable
from edgeprune.onnx_graph.graph import fix_tokens, load_graph
from edgeprune.onnx_graph.operations import Elementwise, operations_of_onnx
from edgeprune.onnx_graph.precision import CONVERSIONS
from edgeprune.runtimes.kernel_times import latency_ms
from edgeprune.runtimes.simulated import operations_of_ends, operations_of_trunk
from edgeprune.vit import export, torch_exporter
from edgeprune.vit.profiling_models import alike
from edgeprune.vit.pruned import LastBlock, PrunedViT, Trunk
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.torch_exporter import translatable

exporter = export.traced  # itself: the tests share what it makes
CUT = (17, 9, 9)  # the tiny model of 17 tokens, cut in block 1


def run(path: Path, feed: NDArray[np.float32]) -> NDArray[np.float32]:
    """The one output of an ONNX file in ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: feed})[0]
    return result


def images(batch: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, 3, 16, 16), dtype=np.float32)


def shapes(path: Path) -> dict[str, list[int | str]]:
    """Every tensor's dimensions, inferred anew: whatever the file says of inner tensors is dropped."""
    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    found = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
    names = [name for node in graph.node for name in node.output if name] + [v.name for v in graph.input]
    return {n: [d.dim_value or d.dim_param or "?" for d in found[n].type.tensor_type.shape.dim] for n in names}


Export = Callable[..., tuple[Path, torch.nn.Module]]


@pytest.fixture(scope="module")
def exported(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """exported(method, batch, tokens, kind, prefix_last) is an ONNX file and its module, each made once."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def make(
        method: str, batch: int, tokens: tuple[int, ...] = CUT, kind: str = "cls", prefix_last: bool = False
    ) -> tuple[Path, torch.nn.Module]:
        model = tiny(kind)
        module = PrunedViT(model.module, model.family, model.vit, tokens, reducer_named(method), prefix_last)
        path = folder / f"{len(list(folder.iterdir()))}.onnx"
        export.onnx_from_module(module, torch.zeros(batch, 3, 16, 16), path)
        return path, module

    return make


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", REDUCERS)
def test_pruned_export(method: str, batch: int, exported: Export) -> None:
    path, module = exported(method, batch)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    found = shapes(path)
    assert all(isinstance(n, int) and n > 0 for dims in found.values() for n in dims), found
    assert found["images"] == [batch, 3, 16, 16] and found["logits"] == [batch, 7]
    assert [batch, 9, 48] in found.values() and [batch, 17, 48] in found.values()
    for seed in range(3):
        feed = images(batch, seed)
        with torch.inference_mode():
            wanted = module(torch.from_numpy(feed)).numpy()
        np.testing.assert_allclose(run(path, feed), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("registers", "pomt"), ("post-norm", "pomt"), ("gap", "fold"), ("map", "fold"), ("any-size", "pomt")],
)
def test_other_kinds_export(kind: str, method: str, exported: Export, tiny: Callable[..., Any]) -> None:
    full = tiny(kind).vit.tokens
    path, module = exported(method, 2, (full, full - 4, full - 6), kind)
    with torch.inference_mode():
        wanted = module(torch.from_numpy(images(2))).numpy()
    np.testing.assert_allclose(run(path, images(2)), wanted, atol=1e-4, rtol=0)
    assert attention_forms(onnx.load(path))[:3] == [True, False, False]


def test_last_block_for_the_prefix_alone_exports(exported: Export) -> None:
    path, module = exported("fold", 1, CUT, "cls", True)
    with torch.inference_mode():
        wanted = module(torch.from_numpy(images(1))).numpy()
    np.testing.assert_allclose(run(path, images(1)), wanted, atol=1e-4, rtol=0)
    assert [1, 3, 1, 9] in shapes(path).values() and [1, 3, 9, 9] not in shapes(path).values()
    assert attention_forms(onnx.load(path)) == [True, False, True]


def test_only_a_cut_that_reads_attention_weights_costs_fusable_attention(exported: Export) -> None:
    assert attention_forms(onnx.load(exported("none", 1, (17, 17, 17))[0])) == [True] * 3
    for method in REDUCERS:
        cut = method == "tome"  # reads keys alone
        assert attention_forms(onnx.load(exported(method, 1)[0])) == [True, cut, True], method


@pytest.fixture(scope="module")
def trunk(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trunk]:
    """The tiny model's blocks, exported with a symbolic token axis."""
    model = tiny("cls")
    module = Trunk(list(model.module.blocks), model.family)
    path = tmp_path_factory.mktemp("trunk") / "trunk.onnx"
    path.with_suffix(".weights").write_bytes(b"left by an earlier export" * 100_000)
    export.trunk_from_module(module, torch.zeros(2, 17, 48), path)
    return path, module


def test_trunk_is_symbolic_in_its_tokens_alone(trunk: tuple[Path, Trunk]) -> None:
    path, _ = trunk
    trunk_graph = onnx.load(path, load_external_data=False).graph
    assert not [node.name for node in trunk_graph.node if node.op_type == "Shape"]
    for value in (*trunk_graph.input, *trunk_graph.output):
        first, tokens, last = value.type.tensor_type.shape.dim
        assert (first.dim_value, tokens.dim_param, last.dim_value) == (2, "tokens", 48), value
    onnx.checker.check_model(os.fspath(path), full_check=True)
    assert attention_forms(onnx.load(path, load_external_data=False)) == [True] * 3


@pytest.mark.parametrize("tokens", [1, 5, 17, 40])
def test_fixed_trunk(tokens: int, trunk: tuple[Path, Trunk]) -> None:
    path, module = trunk
    fixed = path.with_name(f"trunk-{tokens}.onnx")
    fix_tokens(path, tokens, fixed)
    found = shapes(fixed)
    assert found["x"] == found["y"] == [2, tokens, 48]
    assert all(isinstance(n, int) and n > 0 for dims in found.values() for n in dims), found
    x = torch.randn(2, tokens, 48, generator=torch.Generator().manual_seed(tokens))
    with torch.inference_mode():
        np.testing.assert_allclose(run(fixed, x.numpy()), module(x).numpy(), atol=1e-5, rtol=1e-5)


def test_simulated_kernels_of_an_exported_trunk_are_those_of_its_shape(
    trunk: tuple[Path, Trunk], tiny: Callable[..., Any]
) -> None:
    fixed = trunk[0].with_name("trunk-9.onnx")
    fix_tokens(trunk[0], 9, fixed)
    assert operations_of_onnx(fixed) == operations_of_trunk(tiny("cls").vit, 9, 2)


def test_simulated_kernels_of_an_exported_model_are_nearly_those_of_its_shape(
    exported: Export, tiny: Callable[..., Any]
) -> None:
    shape, device = tiny("cls").vit, load_device("orin-nano")
    whole = operations_of_onnx(exported("none", 1, (17, 17, 17))[0])
    formula = operations_of_ends(shape, 1) + operations_of_trunk(shape, 17, 1)
    heavy = [[o for o in part if not isinstance(o, Elementwise)] for part in (whole, formula)]
    assert heavy[0] == [heavy[1][0], *heavy[1][2:], heavy[1][1]]
    assert latency_ms(whole, device, "fp16") == pytest.approx(latency_ms(formula, device, "fp16"), rel=0.1)


def test_trunk_above_the_limit_is_the_same(
    trunk: tuple[Path, Trunk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, module = trunk
    monkeypatch.setattr(graph, "INLINE_BYTES", 1 << 16)
    export.trunk_from_module(module, torch.zeros(2, 17, 48), tmp_path / "trunk.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trunk.onnx", "trunk.weights"]
    found, wanted = onnx.load(tmp_path / "trunk.onnx").graph, onnx.load(path).graph
    assert (found.node, found.input, found.output) == (wanted.node, wanted.input, wanted.output)
    weights, known = ({t.name: numpy_helper.to_array(t) for t in each.initializer} for each in (found, wanted))
    assert weights.keys() == known.keys()
    assert all(np.array_equal(weights[name], known[name]) for name in known)


def test_trunk_is_exported_beside_another_one(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weights file in the working directory, where onnx looks, is nothing to an export elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trunk.weights").write_bytes(b"of another trunk")
    model = tiny("cls")
    path = tmp_path / "probes" / "trunk.onnx"
    export.trunk_from_module(Trunk(list(model.module.blocks), model.family), torch.zeros(1, 17, 48), path)
    assert path.with_suffix(".weights").stat().st_size > 1024
    assert (tmp_path / "trunk.weights").read_bytes() == b"of another trunk"


def test_fixed_trunks_share_one_weights_file(trunk: tuple[Path, Trunk]) -> None:
    path, module = trunk
    fixed = path.with_name("trunk-8.onnx")
    fix_tokens(path, 8, fixed)
    weights = path.with_suffix(".weights").stat().st_size
    parameters = sum(p.nbytes for p in module.parameters())
    assert 0.9 * parameters < weights < 1.1 * parameters
    assert fixed.stat().st_size < weights / 4
    places = {e.value for t in onnx.load(fixed, load_external_data=False).graph.initializer for e in t.external_data}
    assert "trunk.weights" in places


def test_last_block_is_fixed_like_a_trunk_but_gives_the_prefix(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("distilled")
    module = LastBlock(model.module.blocks[2], model.family, 2)
    export.trunk_from_module(module, torch.zeros(1, 18, 48), tmp_path / "last.onnx")
    fix_tokens(tmp_path / "last.onnx", 7, tmp_path / "last-7.onnx")
    found, x = shapes(tmp_path / "last-7.onnx"), torch.randn(1, 7, 48)
    assert found["x"] == [1, 7, 48] and found["y"] == [1, 2, 48]
    with torch.inference_mode():
        np.testing.assert_allclose(run(tmp_path / "last-7.onnx", x.numpy()), module(x).numpy(), atol=1e-5, rtol=1e-5)


def test_fixed_trunk_elsewhere_or_of_no_trunk_is_refused(
    trunk: tuple[Path, Trunk], exported: Export, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="choose a path in the same folder"):
        fix_tokens(trunk[0], 8, tmp_path / "trunk-8.onnx")
    whole, _ = exported("none", 1, (17, 17, 17))
    with pytest.raises(InputError, match=r"is not \(batch, tokens, width\)"):
        fix_tokens(whole, 8, whole.with_name("whole-8.onnx"))
    assert not whole.with_name("whole-8.onnx").exists()


def test_no_trace_of_the_exporting_machine(exported: Export, trunk: tuple[Path, Trunk]) -> None:
    places = {os.getcwd(), os.path.expanduser("~"), sys.prefix, *site.getsitepackages(), socket.gethostname()}
    traces = [b"site-packages", b".py", *(os.fsencode(p) for p in places if len(p) > 5)]
    for path in (exported("pomt", 1)[0], trunk[0]):
        content = path.read_bytes()
        assert not [trace for trace in traces if trace in content]


def test_same_export_same_bytes(exported: Export, tmp_path: Path) -> None:
    path, module = exported("pomt", 1)
    export.onnx_from_module(module, torch.zeros(1, 3, 16, 16), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.onnx"]


def test_export_leaves_the_module_as_it_was(exported: Export, tiny: Callable[..., Any]) -> None:
    model = tiny("cls")
    before = [block.attn.fused_attn for block in model.module.blocks]
    with pytest.raises(RuntimeError, match="stop"), export.unfused(model.module):
        assert not any(block.attn.fused_attn for block in model.module.blocks)
        raise RuntimeError("stop")
    assert [block.attn.fused_attn for block in model.module.blocks] == before and all(before)


def test_a_model_of_any_image_size_is_exported_at_its_own(exported: Export) -> None:
    """timm resamples position embeddings in every export of it, to the size that they have."""
    path, module = exported("pomt", 2, (17, 13, 11), "any-size")
    assert "Resize" not in {node.op_type for node in onnx.load(path).graph.node}
    model: Any = module.model
    with pytest.raises(RuntimeError, match="stop"), export.fixed_size(module):
        assert not model.dynamic_img_size and model.patch_embed.flatten
        raise RuntimeError("stop")
    assert model.dynamic_img_size and not model.patch_embed.flatten


@pytest.mark.parametrize("method", ["fp32", "fp16"])
def test_weights_above_the_limit_lie_outside(
    method: str, exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very graph that is written whole below the limit, from an exporter that never holds it whole."""
    path, module = exported("fold", 1, CUT, "cls", True)
    convert = CONVERSIONS.get(method)
    whole = convert(onnx.load(path)) if convert else onnx.load(path)
    monkeypatch.setattr(graph, "INLINE_BYTES", 1 << 16)
    out = tmp_path / "model.onnx"
    export.onnx_from_module(module, torch.zeros(1, 3, 16, 16), out, convert=convert)
    (weights,) = graph.weights_of(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [weights.name, "model.onnx"]
    assert out.stat().st_size < weights.stat().st_size
    assert onnx.load(out).graph.node == whole.graph.node
    with torch.inference_mode():
        wanted = module(torch.from_numpy(images(1))).numpy()
    np.testing.assert_allclose(run(out, images(1)), wanted, atol=1e-4 if method == "fp32" else 0.05, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file_is_refused(share: float, exported: Export, tmp_path: Path) -> None:
    content = exported("pomt", 1)[0].read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cut\.onnx: not an ONNX file .*export it again"):
        load_graph(path)


def test_file_that_is_no_onnx_or_absent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no ONNX at all")
    with pytest.raises(InputError, match="not an ONNX file"):
        load_graph(tmp_path / "text.onnx")
    with pytest.raises(InputError, match="cannot be read"):
        load_graph(tmp_path / "absent.onnx")


@pytest.mark.assets
def test_real_weights_and_images(assets: Path, tmp_path: Path) -> None:
    from edgeprune.images import drawn, load_images, load_pixels, normalise
    from edgeprune.vit.models import load_model

    model = load_model("vit_tiny_patch16_224", os.fspath(next(assets.glob("vit_tiny*.safetensors"))))
    pictures = load_images(assets / "imagenet-val-650" / "labels.csv")
    chosen = drawn(len(pictures), 8)
    feed = normalise(load_pixels([pictures.paths[i] for i in chosen], model.preprocessing), model.preprocessing)
    module = PrunedViT(model.module, model.family, model.vit, (197,) * 3 + (120,) * 9, reducer_named("pomt"))
    export.onnx_from_module(module, torch.zeros(8, 3, 224, 224), tmp_path / "pruned.onnx")
    with torch.inference_mode():
        wanted = module(torch.from_numpy(feed)).numpy()
    np.testing.assert_allclose(run(tmp_path / "pruned.onnx", feed), wanted, atol=1e-4, rtol=0)
    assert pictures.labels is not None
    assert (wanted.argmax(1) == np.array(pictures.labels)[chosen]).mean() > 0.5
    forms = attention_forms(onnx.load(tmp_path / "pruned.onnx"))
    assert forms == [True] * 3 + [False] + [True] * 8


def test_the_table_of_operators_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every export; and another exporter in the same process finds its own function again."""
    from torch.onnx._internal.exporter import _registration

    reads: list[int] = []
    table = _registration.ONNXRegistry.from_torchlib(opset_version=18)

    def read(**_: int) -> Any:
        reads.append(1)
        return table

    monkeypatch.setattr(_registration.ONNXRegistry, "from_torchlib", read)
    for name in ("a", "b"):
        export.onnx_from_module(torch.nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / f"{name}.onnx")
    assert len(reads) == 1 and _registration.ONNXRegistry.from_torchlib is read


def nodes(model: onnx.ModelProto) -> list[Any]:
    """The operators of a graph with attributes, constants, shapes; values are numbered in the order of their making.

    Two forms of a Reshape to the same shape are equal.
    """
    known = {v.name: v.type.SerializeToString() for v in (*model.graph.value_info, *model.graph.output)}
    held = {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}
    numbers = {value.name: index for index, value in enumerate(model.graph.input)}
    found = []
    for node in model.graph.node:
        attributes = sorted(a.SerializeToString() for a in node.attribute if a.name != "allowzero")
        entering = node.input[:1] if node.op_type == "Reshape" else node.input
        inputs = [held.get(name, numbers.get(name)) for name in entering]
        found.append((node.op_type, attributes, inputs, [known[name] for name in node.output]))
        for name in node.output:
            numbers[name] = len(numbers)
    return found


@pytest.mark.parametrize("method", ["none", *REDUCERS])
def test_the_graph_is_that_of_torchs_own_decomposition(
    method: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = tiny("cls", 2), torch.zeros(2, 3, 16, 16)
    tokens = (17, 17) if method == "none" else CUT[:2]
    module = PrunedViT(model.module, model.family, model.vit, tokens, reducer_named(method))
    answers: list[bool] = []

    def told(graph: Any, known: Any) -> bool:
        answers.append(translatable(graph, known))
        return answers[-1]

    monkeypatch.setattr(torch_exporter, "translatable", told)
    fast = exporter(module, example, ("images", "logits"), None, tmp_path)
    monkeypatch.setattr(torch_exporter, "translatable", lambda graph, known: False)
    own = exporter(module, example, ("images", "logits"), None, tmp_path)
    assert answers == [True] and nodes(fast) == nodes(own)


@pytest.mark.parametrize("kind", ["cls", "registers", "post-norm", "packed-mlp", "norms", "gated-attention"])
def test_one_block_repeated_is_the_trunk(kind: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(kind)
    blocks, tokens = list(model.module.blocks), model.vit.tokens
    stream = torch.randn(2, tokens, 48, generator=torch.Generator().manual_seed(0))
    block = export.graph_of_block(blocks[1], model.family, stream)
    assert block is not None and len(block.places) == len(blocks[1].state_dict())
    weights = [export.weight_arrays(each) for each in blocks]
    export.save_trunk(chained(block, weights), tmp_path / "trunk.onnx")
    fix_tokens(tmp_path / "trunk.onnx", tokens, tmp_path / "fixed.onnx")
    onnx.checker.check_model(os.fspath(tmp_path / "fixed.onnx"), full_check=True)
    with torch.inference_mode():
        wanted = Trunk(blocks, model.family)(stream).numpy()
    np.testing.assert_allclose(run(tmp_path / "fixed.onnx", stream.numpy()), wanted, atol=1e-5, rtol=1e-5)


def test_a_weight_that_the_exporter_computed_is_not_repeated(tiny: Callable[..., Any]) -> None:
    model = tiny("cls")
    block = export.graph_of_block(model.module.blocks[1], model.family, torch.zeros(1, 17, 48))
    assert block is not None
    assert repeatable(block.graph, export.weight_arrays(model.module.blocks[1])) is None, (
        "the block's own are not in it"
    )


def test_blocks_of_one_shape_and_other_settings_are_not_alike(tiny: Callable[..., Any]) -> None:
    blocks = list(tiny("cls").module.blocks)
    assert alike(blocks)
    other = copy.deepcopy(blocks[1])
    other.norm1.eps = 0.5
    assert not alike([blocks[0], other])

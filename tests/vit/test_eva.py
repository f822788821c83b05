"""The family of timm's Eva: its blocks against timm's, and rotary positions that stay with their tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from onnx import numpy_helper
from support.attention import BODY, PREFIXES, attended
from support.models import EVA_KINDS, shake
from torch import Tensor

from edgeprune.defaults import REDUCERS
from edgeprune.errors import ModelError
from edgeprune.onnx_graph.attention_fusion import attention_forms
from edgeprune.onnx_graph.graph import fix_tokens
from edgeprune.vit import export
from edgeprune.vit.families import family_of
from edgeprune.vit.profiling_models import export_profiling_models
from edgeprune.vit.pruned import PrunedViT, Trunk, step
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.rotary import rotation_of, rows_of
from edgeprune.vit.tokens import Attended, Reduced, Stream

REAL: dict[str, tuple[int, int, dict[str, Any]]] = {  # prefix, tokens, options
    "eva02_tiny_patch14_224": (1, 26, {"img_size": 70, "num_classes": 5}),
    "vit_small_patch16_dinov3": (5, 21, {"img_size": 64}),
    "vit_small_patch16_rope_mixed_224": (1, 17, {"img_size": 64}),
    "vit_pe_core_tiny_patch16_384": (1, 17, {"img_size": 64}),
}


def images(batch: int = 2, side: int = 16) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def run(path: Path, feed: Tensor) -> Tensor:
    """The one output of an ONNX file in ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: feed.numpy()})[0])


def compare_with_timm(module: Any, feed: Tensor) -> None:
    """The unpruned loop, and the same with every block written out as attend and mlp, equal timm's forward."""
    key, family = family_of(module)
    vit = family.describe(module, "test", "0" * 64)
    with torch.inference_mode():
        wanted = module(feed)
        dense = PrunedViT(module, family, vit, (vit.tokens,) * vit.depth, None)
        x, table = family.embed(module, feed), family.rotary(module)
        assert x.shape == (len(feed), vit.tokens, vit.width)
        for index, block in enumerate(module.blocks):
            found = family.attend(block, x, None, rows_of(table, index, None))
            assert found.weights.shape == (len(feed), vit.heads, vit.tokens, vit.tokens)
            assert found.keys.shape == found.values.shape == (*found.weights.shape[:3], vit.head_dim)
            x = family.mlp(block, found.out)
        assert key == vit.family == "eva" and wanted.shape == (len(feed), vit.classes) and wanted.std() > 0.01
        torch.testing.assert_close(dense(feed), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(family.classify(module, x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", EVA_KINDS)
def test_kinds_equal_timm(kind: str, tiny: Callable[..., Any]) -> None:
    compare_with_timm(tiny(kind).module, images(3))


@pytest.mark.parametrize("name", REAL)
def test_named_models_equal_timm(name: str) -> None:
    prefix, tokens, options = REAL[name]
    torch.manual_seed(0)
    module = shake(timm.create_model(name, depth=2, **options))
    vit = family_of(module)[1].describe(module, name, "0" * 64)
    assert (vit.prefix, vit.tokens, vit.depth) == (prefix, tokens, 2)
    compare_with_timm(module, images(2, vit.image_px))


def test_description(tiny: Callable[..., Any]) -> None:
    vit = tiny("dinov3").vit
    assert (vit.image_px, vit.patch_px, vit.width, vit.heads, vit.head_dim) == (16, 4, 48, 3, 16)
    assert (vit.tokens, vit.prefix, vit.prefix_pooled, vit.mlp_width, vit.mlp_matrices) == (21, 5, True, 192, 2)
    kinds = ("eva", "eva02", "pe-gap", "eva-post-norm", "pe")
    assert [tiny(kind).vit.prefix for kind in kinds] == [1, 1, 0, 1, 1]
    assert [tiny(kind).vit.prefix_pooled for kind in kinds] == [False, False, False, True, False]
    assert [tiny(kind).vit.mlp_matrices for kind in kinds] == [2, 3, 2, 2, 2]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", REDUCERS)
def test_reducers_say_whose_place_each_token_has(method: str, prefix: int) -> None:
    """Tokens so far apart that a kept one is found in its mean, and one step says the same as two."""
    reducer = reducer_named(method)
    assert reducer is not None
    given = attended(3, prefix)
    for keep in (prefix + 1, prefix + 2, prefix + 7, prefix + BODY - 1):
        left, sizes, kept = reducer(given.out, None, given, keep, prefix)
        places, body = kept(), given.out[:, prefix:]
        assert places.shape == (3, keep - prefix)
        for image, row in enumerate(places.tolist()):
            own = [place for place in row if place < BODY]
            assert len(set(own)) == len(own)
            means = row[len(own) :]
            assert means == ([BODY] if method in ("pomt", "evit") else [])
            for token, place in enumerate(own):
                alone = sizes is None or sizes[image, prefix + token] == 1
                if alone:  # of merged ones only the place is known
                    assert torch.allclose(left[image, prefix + token], body[image, place], atol=1e-5)


def reverse(x: Tensor, sizes: Tensor | None, given: Attended, keep: int, prefix: int) -> Reduced:
    """Keeps the last tokens of the body, in reverse."""
    count = x.shape[1] - prefix
    index = torch.arange(count - 1, count - 1 - (keep - prefix), -1).expand(len(x), -1)
    body = x[:, prefix:].gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return Reduced(torch.cat([x[:, :prefix], body], dim=1), None, lambda: index)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["eva02", "mixed", "dinov3", "mrope"])
def test_kept_tokens_rotate_by_their_own_place_after_several_cuts(
    kind: str, batch: int, tiny: Callable[..., Any]
) -> None:
    model = tiny(kind)
    family, module, vit = model.family, model.module, model.vit
    table, stream = family.rotary(module), Stream(family.embed(module, images(batch)))
    x, order = stream.x, torch.arange(vit.tokens)
    with torch.inference_mode():
        for index, drop in enumerate((3, 4, 0)):
            block, rows = module.blocks[index], rows_of(table, index, stream.places)
            stream = step(family, block, stream, len(order) - drop, vit, reverse, rows)
            every = rows_of(table, index, None)
            assert every is not None
            own = every[:, :, order[vit.prefix :] - vit.prefix]
            x = family.attend(block, x, None, own).out
            body = (
                torch.arange(len(order) - 1, vit.prefix + drop - 1, -1)
                if drop
                else torch.arange(vit.prefix, len(order))
            )
            chosen = torch.cat([torch.arange(vit.prefix), body])
            x, order = family.mlp(block, x[:, chosen]), order[chosen]
            torch.testing.assert_close(stream.x, x, atol=1e-5, rtol=1e-5)
    assert (vit.tokens - 1, 0) == (order.max(), order.min()) and order.tolist() != sorted(order.tolist())


def test_a_mean_of_tokens_is_not_rotated(tiny: Callable[..., Any]) -> None:
    model = tiny("eva02")
    table = model.family.rotary(model.module)
    rows = rows_of(table, 0, torch.tensor([[3, 16], [16, 0]]))
    assert rows is not None and rows.shape == (2, 1, 2, 32)
    still = torch.cat([torch.zeros(16), torch.ones(16)])
    assert torch.equal(rows[0, 0, 1], still) and torch.equal(rows[1, 0, 0], still)
    assert torch.equal(rows[0, 0, 0], table[0, 0, 3]) and not torch.equal(rows[0, 0, 0], still)


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("kind", EVA_KINDS)
def test_both_paths_and_the_prefix_alone_are_the_same(kind: str, sized: bool, tiny: Callable[..., Any]) -> None:
    model = tiny(kind)
    vit, family, block = model.vit, model.family, model.module.blocks[2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, vit.prefix + 8, 48, generator=generator)
    sizes = torch.randint(1, 6, (2, vit.prefix + 8), generator=generator).float() if sized else None
    places = torch.rand(2, 16, generator=generator).argsort(1)[:, :8]
    rows = rows_of(family.rotary(model.module), 2, places)
    with torch.inference_mode():
        whole = family.block(block, x, sizes, rows)
        written = family.mlp(block, family.attend(block, x, sizes, rows).out)
        torch.testing.assert_close(whole, written, atol=1e-5, rtol=1e-5)
        if vit.prefix:
            found = family.prefix_only(block, x, sizes, vit.prefix, rows)
            torch.testing.assert_close(found, whole[:, : vit.prefix], atol=1e-5, rtol=1e-5)
        if sized:
            assert (whole - family.block(block, x, None, rows)).abs().max() > 1e-3


def cut_module(model: Any, method: str, prefix_last: bool = False) -> PrunedViT:
    full = model.vit.tokens
    tokens = (full - 4, full - 8, full - 8)
    return PrunedViT(model.module, model.family, model.vit, tokens, reducer_named(method), prefix_last).eval()


EXPORTS = [("eva02", method, 1, False) for method in REDUCERS]
EXPORTS += [(kind, "fold", 2, False) for kind in sorted({*EVA_KINDS} - {"eva02"})]
EXPORTS += [("dinov3", "tome", 2, True), ("rope-xy", "pomt", 2, True)]


@pytest.mark.parametrize(("kind", "method", "batch", "last"), EXPORTS)
def test_pruned_export(
    kind: str, method: str, batch: int, last: bool, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """Static, as PyTorch computes it, fusable, with rotary rows as a constant from which each cut gathers once."""
    model = tiny(kind)
    module = cut_module(model, method, last)
    export.onnx_from_module(module, torch.zeros(batch, 3, 16, 16), tmp_path / "m.onnx")
    assert module.rotary is None
    with torch.inference_mode():
        wanted = module(images(batch))
    torch.testing.assert_close(run(tmp_path / "m.onnx", images(batch)), wanted, atol=1e-4, rtol=0)
    graph = onnx.load(tmp_path / "m.onnx").graph
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    operators = {node.op_type for node in graph.node}
    assert not operators & {"Sin", "Cos", "Shape", "Range", "ScatterND", "Loop", "If"}
    assert attention_forms(onnx.load(tmp_path / "m.onnx"))[-1]
    table = model.family.rotary(model.module)
    if table is not None:
        tables = {t.name for t in graph.initializer if tuple(t.dims)[-2:] == tuple(table.shape)[-2:]}
        tables |= {t.name for t in graph.initializer if numpy_helper.to_array(t).shape == (17, table.shape[-1])}
        gathers = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
        assert len(gathers) == 2


@pytest.mark.parametrize("kind", ["eva02", "dinov3", "mixed", "eva"])
def test_profiling_models(kind: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """All files of a staircase, with a trunk that is static at any token count and equal to its blocks."""
    model = tiny(kind)
    export_profiling_models(model, ["fold"], 2, tmp_path, tensorrt=True)
    names = {path.name for path in tmp_path.glob("*.onnx")}
    assert {"trunk.onnx", "block.onnx", "fixed.onnx", "dense.onnx"} < names and any("cut-fold" in n for n in names)
    assert ("last.onnx" in names) == model.vit.prefix_pooled
    trunk = Trunk(list(model.module.blocks), model.family, rotation_of(model))
    for tokens in (model.vit.prefix + 3, model.vit.tokens):
        fix_tokens(tmp_path / "trunk.onnx", tokens, tmp_path / "fixed-n.onnx")
        x = torch.randn(2, tokens, 48, generator=torch.Generator().manual_seed(tokens))
        with torch.inference_mode():
            torch.testing.assert_close(run(tmp_path / "fixed-n.onnx", x), trunk(x), atol=1e-5, rtol=1e-5)
    assert attention_forms(onnx.load(tmp_path / "trunk.onnx")) == [True] * 3
    with torch.inference_mode():
        torch.testing.assert_close(run(tmp_path / "dense.onnx", images()), model.module(images()), atol=1e-4, rtol=0)


def unpooled() -> Any:
    return timm.create_model("eva02_tiny_patch14_224", depth=1, global_pool="", num_classes=0)


def oblong() -> Any:
    return timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=(56, 28))


@pytest.mark.parametrize(("make", "reason"), [(unpooled, "has no pooling"), (oblong, "takes 56x28 images")])
def test_what_cannot_be_pruned_is_refused_by_its_feature(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        family_of(make())

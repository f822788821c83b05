"""The family of timm's Eva: its blocks against timm's, and rotary positions that stay with their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from edgeprune.onnx_graph.chain import chained
from edgeprune.onnx_graph.graph import fix_tokens
from edgeprune.records import Schedule
from edgeprune.vit import export
from edgeprune.vit.families import family_of
from edgeprune.vit.models import load_model
from edgeprune.vit.profiling_models import rotation_of
from edgeprune.vit.pruned import LastBlock, PrunedViT, Trunk, pruned_from_module, step
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.rotary import rows_of
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
    assert len(order) == vit.tokens - 7


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


class Several(torch.nn.Module):
    """Pruned models whose logits are beside each other: an export of all takes less time than one of each."""

    def __init__(self, parts: Sequence[tuple[Any, str, bool]]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList()
        for model, method, last in parts:
            full = model.vit.tokens
            tokens = (full - 4, full - 4 if last else full - 8)
            reducer = reducer_named(method)
            self.parts.append(PrunedViT(model.module, model.family, model.vit, tokens, reducer, last))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([part(images) for part in self.parts], dim=1)


READS = {"methods": 5, "kinds": 3}  # of a table: in the block after a cut
EXPORTS = {  # kind, method, prefix_last
    "methods": [("eva02", method, False) for method in REDUCERS],
    "kinds": [("dinov3", "tome", True), ("mixed", "fold", False), ("grouped", "pomt", False)],
}


@pytest.mark.parametrize(("group", "batch"), [("methods", 1), ("kinds", 2)])
def test_pruned_export(group: str, batch: int, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Static, as PyTorch computes it, fusable, and rotary rows are constants from which each cut gathers once."""
    module = Several([(tiny(kind, depth=2), *rest) for kind, *rest in EXPORTS[group]]).eval()
    path = tmp_path / "m.onnx"
    export.onnx_from_module(module, torch.zeros(batch, 3, 16, 16), path)
    assert all(part.rotary is None for part in module.parts)
    with torch.inference_mode():
        torch.testing.assert_close(run(path, images(batch)), module(images(batch)), atol=1e-4, rtol=0)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert not {node.op_type for node in model.graph.node} & {"Sin", "Cos", "Shape", "Range", "ScatterND"}
    fusable = [(method == "tome", method == "tome" or last) for _, method, last in EXPORTS[group]]
    assert attention_forms(model) == [form for both in fusable for form in both]  # tome's cuts read keys alone
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    read = [weights[n.input[0]] for n in model.graph.node if n.op_type == "Gather" and n.input[0] in weights]
    tables = [rows for rows in read if rows.shape[-2:] == (17, 32)]
    assert len(tables) == READS[group] and all((rows[..., -1, :] == [0.0] * 16 + [1.0] * 16).all() for rows in tables)


def test_one_block_repeated_is_the_trunk(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """With a symbolic token axis: rows that do not rotate are computed from the stream, for each head of `mixed`."""
    model = tiny("mixed")
    rotation, blocks = rotation_of(model), list(model.module.blocks)
    assert rotation is not None and rotation.heads == 3
    block = export.graph_of_block(blocks[1], model.family, torch.zeros(2, 17, 48), rotation)
    assert block is not None
    export.save_trunk(chained(block, [export.weight_arrays(each) for each in blocks]), tmp_path / "trunk.onnx")
    assert attention_forms(onnx.load(tmp_path / "trunk.onnx")) == [True] * 3
    compare_at_two_counts(tmp_path / "trunk.onnx", Trunk(blocks, model.family, rotation), 1)


def test_last_block_has_a_symbolic_token_axis(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("dinov3")
    last = LastBlock(model.module.blocks[2], model.family, 5, rotation_of(model))
    export.trunk_from_module(last, torch.zeros(2, 21, 48), tmp_path / "last.onnx")
    compare_at_two_counts(tmp_path / "last.onnx", last, 5)


def compare_at_two_counts(path: Path, module: torch.nn.Module, prefix: int) -> None:
    """An ONNX file with a symbolic token axis and its module, at 3 and 16 body tokens."""
    for tokens in (prefix + 3, prefix + 16):
        x = torch.randn(2, tokens, 48, generator=torch.Generator().manual_seed(tokens))
        fix_tokens(path, tokens, path.with_name("fixed.onnx"))
        with torch.inference_mode():
            torch.testing.assert_close(run(path.with_name("fixed.onnx"), x), module(x), atol=1e-5, rtol=1e-5)


def test_rows_of_a_trunk_do_not_rotate(tiny: Callable[..., Any]) -> None:
    """A trunk without cuts and the blocks of an unpruned model differ in the constants of the rotation alone."""
    model = tiny("eva02")
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0))
    trunk, blocks = Trunk(list(model.module.blocks), model.family, rotation_of(model)), model.module.blocks
    with torch.inference_mode():
        y = x
        for block in blocks:
            y = block(y, rope=None)
        torch.testing.assert_close(trunk(x), y, atol=1e-5, rtol=1e-5)


def test_a_user_s_own_module_is_pruned_and_trained() -> None:
    """Resized, with another head; gradients reach the frequencies of learnt rotary positions."""
    torch.manual_seed(0)
    module = timm.create_model("vit_small_patch16_rope_mixed_224", depth=2, img_size=64, num_classes=3)
    module.reset_classifier(4)
    model = load_model(module)
    assert model.module is not module and (model.vit.image_px, model.vit.classes, model.vit.tokens) == (64, 4, 17)
    schedule = Schedule(vit=model.vit, method="fold", policy="search", tokens=(9, 9))
    pruned = pruned_from_module(model.module.train(), schedule)
    pruned(images(2, 64)).square().sum().backward()
    gradient = model.module.rope.freqs.grad
    assert pruned.training and gradient is not None and bool((gradient.abs().amax(dim=(0, 2, 3)) > 0).all())


def unpooled() -> Any:
    return timm.create_model("eva02_tiny_patch14_224", depth=1, global_pool="", num_classes=0)


def oblong() -> Any:
    return timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=(56, 28), patch_size=(14, 7))


@pytest.mark.parametrize(
    ("make", "reason"), [(unpooled, "has no pooling"), (oblong, "divides 56x28 px into 4x4 patches")]
)
def test_what_cannot_be_pruned_is_refused_by_its_feature(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        family_of(make())

"""Families: every kind of timm ViT through edgeprune's own loop against timm's forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from support.models import KINDS, shake
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from edgeprune.defaults import REDUCERS
from edgeprune.errors import ModelError
from edgeprune.vit.families import family_named, family_of
from edgeprune.vit.models import load_model
from edgeprune.vit.pruned import PrunedViT, Trunk, random_kept
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.tokens import Stream

REAL: dict[str, tuple[int, int, dict[str, Any]]] = {  # prefix, tokens, options
    "vit_tiny_patch16_224": (1, 197, {}),
    "deit_tiny_patch16_224": (1, 197, {}),
    "deit_tiny_distilled_patch16_224": (2, 198, {}),
    "deit3_small_patch16_224": (1, 197, {}),
    "vit_xsmall_patch16_clip_224": (1, 197, {}),
    "vit_small_patch14_dinov2": (1, 50, {"img_size": 98}),
    "vit_small_patch14_reg4_dinov2": (5, 54, {"img_size": 98}),
    "vit_medium_patch16_gap_240": (0, 225, {}),
    "vit_base_patch16_siglip_224": (0, 196, {"embed_dim": 96, "num_heads": 3}),
}


def compare_with_timm(module: Any, images: Tensor) -> None:
    """The unpruned loop, and the same with every block written out as attend and feed, equal timm's forward."""
    key, family = family_of(module)
    vit = family.describe(module, "test", "0" * 64)
    assert vit.family == key
    with torch.inference_mode():
        wanted = module(images)
        dense = PrunedViT(module, family, vit, (vit.tokens,) * vit.depth, None)
        x = family.embed(module, images)
        assert x.shape == (len(images), vit.tokens, vit.width)
        for block in module.blocks:
            attended = family.attend(block, x, None)
            assert attended.weights.shape == (len(images), vit.heads, vit.tokens, vit.tokens)
            assert attended.keys.shape == attended.values.shape == (*attended.weights.shape[:3], vit.head_dim)
            torch.testing.assert_close(attended.weights.sum(-1), torch.ones(attended.weights.shape[:3]))
            x = family.mlp(block, attended.out)
        assert wanted.shape == (len(images), vit.classes) and wanted.std() > 0.01
        torch.testing.assert_close(dense(images), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(family.classify(module, x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REAL)
def test_equals_timm(name: str) -> None:
    prefix, tokens, options = REAL[name]
    torch.manual_seed(0)
    module = shake(timm.create_model(name, depth=2, **options))
    vit = family_of(module)[1].describe(module, name, "0" * 64)
    assert (vit.prefix, vit.tokens, vit.depth) == (prefix, tokens, 2)
    assert vit.prefix_pooled == (prefix > 0)
    compare_with_timm(module, torch.randn(2, 3, vit.image_px, vit.image_px))


@pytest.mark.parametrize("kind", KINDS)
def test_variants_equal_timm(kind: str, tiny: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    if kind == "gated-attention" and not hasattr(timm.layers.Attention(8), "gate"):
        pytest.skip("this timm has no gated attention")
    compare_with_timm(tiny(kind).module, torch.randn(3, 3, 16, 16))


def test_description(tiny: Callable[..., Any]) -> None:
    vit = tiny("cls").vit
    assert (vit.image_px, vit.patch_px, vit.width, vit.heads, vit.head_dim) == (16, 4, 48, 3, 16)
    assert (vit.depth, vit.tokens, vit.prefix, vit.classes) == (3, 17, 1, 7)
    assert (vit.mlp_width, vit.mlp_matrices) == (192, 2)
    assert (tiny("gated-mlp").vit.mlp_width, tiny("gated-mlp").vit.mlp_matrices) == (192, 3)
    assert (tiny("packed-mlp").vit.mlp_width, tiny("packed-mlp").vit.mlp_matrices) == (96, 3)
    assert [tiny(kind).vit.prefix for kind in ("gap", "map", "distilled", "registers")] == [0, 0, 2, 5]
    assert family_named("vit") is tiny("cls").family


@pytest.mark.parametrize("method", REDUCERS)
@pytest.mark.parametrize("kind", ["gap", "cls", "distilled", "registers", "post-norm"])
def test_every_block_leaves_the_tokens_of_the_schedule(kind: str, method: str, tiny: Callable[..., Any]) -> None:
    model = tiny(kind)
    full, least = model.vit.tokens, model.vit.prefix + 1
    seen: list[int] = []
    hooks = [b.mlp.register_forward_hook(lambda *args: seen.append(args[2].shape[1])) for b in model.module.blocks]
    try:
        for tokens in [(full, full - 1, least + 1), (full - 5, full - 5, full - 5), (least, least, least)]:
            seen.clear()
            with torch.inference_mode():
                pruned = PrunedViT(model.module, model.family, model.vit, tokens, reducer_named(method))
                assert pruned(torch.randn(2, 3, 16, 16)).shape == (2, 7)
                x = torch.randn(2, full, model.vit.width)
                assert [pruned.blocks(Stream(x), 0, stop, None).x.shape[1] for stop in (1, 2, 3)] == list(tokens)
            assert seen[:3] == list(tokens)
    finally:
        for hook in hooks:
            hook.remove()


def test_schedules_that_cannot_be_are_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("cls")
    with pytest.raises(ValueError, match="needs a reducer"):
        PrunedViT(model.module, model.family, model.vit, (17, 16, 16), None)
    with pytest.raises(ValueError, match="rise from 10 to 11 in block 1"):
        PrunedViT(model.module, model.family, model.vit, (10, 11, 11), reducer_named("topk"))


@pytest.mark.parametrize("kind", ["cls", "registers", "post-norm", "norms"])
def test_sizes_weigh_tokens_alike_in_both_paths(kind: str, tiny: Callable[..., Any]) -> None:
    model, block = tiny(kind), tiny(kind).module.blocks[1]
    torch.manual_seed(0)
    x = torch.randn(2, 9, 48)
    sizes = torch.tensor([[1, 3, 1, 1, 2, 1, 1, 1, 4], [1, 1, 1, 1, 1, 1, 5, 1, 1.0]])
    with torch.inference_mode():
        fused = model.family.block(block, x, sizes)
        written = model.family.mlp(block, model.family.attend(block, x, sizes).out)
        torch.testing.assert_close(fused, written, atol=1e-5, rtol=1e-5)
        alone = model.family.block(block, x, None)
        assert (fused - alone).abs().max() > 1e-3
        torch.testing.assert_close(model.family.block(block, x, torch.full((2, 9), 3.0)), alone, atol=1e-5, rtol=1e-5)


def test_a_token_of_size_three_counts_like_three_tokens(tiny: Callable[..., Any]) -> None:
    model, block = tiny("cls"), tiny("cls").module.blocks[0]
    torch.manual_seed(0)
    x = torch.randn(1, 5, 48)
    sizes = torch.tensor([[1.0, 3, 1, 2, 1]])
    copies = x.repeat_interleave(torch.tensor([1, 3, 1, 2, 1]), dim=1)
    with torch.inference_mode():
        weighed = model.family.block(block, x, sizes)
        wanted = model.family.block(block, copies, None)[:, [0, 1, 4, 5, 7]]
    torch.testing.assert_close(weighed, wanted, atol=1e-5, rtol=1e-5)


POOLED = ["gap", "gap-cls", "gap-prefix", "avgmax", "map", "pe", "pe-gap"]


@pytest.mark.parametrize("kind", POOLED)
def test_pooling_counts_a_token_of_size_three_as_three(kind: str, tiny: Callable[..., Any]) -> None:
    """Average and attention pooling; without sizes, and with equal ones, the head is timm's."""
    model = tiny(kind)
    torch.manual_seed(0)
    prefix = model.vit.prefix
    x, counts = torch.randn(2, prefix + 4, 48), torch.tensor([*[1] * prefix, 3, 1, 5, 1])
    sizes = counts.float().repeat(2, 1)
    with torch.inference_mode():
        weighed = model.family.classify(model.module, x, sizes)
        copies = model.family.classify(model.module, x.repeat_interleave(counts, dim=1))
        alone = model.family.classify(model.module, x)
        assert torch.equal(alone, model.module.forward_head(model.family.norm(model.module, x)))
        torch.testing.assert_close(weighed, copies, atol=1e-5, rtol=1e-5)
        assert (weighed - alone).abs().max() > 1e-4
        equal = model.family.classify(model.module, x, torch.ones_like(sizes))
        torch.testing.assert_close(equal, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["gap", "map"])
def test_sizes_bring_a_pooled_output_closer_to_the_unpruned_one(kind: str, tiny: Callable[..., Any]) -> None:
    model, generator = tiny(kind), torch.Generator().manual_seed(0)
    even = torch.nn.functional.interpolate(torch.randn(16, 3, 3, 3, generator=generator), size=16)  # as real ones are
    pruned = PrunedViT(model.module, model.family, model.vit, (10, 8, 6), reducer_named("fold"))
    with torch.inference_mode():
        wanted, found = model.module(even), pruned(even)
        stream = pruned.blocks(Stream(model.family.embed(model.module, even)), 0, 3, None)
        unweighed = model.family.classify(model.module, stream.x)
    assert (found - wanted).norm() < 0.8 * (unweighed - wanted).norm()


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"gap", "avgmax", "map"}))
def test_last_block_for_the_prefix_alone_is_lossless(kind: str, sized: bool, tiny: Callable[..., Any]) -> None:
    model, block = tiny(kind), tiny(kind).module.blocks[2]
    torch.manual_seed(0)
    prefix = model.vit.prefix
    x, sizes = torch.randn(2, prefix + 8, 48), torch.randint(1, 6, (2, prefix + 8)).float()
    with torch.inference_mode():
        whole = model.family.mlp(block, model.family.attend(block, x, sizes if sized else None).out)
        found = model.family.prefix_only(block, x, sizes if sized else None, prefix)
    assert found.shape == (2, prefix, 48)
    torch.testing.assert_close(found, whole[:, :prefix], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["none", "pomt", "fold"])
@pytest.mark.parametrize("kind", ["cls", "distilled", "post-norm"])
def test_prefix_last_gives_the_same_logits(kind: str, method: str, tiny: Callable[..., Any]) -> None:
    model, images = tiny(kind), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    full = model.vit.tokens
    tokens = (full, full, full) if method == "none" else (full - 3, full - 8, full - 8)
    parts = model.module, model.family, model.vit, tokens, reducer_named(method)
    with torch.inference_mode():
        torch.testing.assert_close(PrunedViT(*parts, prefix_last=True)(images), PrunedViT(*parts)(images))


def test_prefix_last_is_refused_where_it_would_lose_something(tiny: Callable[..., Any]) -> None:
    model, gap = tiny("cls"), tiny("gap")
    with pytest.raises(ValueError, match="a last block that computes only the prefix"):
        PrunedViT(model.module, model.family, model.vit, (17, 17, 16), reducer_named("pomt"), prefix_last=True)
    with pytest.raises(ValueError, match="head of gap reads more than the prefix"):
        PrunedViT(gap.module, gap.family, gap.vit, (16, 16, 16), None, prefix_last=True)


def test_trunk_takes_any_number_of_tokens(tiny: Callable[..., Any]) -> None:
    model = tiny("cls")
    trunk = Trunk(list(model.module.blocks), model.family)
    x = torch.randn(2, 6, 48)
    with torch.inference_mode():
        torch.testing.assert_close(trunk(x), model.module.blocks(x))


def test_random_choice_keeps_the_prefix_and_each_body_token_at_most_once() -> None:
    x = torch.arange(20.0).repeat(64, 1)[..., None]
    kept = random_kept(x, 8, 2, torch.Generator().manual_seed(0)).x[..., 0]
    assert torch.equal(kept[:, :2], x[:, :2, 0])
    body = [set(row.tolist()) for row in kept[:, 2:]]
    assert all(len(row) == 6 and min(row) >= 2 for row in body)
    assert set.union(*body) == set(range(2, 20)) and body[0] != body[1]


def test_a_head_that_was_replaced_counts_as_it_is() -> None:
    def described(head: Any) -> int:
        module = timm.create_model("test_vit")
        module.head = head
        before = module.training
        found: int = family_of(module)[1].describe(module, "test", "0" * 64).classes
        assert module.training is before
        return found

    assert described(torch.nn.Linear(64, 5)) == 5
    assert described(torch.nn.Identity()) == 64
    assert described(torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 6))) == 6
    with pytest.raises(ModelError, match=r"head is a Sequential .*: call model.reset_classifier\(num_classes\)"):
        described(torch.nn.Sequential(torch.nn.Linear(3, 6)))


def test_the_identity_of_a_model_has_the_settings_of_its_layers() -> None:
    """Steps of a build are kept under it: another activation, epsilon or pooling is another model."""
    options = {
        "depth": 1,
        "embed_dim": 64,
        "num_heads": 4,
        "img_size": 32,
        "class_token": False,
        "global_pool": "avg",
    }
    changes = ({}, {"act_layer": torch.nn.ReLU}, {"norm_layer": partial(torch.nn.LayerNorm, eps=1e-5)},
               {"global_pool": "avgmax"})  # fmt: skip
    state, found = None, []
    for change in changes:
        module = VisionTransformer(**options | change)
        state = state or module.state_dict()
        module.load_state_dict(state)
        found.append(load_model(module).vit.weights_sha256)
    assert len(set(found)) == len(changes)
    assert load_model(module).vit.weights_sha256 == found[-1]


def no_vit() -> Any:
    return timm.create_model("resnet18")


def parallel() -> Any:
    return timm.create_model("vit_small_patch16_18x2_224", depth=1)


def differential() -> Any:
    if not timm.is_model("vit_dwee_patch16_reg1_gap_256"):
        pytest.skip("this timm has no differential attention")
    return timm.create_model("vit_dwee_patch16_reg1_gap_256", depth=1)


def low_rank() -> Any:
    module = timm.create_model("vit_tiny_patch16_224", depth=1)
    module.blocks[0].attn.qkv = type("LoRA", (torch.nn.Linear,), {})(192, 576)
    return module


def low_rank_eva() -> Any:
    module = timm.create_model("vit_small_patch16_dinov3", depth=1)
    module.blocks[0].attn.qkv = torch.nn.Sequential(module.blocks[0].attn.qkv)
    return module


def unpooled() -> Any:
    return timm.create_model("vit_tiny_patch16_224", depth=1, global_pool="", num_classes=0)


def oblong() -> Any:
    return timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(64, 32), patch_size=(16, 8))


def own_forward() -> Any:
    class Mine(VisionTransformer):
        def forward_features(self, x: Any) -> Any:
            return super().forward_features(x) * 2

    return Mine(depth=1, embed_dim=64, num_heads=4)


def own_mlp() -> Any:
    return VisionTransformer(depth=1, embed_dim=64, num_heads=4, mlp_layer=lambda **_: torch.nn.Sequential())


def grey() -> Any:
    return timm.create_model("vit_tiny_patch16_224", depth=1, in_chans=1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (own_forward, "Mine has a forward_features of its own: load its weights into timm's model"),
        (own_mlp, "block 0 has Sequential, not one of timm's MLPs"),
        (grey, "takes pictures of 1 channels, only RGB"),
        (no_vit, "ResNet is not a timm VisionTransformer"),
        (parallel, "block 0 is a ParallelThingsBlock"),
        (differential, "block 0 has DiffAttention"),
        (unpooled, "has no pooling"),
        (low_rank, "block 0 has a LoRA for its queries, keys and values, .*: merge the adapters first"),
        (low_rank_eva, "block 0 has a Sequential for its queries, .*: merge the adapters first"),
        (oblong, "divides 64x32 px into 4x4 patches, only square ones"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_its_feature(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        family_of(make())

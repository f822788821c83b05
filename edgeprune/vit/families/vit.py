"""timm VisionTransformer: ViT, DeiT (distilled too), DeiT-3, CLIP image towers, DINOv2 with registers."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

from edgeprune.records import Vit
from edgeprune.vit.families.grid import image_px, patch_px, uneven
from edgeprune.vit.families.head import head_on, output_width, wrapped
from edgeprune.vit.tokens import Attended


def owns(model: nn.Module) -> bool:
    """Is `model` of this family?"""
    return isinstance(model, VisionTransformer)


def unsupported(model: Any) -> str | None:
    """Why a model of this family cannot be pruned, or None."""
    for index, block in enumerate(model.blocks):
        if type(block) not in (Block, ResPostBlock):
            kind = type(block).__name__
            return f"block {index} is a {kind}, without separate attention and MLP: choose another model"
        if type(block.attn) is not Attention:
            return f"block {index} has {type(block.attn).__name__}, not timm's Attention: choose another model"
        if type(block.attn.qkv) is not nn.Linear:
            return wrapped(index, block.attn.qkv)
    if model.global_pool == "":
        return "the model has no pooling (global_pool=''): create it with a classification head"
    return uneven(model)


def describe(model: Any, name: str, weights_sha256: str) -> Vit:
    """The Vit record of a supported model."""
    block = model.blocks[0]
    attn, mlp = block.attn, block.mlp
    gated = not hasattr(mlp, "fc1") or mlp.fc1.out_features != mlp.fc2.in_features
    return Vit(
        name=name,
        weights_sha256=weights_sha256,
        family="vit",
        image_px=image_px(model),
        patch_px=patch_px(model),
        depth=len(model.blocks),
        width=model.embed_dim,
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        mlp_width=mlp.fc2.in_features,
        mlp_matrices=3 if gated else 2,
        prefix=model.num_prefix_tokens,
        tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        classes=output_width(model),
        prefix_pooled=model.global_pool == "token",
    )


def embed(model: Any, images: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, N, C)."""
    x = model._pos_embed(model.patch_embed(images))
    out: Tensor = model.norm_pre(model.patch_drop(x))
    return out


def rotary(model: Any) -> Tensor | None:
    """None: positions are added to the tokens."""
    return None


def block(block: Any, x: Tensor, sizes: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """timm's own block, so that runtimes can fuse its attention; sizes become an attention mask."""
    out: Tensor = block(x) if sizes is None else block(x, attn_mask=size_bias(sizes))
    return out


def size_bias(sizes: Tensor) -> Tensor:
    """Proportional attention (Token Merging, arXiv 2210.09461, eq. 1): log sizes (B, N) as (B, 1, 1, N)."""
    return sizes.log()[:, None, None, :]


def attend(block: Any, x: Tensor, sizes: Tensor | None, rows: Tensor | None = None) -> Attended:
    """timm's Attention step by step, with the scale before the first matmul as TensorRT's fusion requires."""
    pre_norm = isinstance(block, Block)
    attn = block.attn
    y = block.norm1(x) if pre_norm else x
    batch, count, _ = y.shape
    qkv = attn.qkv(y).reshape(batch, count, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    queries, keys, values = qkv.unbind(0)
    queries, keys = attn.q_norm(queries), attn.k_norm(keys)
    logits = (queries * attn.scale) @ keys.transpose(-2, -1)
    if sizes is not None:
        logits = logits + size_bias(sizes)
    weights = logits.softmax(dim=-1)
    out = (attn.attn_drop(weights) @ values).transpose(1, 2).reshape(batch, count, attn.num_heads * attn.head_dim)
    return Attended(x + _project(block, out, y), weights, keys, values)


def prefix_only(block: Any, x: Tensor, sizes: Tensor | None, prefix: int, rows: Tensor | None = None) -> Tensor:
    """(B, N, C) to (B, prefix, C): queries, projection and MLP for the prefix, keys and values for all.

    The values equal those of the whole block for its first tokens.
    """
    pre_norm = isinstance(block, Block)
    attn = block.attn
    y = block.norm1(x) if pre_norm else x
    batch, count, _ = y.shape
    weight, bias, inner = attn.qkv.weight, attn.qkv.bias, attn.num_heads * attn.head_dim
    queries = linear(y[:, :prefix], weight[:inner], None if bias is None else bias[:inner])
    both = linear(y, weight[inner:], None if bias is None else bias[inner:])
    queries = queries.reshape(batch, prefix, attn.num_heads, attn.head_dim).transpose(1, 2)
    keys, values = both.reshape(batch, count, 2, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    queries, keys = attn.q_norm(queries), attn.k_norm(keys)
    logits = (queries * attn.scale) @ keys.transpose(-2, -1)
    if sizes is not None:
        logits = logits + size_bias(sizes)
    out = (attn.attn_drop(logits.softmax(dim=-1)) @ values).transpose(1, 2).reshape(batch, prefix, inner)
    return mlp(block, x[:, :prefix] + _project(block, out, y[:, :prefix]))


def _project(block: Any, out: Tensor, y: Tensor) -> Tensor:
    """The operations between the attention matmul and the residual: (B, n, heads * D) to (B, n, C)."""
    attn = block.attn
    out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * torch.sigmoid(attn.gate(y))
    out = attn.proj_drop(attn.proj(out))
    result: Tensor = block.drop_path1(block.ls1(out) if isinstance(block, Block) else block.norm1(out))
    return result


def mlp(block: Any, x: Tensor) -> Tensor:
    """MLP and residual: (B, N, C) to (B, N, C)."""
    if isinstance(block, Block):
        out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    else:
        out = x + block.drop_path2(block.norm2(block.mlp(x)))
    return out


def norm(model: Any, x: Tensor) -> Tensor:
    """The final norm of each token, (B, N, C); nothing in models that normalise after pooling."""
    out: Tensor = model.norm(x)
    return out


def classify(model: Any, x: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, N, C) to (B, classes)."""
    return head_on(model, model.norm(x), sizes, model.pool_include_prefix)

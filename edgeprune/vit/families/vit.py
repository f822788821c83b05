"""timm VisionTransformer: ViT, DeiT (distilled too), DeiT-3, CLIP image towers, DINOv2 with registers."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

from edgeprune.records import Vit
from edgeprune.vit.families.common import attention, changed, described, norm, size_bias
from edgeprune.vit.families.grid import uneven
from edgeprune.vit.families.head import head_on, wrapped
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
    return changed(model) or uneven(model)


def describe(model: Any, name: str, weights_sha256: str) -> Vit:
    """The Vit record of a supported model."""
    return described(model, name, weights_sha256, "vit", model.global_pool == "token")


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


def attend(block: Any, x: Tensor, sizes: Tensor | None, rows: Tensor | None = None) -> Attended:
    """timm's attention step by step."""
    y = block.norm1(x) if isinstance(block, Block) else x
    out, weights, keys, values = attention(block.attn, *_projected(block.attn, y, None), sizes)
    out = out.reshape(*y.shape[:2], block.attn.num_heads * block.attn.head_dim)
    return Attended(x + _project(block, out, y), weights, keys, values)


def prefix_only(block: Any, x: Tensor, sizes: Tensor | None, prefix: int, rows: Tensor | None = None) -> Tensor:
    """(B, N, C) to (B, prefix, C): queries, projection and MLP for the prefix, keys and values for all.

    The values equal those of the whole block for its first tokens.
    """
    y = block.norm1(x) if isinstance(block, Block) else x
    out, *_ = attention(block.attn, *_projected(block.attn, y, prefix), sizes)
    out = out.reshape(len(y), prefix, block.attn.num_heads * block.attn.head_dim)
    return mlp(block, x[:, :prefix] + _project(block, out, y[:, :prefix]))


def _projected(attn: Any, y: Tensor, asking: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, n, D) of all tokens of y (B, N, C) or of the first `asking`, keys and values (B, H, N, D)."""
    batch, count, _ = y.shape

    def heads(flat: Tensor, matrices: int) -> Tensor:
        return flat.reshape(batch, count, matrices, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)

    if asking is None:
        queries, keys, values = heads(attn.qkv(y), 3).unbind(0)
    else:
        weight, bias, inner = attn.qkv.weight, attn.qkv.bias, attn.num_heads * attn.head_dim
        first = linear(y[:, :asking], weight[:inner], None if bias is None else bias[:inner])
        both = linear(y, weight[inner:], None if bias is None else bias[inner:])
        queries = first.reshape(batch, asking, attn.num_heads, attn.head_dim).transpose(1, 2)
        keys, values = heads(both, 2).unbind(0)
    return attn.q_norm(queries), attn.k_norm(keys), values


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


def classify(model: Any, x: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, N, C) to (B, classes)."""
    return head_on(model, norm(model, x), sizes, model.pool_include_prefix)

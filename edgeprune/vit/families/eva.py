"""timm Eva: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn
from torch.nn.functional import linear

from edgeprune.records import Vit
from edgeprune.vit.families.common import attention, changed, described, norm, size_bias
from edgeprune.vit.families.grid import uneven
from edgeprune.vit.families.head import head_on, wrapped
from edgeprune.vit.rotary import table_of
from edgeprune.vit.tokens import Attended


def owns(model: nn.Module) -> bool:
    """Is `model` of this family?"""
    return isinstance(model, Eva)


def unsupported(model: Any) -> str | None:
    """Why a model of this family cannot be pruned, or None."""
    for index, block in enumerate(model.blocks):
        if type(block) not in (EvaBlock, EvaBlockPostNorm):
            kind = type(block).__name__
            return f"block {index} is a {kind}, without separate attention and MLP: choose another model"
        if type(block.attn) not in (EvaAttention, AttentionRope):
            return f"block {index} has {type(block.attn).__name__}, not timm's attention: choose another model"
        if block.attn.qkv is not None and type(block.attn.qkv) is not nn.Linear:
            return wrapped(index, block.attn.qkv)
    if model.global_pool == "" and model.attn_pool is None:
        return "the model has no pooling (global_pool=''): create it with a classification head"
    return changed(model) or uneven(model)


def describe(model: Any, name: str, weights_sha256: str) -> Vit:
    """The Vit record of a supported model."""
    pooled = model.global_pool == "token" and model.attn_pool is None
    return described(model, name, weights_sha256, "eva", pooled)


def rotary(model: Any) -> Tensor | None:
    """The table of vit/rotary.py for the model's image size; None for EVA without rotary positions."""
    if model.rope is None:
        return None
    return table_of(model.rope.get_embed(shape=list(model.patch_embed.grid_size)))


def embed(model: Any, images: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, N, C); timm's own also computes rotary rows, which rotary() has."""
    x = model.patch_embed(images)
    if x.ndim == 4:  # models of any image size give (B, H, W, C)
        x = x.flatten(1, 2)
    if model.no_embed_class and model.pos_embed is not None:
        x = x + model.pos_embed
    prefix = [token.expand(len(x), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    x = torch.cat([*prefix, x], dim=1) if prefix else x
    if not model.no_embed_class and model.pos_embed is not None:
        x = x + model.pos_embed
    out: Tensor = model.norm_pre(model.pos_drop(x))
    return out


def block(block: Any, x: Tensor, sizes: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """timm's own block, so that runtimes can fuse its attention; sizes become an attention mask."""
    out: Tensor = block(x, rope=rows) if sizes is None else block(x, rope=rows, attn_mask=size_bias(sizes))
    return out


def attend(block: Any, x: Tensor, sizes: Tensor | None, rows: Tensor | None = None) -> Attended:
    """timm's attention step by step."""
    y = block.norm1(x) if isinstance(block, EvaBlock) else x
    queries, keys, values = _projected(block.attn, y, None)
    queries, keys = _rotated(block.attn, queries, rows), _rotated(block.attn, keys, rows)
    out, weights, keys, values = attention(block.attn, queries, keys, values, sizes)
    return Attended(x + _project(block, out.flatten(2), y), weights, keys, values)


def prefix_only(block: Any, x: Tensor, sizes: Tensor | None, prefix: int, rows: Tensor | None = None) -> Tensor:
    """(B, N, C) to (B, prefix, C): queries, projection and MLP for the prefix, keys and values for all.

    The values equal those of the whole block for its first tokens. Queries of the prefix are never rotated.
    """
    y = block.norm1(x) if isinstance(block, EvaBlock) else x
    queries, keys, values = _projected(block.attn, y, prefix)
    out, *_ = attention(block.attn, queries, _rotated(block.attn, keys, rows), values, sizes)
    out = out.flatten(2)
    return mlp(block, x[:, :prefix] + _project(block, out, y[:, :prefix]))


def _projected(attn: Any, y: Tensor, asking: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, n, D) of all tokens of y (B, N, C) or of the first `asking`, keys and values (B, H, N, D)."""

    def heads(flat: Tensor, count: int) -> Tensor:
        return flat.reshape(len(y), count, -1, attn.head_dim).transpose(1, 2)

    count = y.shape[1]
    first = y if asking is None else y[:, :asking]
    if attn.qkv is None:
        queries, keys, values = attn.q_proj(first), attn.k_proj(y), attn.v_proj(y)
    else:
        weight, bias, inner = attn.qkv.weight, attn.qkv.bias, attn.num_heads * attn.head_dim
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        if first is y:
            queries, keys, values = linear(y, weight, bias).split(inner, dim=2)
        else:
            queries = linear(first, weight[:inner], None if bias is None else bias[:inner])
            keys, values = linear(y, weight[inner:], None if bias is None else bias[inner:]).split(inner, dim=2)
    return attn.q_norm(heads(queries, asking or count)), attn.k_norm(heads(keys, count)), heads(values, count)


def _rotated(attn: Any, x: Tensor, rows: Tensor | None) -> Tensor:
    """(B, H, N, D) with all tokens but the prefix rotated, by rows (1 or B, 1 or H, N - prefix, 2 D)."""
    if rows is None:
        return x
    prefix = attn.num_prefix_tokens
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rows, half=attn.rotate_half)], dim=2)


def _project(block: Any, out: Tensor, y: Tensor) -> Tensor:
    """The operations between the attention matmul and the residual: (B, n, H * D) to (B, n, C)."""
    attn = block.attn
    out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(y).sigmoid()
    out = attn.proj_drop(attn.proj(out))
    if not isinstance(block, EvaBlock):
        out = block.norm1(out)
    elif block.gamma_1 is not None:
        out = block.gamma_1 * out
    result: Tensor = block.drop_path1(out)
    return result


def mlp(block: Any, x: Tensor) -> Tensor:
    """MLP and residual: (B, N, C) to (B, N, C)."""
    if isinstance(block, EvaBlock):
        out = block.mlp(block.norm2(x))
        out = out if block.gamma_2 is None else block.gamma_2 * out
    else:
        out = block.norm2(block.mlp(x))
    result: Tensor = x + block.drop_path2(out)
    return result


def classify(model: Any, x: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, N, C) to (B, classes)."""
    return head_on(model, norm(model, x), sizes, model.attn_pool is not None)

"""What timm's VisionTransformer and Eva have in common: the record, the final norm, attention step by step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgeprune.records import Vit
from edgeprune.vit.families.grid import image_px, patch_px
from edgeprune.vit.families.head import output_width

OWN = ("forward", "forward_features", "forward_head", "_pos_embed")  # of timm, followed step by step here
KNOWN = ("timm", "edgeprune")


def changed(model: Any) -> str | None:
    """Why a model is not what timm computes, though its class is derived from timm's; None where it is."""
    for name in OWN:
        found = getattr(model, name)
        if str(getattr(found, "__module__", "")).partition(".")[0] not in KNOWN:
            return f"{type(model).__name__} has a {name} of its own: load its weights into timm's model instead"
    for index, block in enumerate(model.blocks):
        if not hasattr(block.mlp, "fc2"):
            return f"block {index} has {type(block.mlp).__name__}, not one of timm's MLPs: choose another model"
    layer = getattr(model.patch_embed, "proj", None)
    channels = 3 if hasattr(model.patch_embed, "backbone") else getattr(layer, "in_channels", 3)
    if channels != 3:
        return f"the model takes pictures of {channels} channels, only RGB is supported: choose another model"
    return None


def described(model: Any, name: str, weights_sha256: str, family: str, prefix_pooled: bool) -> Vit:
    """The Vit record of a supported model; `prefix_pooled`: its head reads the prefix alone."""
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    gated = not hasattr(mlp, "fc1") or mlp.fc1.out_features != mlp.fc2.in_features
    return Vit(
        name=name,
        weights_sha256=weights_sha256,
        family=family,
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
        prefix_pooled=prefix_pooled,
    )


def norm(model: Any, x: Tensor) -> Tensor:
    """The final norm of each token, (B, N, C); nothing in models that normalise after pooling."""
    out: Tensor = model.norm(x)
    return out


def size_bias(sizes: Tensor) -> Tensor:
    """Proportional attention (Token Merging, arXiv 2210.09461, eq. 1): log sizes (B, N) as (B, 1, 1, N)."""
    return sizes.log()[:, None, None, :]


def attention(
    attn: Any, queries: Tensor, keys: Tensor, values: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (B, n, H, D), the weights (B, H, n, N), and keys and values with one of each per head.

    The scale is before the first matmul, as TensorRT's fusion requires.
    """
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    logits = (queries * attn.scale) @ keys.transpose(-2, -1)
    if sizes is not None:
        logits = logits + size_bias(sizes)
    weights = logits.softmax(dim=-1)
    out = (attn.attn_drop(weights) @ values).transpose(1, 2)
    return out, weights, keys, values

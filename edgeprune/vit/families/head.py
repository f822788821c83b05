"""The head of a timm model: its real output, and pooling in which a token counts as often as the tokens in it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from edgeprune.errors import ModelError


def output_width(model: Any) -> int:
    """Values of the output. The model's num_classes is not that of a head that was replaced. Raises ModelError."""
    head = model.head
    if isinstance(head, nn.Linear):
        return head.out_features
    if isinstance(head, nn.Identity):
        width: int = model.embed_dim
        return width
    whole = copy.deepcopy(model).eval()  # some layers change in training mode
    parameter = next(whole.parameters())
    tokens = torch.zeros(1, model.num_prefix_tokens + model.patch_embed.num_patches, model.embed_dim)
    try:
        with torch.no_grad():
            _, width = whole.forward_head(whole.norm(tokens.to(parameter))).shape
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the head is a {type(head).__name__} that does not give (batch, classes) ({str(error)[:100]}): "
            "call model.reset_classifier(num_classes)"
        ) from None
    return width


def wrapped(index: int, layer: nn.Module) -> str:
    """Why a block whose queries, keys and values are not from one plain matrix cannot be pruned."""
    kind = type(layer).__name__
    return f"block {index} has a {kind} for its queries, keys and values, not nn.Linear: merge the adapters first"


def head_on(model: Any, x: Tensor, sizes: Tensor | None, with_prefix: bool) -> Tensor:
    """timm's pooling and head on normalised tokens (B, N, C) that stand for `sizes` (B, N) patches each.

    `with_prefix`: pooling includes the prefix. Without sizes, and for a head on one token, it is exactly timm's.
    """
    if sizes is None or (model.attn_pool is None and model.global_pool not in ("avg", "avgmax")):
        out: Tensor = model.forward_head(x)
        return out
    start = 0 if with_prefix else model.num_prefix_tokens
    own = sizes[:, start:]
    if model.attn_pool is not None:
        if not isinstance(model.attn_pool, AttentionPoolLatent):
            return model.forward_head(x)  # type: ignore[no-any-return]
        pooled = model.attn_pool(x[:, start:], attn_mask=own.log()[:, None, None, :])
    else:
        weights = (own / own.mean(dim=1, keepdim=True))[..., None]
        weighed = torch.cat([x[:, :start], x[:, start:] * weights], dim=1) if start else x * weights
        if model.global_pool == "avg":
            return model.forward_head(weighed)  # type: ignore[no-any-return]
        pooled = (model.pool(x, "max") + model.pool(weighed, "avg")) / 2
    out = model.head(model.head_drop(model.fc_norm(pooled)))
    return out

"""Scores and gathers that the reducers share; body = every token that is not prefix. M body tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.vit.tokens import Attended


def cls_score(attended: Attended, prefix: int) -> Tensor:
    """(B, M) attention from the first token (CLS) to the body, mean over heads; column mean without CLS."""
    if prefix:
        return attended.weights[:, :, 0, prefix:].mean(dim=1)
    return attended.weights.mean(dim=1).mean(dim=1)


def pomt_score(attended: Attended, prefix: int) -> Tensor:
    """(B, M) importance by POMT (arXiv 2407.05941, sec. 3): attention received plus value magnitude.

    Attention: the maximum over heads, summed over all queries, divided by the image's own maximum
    (never the batch's: an image must not depend on its batch-mates). Values: the maximum over heads,
    summed over channels, softmax over the body.
    """
    received = attended.weights.amax(dim=1)[:, :, prefix:].sum(dim=1)
    received = received / received.amax(dim=1, keepdim=True)
    magnitude = attended.values[:, :, prefix:].amax(dim=1).sum(dim=-1)
    return received + magnitude.softmax(dim=-1)


def best(score: Tensor, count: int) -> Tensor:
    """(B, M) scores to (B, count) indices of the largest, by one top-k in fp32."""
    return torch.topk(score.float(), count, dim=1).indices


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, M, C) at index (B, K) as (B, K, C): one Gather, over the flattened batch if there is one."""
    batch, count, channels = x.shape
    if batch == 1:
        return x.index_select(1, index.reshape(-1))
    index = index + torch.arange(batch, device=x.device)[:, None] * count
    flat = x.reshape(batch * count, channels).index_select(0, index.reshape(-1))
    return flat.reshape(batch, -1, channels)


def one_hot(index: Tensor, count: int, prefix: int = 0) -> Tensor:
    """Indices (B, M, 1) of `count - prefix` places to (B, M, count) booleans, by comparison: no scatter.

    The first `prefix` columns are no place and stay False.
    """
    places = [-1] * prefix + list(range(count - prefix))
    return index == torch.tensor(places, device=index.device)

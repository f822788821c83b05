"""Scores and gathers that reducers share. The body is all tokens except the prefix; it has M tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.vit.tokens import Attended


def cls_score(attended: Attended, prefix: int) -> Tensor:
    """(B, M) attention to the body, mean over heads: from the first prefix token, without a prefix from all queries.

    The first prefix token is CLS, or a register where there is no CLS.
    """
    if prefix:
        return attended.weights[:, :, 0, prefix:].mean(dim=1)
    return attended.weights.mean(dim=1).mean(dim=1)


def pomt_score(attended: Attended, prefix: int) -> Tensor:
    """(B, M) importance by POMT (arXiv 2407.05941, sec. 3): attention received plus value magnitude.

    Attention: the maximum over heads, summed over all queries, divided by the image's own maximum
    (not the batch's: an image must not depend on the others in its batch). Values: the maximum over heads,
    summed over channels, softmax over the body.
    """
    received = attended.weights.amax(dim=1)[:, :, prefix:].sum(dim=1)
    received = received / received.amax(dim=1, keepdim=True)
    magnitude = attended.values[:, :, prefix:].amax(dim=1).sum(dim=-1)
    return received + magnitude.softmax(dim=-1)


def best(score: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the largest scores (B, M), by one top-k in fp32."""
    return torch.topk(score.float(), count, dim=1).indices


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, C) of x (B, M, C) at index (B, K): one Gather, over the flattened batch if B > 1."""
    batch, count, channels = x.shape
    if batch == 1:
        return x.index_select(1, index.reshape(-1))
    index = index + torch.arange(batch, device=x.device)[:, None] * count
    flat = x.reshape(batch * count, channels).index_select(0, index.reshape(-1))
    return flat.reshape(batch, -1, channels)


def and_a_mean(index: Tensor, body: Tensor) -> Tensor:
    """(B, K + 1): the indices (B, K) in the body (B, M, C), then M for a mean of the others, which has no place."""
    mean = torch.full((len(body), 1), body.shape[1], device=body.device)
    return torch.cat([index, mean], dim=1) if index.shape[1] else mean


def one_hot(index: Tensor, count: int, prefix: int = 0) -> Tensor:
    """One-hot booleans (B, M, count) of indices (B, M, 1) below `count - prefix`, by comparison instead of scatter.

    The first `prefix` columns are for no index and stay False.
    """
    places = [-1] * prefix + list(range(count - prefix))
    return index == torch.tensor(places, device=index.device)

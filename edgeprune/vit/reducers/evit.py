"""evit: best tokens by CLS attention plus one that fuses the rest (EViT, arXiv 2202.07800, sec. 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.vit.reducers.common import and_a_mean, best, cls_score, take
from edgeprune.vit.tokens import Attended, Reduced

FAINT = 1e-7  # in fp32 in every precision; added so that tokens without attention give a plain mean, not 0 / 0


def evit(x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> Reduced:
    """(B, N, C) to (B, keep, C): prefix, the keep - prefix - 1 best, and the score-weighted mean of the rest.

    EViT's sum is divided by the sum of its weights, because without training the fused token must have the scale of
    the others. It is not computed as all minus kept: the rest has too little attention for that to be accurate.
    """
    body = x[:, prefix:]
    count = keep - prefix - 1
    score = cls_score(attended, prefix)
    order = best(score, body.shape[1])
    ranked, weight = take(body, order), take(score[..., None], order)
    rest, weight = ranked[:, count:], weight[:, count:]
    weight = weight / weight.amax(dim=1, keepdim=True).clamp(min=FAINT) + FAINT
    fused = (weight * rest).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
    return Reduced(
        torch.cat([x[:, :prefix], ranked[:, :count], fused], dim=1), None, lambda: and_a_mean(order[:, :count], body)
    )

"""evit: best tokens by CLS attention plus one that fuses the rest (EViT, arXiv 2202.07800, sec. 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.reducers.common import best, cls_score, take
from edgeprune.tokens import Attended


def evit(x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> tuple[Tensor, Tensor | None]:
    """(B, N, C) to (B, keep, C): prefix, the keep - prefix - 1 best, and the score-weighted mean of the rest.

    EViT's sum is divided by the sum of its weights: without training the token must keep the scale of
    the others. Taken by subtraction, as all less kept.
    """
    body = x[:, prefix:]
    count = keep - prefix - 1
    score = cls_score(attended, prefix)
    index = best(score, count) if count else None
    kept = take(body, index) if index is not None else body[:, :0]
    kept_score = take(score[..., None], index) if index is not None else score[:, :0, None]
    rest = (score[:, None] @ body) - (kept * kept_score).sum(dim=1, keepdim=True)
    weight = score.sum(dim=1)[:, None, None] - kept_score.sum(dim=1, keepdim=True)
    return torch.cat([x[:, :prefix], kept, rest / weight], dim=1), None

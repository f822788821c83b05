"""topk: keep the tokens the CLS token attends to most, drop the rest (the pruning step of EViT)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.vit.reducers.common import best, cls_score, take
from edgeprune.vit.tokens import Attended, Reduced


def topk(x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> Reduced:
    """(B, N, C) to (B, keep, C): prefix, then the keep - prefix best by CLS attention."""
    index = best(cls_score(attended, prefix), keep - prefix)
    return Reduced(torch.cat([x[:, :prefix], take(x[:, prefix:], index)], dim=1), None, lambda: index)

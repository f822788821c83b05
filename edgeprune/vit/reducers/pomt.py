"""pomt: "Pruning One More Token is Enough" (arXiv 2407.05941, sec. 3): best tokens plus one mean."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.vit.reducers.common import and_a_mean, best, pomt_score, take
from edgeprune.vit.tokens import Attended, Reduced


def pomt(x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> Reduced:
    """(B, N, C) to (B, keep, C): prefix, the keep - prefix - 1 best, and the mean of all others.

    The mean is computed from the sum of all minus the sum of the kept tokens, so that only the kept are gathered.
    """
    body = x[:, prefix:]
    count = keep - prefix - 1
    index = best(pomt_score(attended, prefix), count) if count else body[:, :0, 0].long()
    kept = take(body, index) if count else body[:, :0]
    rest = body.sum(dim=1, keepdim=True) - kept.sum(dim=1, keepdim=True)
    mean = rest / (body.shape[1] - count)
    return Reduced(torch.cat([x[:, :prefix], kept, mean], dim=1), None, lambda: and_a_mean(index, body))

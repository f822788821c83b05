"""fold: keep the tokens that attention looks at and fold every other into the kept one most like it."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.reducers.common import best, one_hot, take
from edgeprune.tokens import Attended


def fold(x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> tuple[Tensor, Tensor | None]:
    """(B, N, C) to (B, keep, C) and sizes (B, keep): prefix, then the keep - prefix best, nothing thrown away.

    Likeness is the cosine of the tokens themselves; the folded token is the mean weighted by size. One
    sort parts kept from others, so that only others are compared with kept and only they are multiplied:
    no scatter, and a kept token needs no likeness to itself. Sizes make later attention proportional.
    """
    body = x[:, prefix:]
    count = keep - prefix
    order = best(attention_received(attended, prefix), body.shape[1])
    body = take(body, order)
    kept, others = body[:, :count], body[:, count:]
    # The likeness is compared for one token over all kept, so that token's own length does not matter.
    towards = kept / kept.norm(dim=-1, keepdim=True)
    into = one_hot((others @ towards.transpose(1, 2)).argmax(dim=-1), count).to(x.dtype)
    if sizes is None:
        mass = torch.ones_like(x[:, prefix:, :1])
        weights = torch.ones_like(x[:, :, 0])
    else:
        mass = take(sizes[:, prefix:, None], order)
        weights = sizes
        kept, others = kept * mass[:, :count], others * mass[:, count:]
    gathered = into.transpose(1, 2)
    total = mass[:, :count] + gathered @ mass[:, count:]
    folded = (kept + gathered @ others) / total
    out = torch.cat([x[:, :prefix], folded], dim=1)
    return out, torch.cat([weights[:, :prefix], total[..., 0]], dim=1)


def attention_received(attended: Attended, prefix: int) -> Tensor:
    """(B, M) attention that each body token receives: from the mean query plus, where there is one, from CLS.

    One product of a constant row with the weights, summed over heads: on a CPU POMT's maximum over heads
    costs 4 % of ViT-Tiny, this a tenth of that (docs/benchmarks.md).
    """
    queries = attended.weights.shape[2]
    share = [1 / queries] * queries
    if prefix:
        share[0] += 1
    row = torch.tensor([share], dtype=attended.weights.dtype, device=attended.weights.device)
    return (row @ attended.weights).sum(dim=1)[:, 0, prefix:]

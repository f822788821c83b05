"""fold: keep the tokens that attention looks at and fold every other into the kept one most like it."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.vit.reducers.common import best, one_hot, take
from edgeprune.vit.tokens import Attended


def fold(x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> tuple[Tensor, Tensor | None]:
    """(B, N, C) to (B, keep, C) and sizes (B, keep): prefix, then the keep - prefix best, nothing thrown away.

    Likeness is the cosine of the tokens themselves; the folded token is the mean weighted by size. One
    sort parts kept from others, so that only others are compared with kept and only they are multiplied:
    no scatter, and a kept token needs no likeness to itself. The prefix is sorted first and nothing is
    folded into it. Sizes make later attention proportional.
    """
    order = best(attention_received(attended, prefix), x.shape[1])
    ranked = take(x, order)
    kept, others = ranked[:, :keep], ranked[:, keep:]
    # The likeness is compared for one token over all kept, so that token's own length does not matter.
    towards = kept[:, prefix:] / kept[:, prefix:].norm(dim=-1, keepdim=True)
    closest = (others @ towards.transpose(1, 2)).argmax(dim=-1, keepdim=True)
    gathered = one_hot(closest, keep, prefix).to(x.dtype).transpose(1, 2)
    mass = torch.ones_like(x[:, :, :1]) if sizes is None else take(sizes[..., None], order)
    if sizes is not None:
        kept, others = kept * mass[:, :keep], others * mass[:, keep:]
    total = mass[:, :keep] + gathered @ mass[:, keep:]
    return (kept + gathered @ others) / total, total[..., 0]


def attention_received(attended: Attended, prefix: int) -> Tensor:
    """(B, N) attention that each token receives: from the mean query plus, where there is one, from CLS.

    Means over heads, at most 2; prefix tokens are put above all others, in their order. One product of a
    constant row with the weights is cheaper than POMT's maximum over heads and keeps no less
    (docs/benchmarks.md).
    """
    weights = attended.weights
    queries = weights.shape[2]
    share, above = [1 / queries] * queries, [0.0] * queries
    for token in range(prefix):
        share[token] += 1 if token == 0 else 0
        above[token] = 4.0 * (prefix - token)
    row = torch.tensor([share], dtype=weights.dtype, device=weights.device)
    return (row @ weights).mean(dim=(1, 2)) + torch.tensor(above, dtype=weights.dtype, device=weights.device)

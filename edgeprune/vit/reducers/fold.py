"""fold: keep the tokens that receive most attention and fold every other into the most similar kept one."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.vit.reducers.common import best, one_hot, take
from edgeprune.vit.tokens import Attended, Reduced


def fold(x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> Reduced:
    """(B, N, C) to (B, keep, C) and sizes (B, keep): the prefix, then the keep - prefix best; nothing is dropped.

    Similarity is the cosine of the tokens themselves; a folded token is the mean weighted by size. One sort
    separates kept tokens from others, so that only the others are compared with the kept ones and gathered by a
    matmul, without scatter. The prefix is sorted first and nothing is folded into it. Sizes make later attention
    proportional.
    """
    order = best(attention_received(attended, prefix), x.shape[1])
    ranked = take(x, order)
    kept, others = ranked[:, :keep], ranked[:, keep:]
    # For each token only its similarities to kept ones are compared, so its own length does not matter.
    towards = kept[:, prefix:] / kept[:, prefix:].norm(dim=-1, keepdim=True)
    closest = (others @ towards.transpose(1, 2)).argmax(dim=-1, keepdim=True)
    gathered = one_hot(closest, keep, prefix).to(x.dtype).transpose(1, 2)
    mass = torch.ones_like(x[:, :, :1]) if sizes is None else take(sizes[..., None], order)
    if sizes is not None:
        kept, others = kept * mass[:, :keep], others * mass[:, keep:]
    total = mass[:, :keep] + gathered @ mass[:, keep:]
    return Reduced((kept + gathered @ others) / total, total[..., 0], lambda: order[:, prefix:keep] - prefix)


def attention_received(attended: Attended, prefix: int) -> Tensor:
    """(B, N) attention that each token receives: from the mean query, plus that from CLS if there is one.

    Means over heads, at most 2; prefix tokens get higher scores than all others, in their order. One matmul of a
    constant row with the weights is cheaper than POMT's maximum over heads and gives the same fidelity or better
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

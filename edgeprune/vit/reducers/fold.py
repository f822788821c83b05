"""fold: keep tokens that are attended to and not redundant, and fold every other into the most similar kept one."""

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
    unit = x / x.norm(dim=-1, keepdim=True)
    similar = unit @ unit.transpose(1, 2)
    order = best(worth(similar, attended, prefix), x.shape[1])
    ranked = take(x, order)
    kept, others = ranked[:, :keep], ranked[:, keep:]
    to_kept = take(similar, order[:, prefix:keep]).transpose(1, 2)  # (B, N, keep - prefix)
    closest = take(to_kept, order[:, keep:]).argmax(dim=-1, keepdim=True)
    gathered = one_hot(closest, keep, prefix).to(x.dtype).transpose(1, 2)
    mass = torch.ones_like(x[:, :, :1]) if sizes is None else take(sizes[..., None], order)
    if sizes is not None:
        kept, others = kept * mass[:, :keep], others * mass[:, keep:]
    total = mass[:, :keep] + gathered @ mass[:, keep:]
    return Reduced((kept + gathered @ others) / total, total[..., 0], lambda: order[:, prefix:keep] - prefix)


def worth(similar: Tensor, attended: Attended, prefix: int) -> Tensor:
    """(B, N) attention that each token receives times its distance to the nearest token that receives more.

    A token is worth keeping if it matters and no token that matters more can stand for it. Density peaks (Rodriguez
    and Laio, Science 344, 2014) choose the centres of clusters in the same way, by the product of a density and the
    distance to the nearest point of higher density. The distance is 1 - cosine, at most 1; `similar` (B, N, N) has
    the cosines. Prefix tokens are worth more than all others, in their order, and stand for none.
    """
    count = similar.shape[1]
    received = attention_received(attended, prefix)
    above = torch.tensor(
        [4.0 * max(prefix - i, 0) for i in range(count)], dtype=received.dtype, device=received.device
    )
    rank = received - above  # prefix tokens below all others, so that they are near to none
    more = (rank[:, None, :] > rank[:, :, None]).to(similar.dtype)
    nearest = (similar * more).amax(dim=-1)
    return received - received * nearest + above


def attention_received(attended: Attended, prefix: int) -> Tensor:
    """(B, N) attention that each token receives: from the mean query, plus that from the first prefix token if any.

    That token is CLS, or a register where there is no CLS. Means over heads, at most 2. One matmul of a constant row
    with the weights is cheaper than POMT's maximum over heads and gives the same fidelity or better
    (docs/benchmarks.md).
    """
    weights = attended.weights
    queries = weights.shape[2]
    share = [1 / queries] * queries
    if prefix:
        share[0] += 1
    row = torch.tensor([share], dtype=weights.dtype, device=weights.device)
    received: Tensor = (row @ weights).mean(dim=(1, 2))
    return received

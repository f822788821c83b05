"""tome: Token Merging (arXiv 2210.09461), bipartite soft matching on keys, implemented from the paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.vit.reducers.common import best, one_hot, take
from edgeprune.vit.tokens import Attended, Reduced


def tome(x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> Reduced:
    """(B, N, C) to (B, keep, C) and sizes (B, keep); prefix tokens are never merged.

    One round (sec. 3): the body is split alternately into two sets; for every token of one set the most similar of
    the other is found, by the cosine of their keys averaged over heads; the most similar pairs are merged into means
    weighted by size. A round can remove up to half of the body, so larger cuts take several rounds.
    """
    if sizes is None:
        sizes = torch.ones_like(x[:, :, 0])
    metric = attended.keys.mean(dim=1)[:, prefix:]
    head, body, mass = x[:, :prefix], x[:, prefix:], sizes[:, prefix:, None]
    orders = []
    while body.shape[1] > keep - prefix:
        merged = min(body.shape[1] - (keep - prefix), body.shape[1] // 2)
        body, mass, metric, order = _round(body, mass, metric, merged)
        orders.append((order, merged))
    left, sizes = torch.cat([head, body], dim=1), torch.cat([sizes[:, :prefix], mass[..., 0]], dim=1)
    return Reduced(left, sizes, lambda: _kept(x.shape[1] - prefix, orders))


def _kept(count: int, orders: Sequence[tuple[Tensor, int]]) -> Tensor:
    """(B, K): which of `count` body tokens are left after rounds; a merged token has the place of the even one."""
    first = orders[0][0]
    kept = torch.arange(count, device=first.device).expand(len(first), -1)
    for order, merged in orders:
        kept = torch.cat([kept[:, 0::2], take(kept[:, 1::2, None], order[:, merged:])[..., 0]], dim=1)
    return kept


def _round(body: Tensor, mass: Tensor, metric: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge `merged` tokens of the odd set into the even set; body (B, M, C), mass (B, M, 1), metric (B, M, D).

    The last result is the order in which the odd ones are merged.
    """
    unit = metric / metric.norm(dim=-1, keepdim=True)
    similarity = unit[:, 1::2] @ unit[:, 0::2].transpose(1, 2)
    closest = similarity.amax(dim=-1)
    order = best(closest, closest.shape[1])
    place = take(similarity, order[:, :merged]).argmax(dim=-1, keepdim=True)
    into = one_hot(place, similarity.shape[2]).to(body.dtype)
    gathered = into.transpose(1, 2)

    def mean(values: Tensor) -> Tensor:
        odd, weight = take(values[:, 1::2], order), take(mass[:, 1::2], order)
        even = values[:, 0::2] * mass[:, 0::2] + gathered @ (odd[:, :merged] * weight[:, :merged])
        return torch.cat([even / total, odd[:, merged:]], dim=1)

    weight = take(mass[:, 1::2], order)
    total = mass[:, 0::2] + gathered @ weight[:, :merged]
    return mean(body), torch.cat([total, weight[:, merged:]], dim=1), mean(metric), order

"""Schedules of the baselines in the shapes that their authors published."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from edgeprune.latency.staircase import predict_ms
from edgeprune.records import Schedule, Staircase, Vit
from edgeprune.scheduling.goals import finished, impossible, single_cut
from edgeprune.scheduling.paper import PAPER_BLOCK


def published_shapes(vit: Vit, method: str, prefix_last: bool = False) -> Iterator[tuple[int, ...]]:
    """The schedules of a baseline in its authors' shape, from the weakest pruning to the strongest.

    pomt: one cut in block 3 (arXiv 2407.05941, sec. 4). evit: the same keep rate in blocks 3, 6 and 9 of 12, each
    with one fused token (arXiv 2202.07800, sec. 4). tome, topk: the same number of tokens removed in every block
    (arXiv 2210.09461, sec. 3). Yields nothing for a method without a published shape, and for a model with too few
    blocks for it.
    """
    body, last = vit.tokens - vit.prefix, vit.depth - 1 if prefix_last else vit.depth
    if method == "pomt":
        for n in range(vit.tokens - 1, vit.prefix + 1, -1) if last > PAPER_BLOCK else ():
            yield single_cut(vit, PAPER_BLOCK, n)
    elif method == "evit":
        quarters = {block for block in (vit.depth // 4, vit.depth // 2, 3 * vit.depth // 4) if block < last}
        for percent in range(99, 4, -1) if quarters else ():
            tokens, current = [], vit.tokens
            for block in range(vit.depth):
                if block in quarters:
                    left = ceil((current - vit.prefix) * percent / 100)
                    current = min(current, vit.prefix + max(left, 1) + 1)
                tokens.append(current)
            yield tuple(tokens)
    elif method in ("tome", "topk"):
        for less in range(1, body):
            lowest = vit.prefix + 2
            yield tuple(max(vit.tokens - less * min(block + 1, last), lowest) for block in range(vit.depth))


def published_schedule(
    staircase: Staircase, method: str, limit_ms: float, prefix_last: bool = False
) -> Schedule | None:
    """The weakest pruning in the published shape that is predicted to take at most `limit_ms`.

    None for a method without a published shape. Raises ScheduleError where no schedule of that shape is fast enough.
    """
    best = float("inf")
    for tokens in published_shapes(staircase.vit, method, prefix_last):
        cost = predict_ms(staircase, tokens, method, prefix_last)
        if cost <= limit_ms:
            return finished(staircase, method, "published", tokens, prefix_last)
        best = min(best, cost)
    if best < float("inf"):
        raise impossible(limit_ms, staircase, best, method)
    return None

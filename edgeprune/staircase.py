"""Latency over token counts: where the treads are, and what a schedule will cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.measure import Samples
from edgeprune.records import (
    CutCost,
    LastShare,
    Latency,
    Point,
    Setup,
    Staircase,
    Vit,
)

MANY = 2.6  # z of one comparison among some thirty: a flat curve then shows a step in one of twenty cases


def staircase_from_samples(vit: Vit, setup: Setup, samples: Samples) -> Staircase:
    """The record of what was timed: "trunk N", "fixed", "dense", "block N", "last N", "cut METHOD a>b"; ms."""
    latency = {name: Latency(samples_ms=tuple(v)) for name, v in samples.items() if v}
    counts = sorted(int(name.split()[1]) for name in latency if name.startswith("trunk "))
    return Staircase(
        vit=vit,
        setup=setup,
        fixed=latency["fixed"],
        dense=latency["dense"],
        points=tuple(Point(tokens=n, latency=latency[f"trunk {n}"]) for n in counts),
        cuts=_cut_costs(vit, samples),
        last=_last_shares(samples),
    )


def _last_shares(samples: Samples) -> tuple[LastShare, ...]:
    """The last block for the prefix alone against the whole block, by the median ratio per round."""
    shares = []
    for name, last in samples.items():
        if name.startswith("last "):
            tokens = name.split()[1]
            ratios = [a / b for a, b in zip(last, samples[f"block {tokens}"], strict=False)]
            shares.append(LastShare(tokens=int(tokens), share=float(np.median(ratios))))
    return tuple(sorted(shares, key=lambda s: s.tokens))


def _cut_costs(vit: Vit, samples: Samples) -> dict[str, tuple[CutCost, ...]]:
    """What each measured cut adds to its block, from the medians of the differences per round."""
    costs: dict[str, tuple[CutCost, ...]] = {}
    for name, cut in samples.items():
        if not name.startswith("cut "):
            continue
        _, method, pair = name.split()
        entering, leaving = map(int, pair.split(">"))
        share = attention_share(vit, entering)
        full, less = samples[f"block {entering}"], samples[f"block {leaving}"]
        added = [c - share * f - (1 - share) * s for c, f, s in zip(cut, full, less, strict=False)]
        cost = CutCost(tokens_in=entering, tokens_out=leaving, cost_ms=float(np.median(added)))
        costs[method] = (*costs.get(method, ()), cost)
    return costs


def exceeds(high: Latency, low: Latency) -> bool:
    """Is `high` slower than `low` beyond what their noise explains?

    Of equally many samples, taken in the same rounds, the differences per round must lie above zero by
    Wilcoxon's signed-rank test (where they are all the same, there is no noise to test against); of others,
    the intervals of the medians must not touch.
    """
    a, b = np.array(high.samples_ms), np.array(low.samples_ms)
    if len(a) != len(b):
        return high.interval_ms[0] > low.interval_ms[1]
    differences = a - b
    constant = differences.min() == differences.max() > 0
    return bool(constant or signed_rank(differences) > MANY)


def signed_rank(differences: NDArray[np.float64]) -> float:
    """Wilcoxon's signed-rank statistic as a z value: how far paired differences lean above zero.

    Twice as sharp as the sign test on timings, whose differences between two candidates are symmetric.
    """
    differences = differences[differences != 0]
    n = len(differences)
    if n == 0:
        return 0.0
    ranks = np.abs(differences).argsort().argsort() + 1
    above = ranks[differences > 0].sum()
    return float((above - n * (n + 1) / 4) / (n * (n + 1) * (2 * n + 1) / 24) ** 0.5)


def treads(staircase: Staircase) -> tuple[int, ...]:
    """Right ends of the treads, ascending: the most tokens for their latency.

    From the unpruned count down, a count opens a new tread when it is faster than the last tread's end
    beyond their noise: fewer tokens that save nothing real are never candidates.
    """
    ends = [staircase.points[-1]]
    for point in reversed(staircase.points[:-1]):
        if exceeds(ends[-1].latency, point.latency):
            ends.append(point)
    return tuple(p.tokens for p in reversed(ends))


def snap(staircase: Staircase, tokens: int) -> int:
    """The tread end at or below `tokens`, or the lowest tread: never dearer, and mostly free tokens."""
    ends = treads(staircase)
    return max((n for n in ends if n <= tokens), default=ends[0])


def trunk_ms(staircase: Staircase, tokens: float) -> float:
    """Median of the whole trunk at `tokens`, ms; between two probes on the straight line."""
    counts = [p.tokens for p in staircase.points]
    return float(np.interp(tokens, counts, [p.latency.median_ms for p in staircase.points]))


def attention_share(vit: Vit, tokens: int) -> float:
    """Share of a block's multiply-adds that lie before a cut (attention), the rest being the MLP."""
    inner = vit.heads * vit.head_dim
    attention = 4 * vit.width * inner + 2 * tokens * inner
    return attention / (attention + vit.mlp_matrices * vit.width * vit.mlp_width)


def additive_block_ms(staircase: Staircase, entering: int, leaving: int) -> float:
    """A block whose attention sees `entering` tokens and whose MLP sees `leaving`, ms, cut cost left out."""
    vit = staircase.vit
    share = attention_share(vit, entering)
    return (share * trunk_ms(staircase, entering) + (1 - share) * trunk_ms(staircase, leaving)) / vit.depth


def cut_cost_ms(costs: Sequence[CutCost], entering: int) -> float:
    """What a cut adds at `entering` tokens, on the line through the measured cuts; 0 without any."""
    if not costs:
        return 0.0
    ordered = sorted(costs, key=lambda c: c.tokens_in)
    xs, ys = [c.tokens_in for c in ordered], [c.cost_ms for c in ordered]
    return float(np.interp(entering, xs, ys))


def last_share(staircase: Staircase, tokens: float) -> float:
    """Latency of a last block that computes the prefix alone, as a share of the whole block; 1 if unknown."""
    if not staircase.last:
        return 1.0
    counts, shares = [s.tokens for s in staircase.last], [s.share for s in staircase.last]
    return float(np.interp(tokens, counts, shares))


def block_ms(staircase: Staircase, method: str, entering: int, leaving: int, prefix_alone: bool = False) -> float:
    """A block of the additive model, ms: attention at `entering`, MLP at `leaving`, the measured cost of a cut.

    With `prefix_alone` the block computes the prefix alone and counts with its measured share.
    """
    part = additive_block_ms(staircase, entering, leaving)
    if prefix_alone:
        part *= last_share(staircase, entering)
    return part + cut_cost_ms(staircase.cuts.get(method, ()), entering) if leaving < entering else part


def unit(staircase: Staircase) -> float:
    """Measured unpruned latency over the additive model's: 1 where that is exact."""
    whole = staircase.fixed.median_ms + trunk_ms(staircase, staircase.vit.tokens)
    return staircase.dense.median_ms / whole


def predict_ms(staircase: Staircase, tokens: Sequence[int], method: str, prefix_last: bool = False) -> float:
    """Latency of a schedule by the additive model, ms: fixed + sum over blocks (`block_ms`), times `unit`."""
    vit = staircase.vit
    total, entering = staircase.fixed.median_ms, vit.tokens
    for block, leaving in enumerate(tokens):
        total += block_ms(staircase, method, entering, leaving, prefix_last and block == vit.depth - 1)
        entering = leaving
    return total * unit(staircase)

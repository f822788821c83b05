"""Latency over token counts: where the treads are, and the predicted latency of a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edgeprune.records import Conditions, CutCost, LastShare, Latency, Point, Setup, Staircase, Vit
from edgeprune.stats import signed_rank

MANY = 2.6  # z per comparison: with about 30 comparisons a flat curve shows a step in 5 % of all cases


class SampleKey(NamedTuple):
    """What a latency sample of a staircase was measured on."""

    kind: str  # trunk | fixed (embedding and head) | dense (unpruned model) | block | last (prefix only) | cut
    tokens: tuple[int, ...] = ()  # of a trunk or block; (entering, leaving) of a cut
    method: str | None = None  # of a cut
    stage: int = 0  # of probing

    def __str__(self) -> str:
        counts = " > ".join(map(str, self.tokens))
        return " ".join(filter(None, (self.kind, self.method, counts and f"at {counts} tokens")))


Samples = dict[SampleKey, list[float]]  # ms
FIXED, DENSE = SampleKey("fixed"), SampleKey("dense")


def trunk(tokens: int) -> SampleKey:
    """All blocks at a constant token count."""
    return SampleKey("trunk", (tokens,))


def block(tokens: int) -> SampleKey:
    """One block at a constant token count."""
    return SampleKey("block", (tokens,))


def staircase_from_samples(
    vit: Vit, setup: Setup, samples: Mapping[SampleKey, Sequence[float]], conditions: Sequence[Conditions] = ()
) -> Staircase:
    """A staircase from samples (ms) that are all of one stage, and the conditions they were measured under."""
    latency = {key: Latency(samples_ms=tuple(v)) for key, v in samples.items() if v}
    counts = sorted(key.tokens[0] for key in latency if key.kind == "trunk")
    return Staircase(
        vit=vit,
        setup=setup,
        fixed=latency[FIXED],
        dense=latency[DENSE],
        points=tuple(Point(tokens=n, latency=latency[trunk(n)]) for n in counts),
        cuts=_cut_costs(vit, samples),
        last=_last_shares(samples),
        conditions=tuple(conditions),
    )


def _last_shares(samples: Mapping[SampleKey, Sequence[float]]) -> tuple[LastShare, ...]:
    """Latency of a last block that computes only the prefix, over that of a whole block: median ratio per round."""
    shares = []
    for key, last in samples.items():
        if key.kind == "last":
            (tokens,) = key.tokens
            ratios = [a / b for a, b in zip(last, samples[block(tokens)], strict=False)]
            shares.append(LastShare(tokens=tokens, share=float(np.median(ratios))))
    return tuple(sorted(shares, key=lambda s: s.tokens))


def _cut_costs(vit: Vit, samples: Mapping[SampleKey, Sequence[float]]) -> dict[str, tuple[CutCost, ...]]:
    """What each measured cut adds to its block, ms: the median of the differences per round."""
    costs: dict[str, tuple[CutCost, ...]] = {}
    for key, cut in samples.items():
        if key.kind != "cut" or key.method is None:
            continue
        entering, leaving = key.tokens
        share = attention_share(vit, entering)
        full, less = samples[block(entering)], samples[block(leaving)]
        added = [c - share * f - (1 - share) * s for c, f, s in zip(cut, full, less, strict=False)]
        cost = CutCost(tokens_in=entering, tokens_out=leaving, cost_ms=float(np.median(added)))
        costs[key.method] = (*costs.get(key.method, ()), cost)
    return costs


def exceeds(high: Latency, low: Latency, noiseless: bool = False) -> bool:
    """Is `high` slower than `low` by more than noise explains?

    With equally many samples, taken in the same rounds, the differences per round must be above zero by Wilcoxon's
    signed-rank test; otherwise the 95 % intervals of the medians must not overlap. Where latencies are `noiseless`
    (see Setup), any difference counts.
    """
    if noiseless:
        return high.median_ms > low.median_ms
    a, b = np.array(high.samples_ms), np.array(low.samples_ms)
    if len(a) != len(b):
        return high.interval_ms[0] > low.interval_ms[1]
    return signed_rank(a - b) > MANY


def treads(staircase: Staircase) -> tuple[int, ...]:
    """Right ends of the treads, ascending: the most tokens for their latency.

    From the unpruned count down, a count starts a new tread when it is faster than the end of the tread above by
    more than noise. So a count that removes tokens without a real saving is never a candidate.
    """
    ends = [staircase.points[-1]]
    for point in reversed(staircase.points[:-1]):
        if exceeds(ends[-1].latency, point.latency, staircase.setup.noiseless):
            ends.append(point)
    return tuple(p.tokens for p in reversed(ends))


def trunk_ms(staircase: Staircase, tokens: float) -> float:
    """Median latency of the whole trunk at `tokens`, ms, interpolated linearly between measured counts."""
    counts = [p.tokens for p in staircase.points]
    return float(np.interp(tokens, counts, [p.latency.median_ms for p in staircase.points]))


def attention_share(vit: Vit, tokens: int) -> float:
    """Share of a block's multiply-adds that come before a cut (attention); the rest is the MLP."""
    inner = vit.heads * vit.head_dim
    attention = 4 * vit.width * inner + 2 * tokens * inner
    return attention / (attention + vit.mlp_matrices * vit.width * vit.mlp_width)


def additive_block_ms(staircase: Staircase, entering: int, leaving: int) -> float:
    """A block with `entering` tokens in attention and `leaving` in the MLP, ms, without the cost of a cut."""
    vit = staircase.vit
    share = attention_share(vit, entering)
    return (share * trunk_ms(staircase, entering) + (1 - share) * trunk_ms(staircase, leaving)) / vit.depth


def cut_cost_ms(costs: Sequence[CutCost], entering: int) -> float:
    """What a cut adds at `entering` tokens, ms, interpolated between the measured cuts; 0 without any."""
    if not costs:
        return 0.0
    ordered = sorted(costs, key=lambda c: c.tokens_in)
    xs, ys = [c.tokens_in for c in ordered], [c.cost_ms for c in ordered]
    return float(np.interp(entering, xs, ys))


def last_share(staircase: Staircase, tokens: float) -> float:
    """Latency of a last block that computes only the prefix, as a share of the whole block; 1 if unknown."""
    if not staircase.last:
        return 1.0
    counts, shares = [s.tokens for s in staircase.last], [s.share for s in staircase.last]
    return float(np.interp(tokens, counts, shares))


def block_ms(staircase: Staircase, method: str, entering: int, leaving: int, prefix_only: bool = False) -> float:
    """A block in the additive model, ms: attention at `entering`, MLP at `leaving`, plus the measured cost of a cut.

    With `prefix_only` the block computes only the prefix tokens and counts with its measured share.
    """
    part = additive_block_ms(staircase, entering, leaving)
    if prefix_only:
        part *= last_share(staircase, entering)
    return part + cut_cost_ms(staircase.cuts.get(method, ()), entering) if leaving < entering else part


def unit(staircase: Staircase) -> float:
    """Measured unpruned latency over that of the additive model: 1 if the model is exact."""
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

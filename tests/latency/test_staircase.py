"""Staircases: treads of hand-made curves, and the additive model by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import wilcoxon
from support.records import SETUP

from edgeprune.latency.probing import coarse_counts
from edgeprune.latency.staircase import (
    DENSE,
    FIXED,
    SampleKey,
    Samples,
    block,
    exceeds,
    predict_ms,
    staircase_from_samples,
    treads,
    trunk,
    trunk_ms,
)
from edgeprune.records import CutCost, LastShare, Latency, Staircase, Vit
from edgeprune.stats import signed_rank

MakeVit = Callable[..., Vit]
MakeStaircase = Callable[..., Staircase]


def steps(tokens: int) -> float:
    """A staircase with the right ends 93 and 150."""
    return 10.0 + 3 * (tokens > 93) + 3 * (tokens > 150)


def test_flat_steps(make_staircase: MakeStaircase) -> None:
    points = {n: steps(n) for n in range(20, 198)}
    assert treads(make_staircase(points)) == (93, 150, 197)


def test_teeth(make_staircase: MakeStaircase) -> None:
    """165 and 141 are slower than more tokens: nobody should run them."""
    points = {141: 16.0, 144: 15.8, 160: 18.0, 165: 19.1, 176: 19.0, 192: 21.0, 197: 21.5}
    assert treads(make_staircase(points)) == (144, 160, 176, 192, 197)


def test_a_line_has_a_tread_at_every_point(make_staircase: MakeStaircase) -> None:
    assert treads(make_staircase({n: float(n) for n in (50, 60, 70)})) == (50, 60, 70)
    assert treads(make_staircase({n: -float(n) + 100 for n in (50, 60, 70)})) == (70,)


def test_noise_makes_few_treads_on_a_flat_curve(make_staircase: MakeStaircase, make_vit: MakeVit) -> None:
    clean = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        points = {n: 10 * (1 + 0.03 * rng.standard_normal(15)) for n in coarse_counts(make_vit())}
        clean += treads(make_staircase(points)) == (197,)
    assert clean >= 95


def test_a_step_is_seen_through_noise_and_drift(make_staircase: MakeStaircase, make_vit: MakeVit) -> None:
    """Drift of 10 % during the rounds hits all counts alike and cancels."""
    drift = np.linspace(1.0, 1.1, 15)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        points = {n: steps(n) * drift * (1 + 0.01 * rng.standard_normal(15)) for n in coarse_counts(make_vit())}
        found = treads(make_staircase(points))
        assert {80, 144, 197} <= set(found), found


def test_a_few_samples_are_no_step() -> None:
    """Eight rounds that all point one way happen by chance once in 256 pairs: too often for thirty of them."""
    fast = (1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07, 1.08)
    slow = tuple(ms + 0.01 * index for index, ms in enumerate(fast, 1))
    assert exceeds(Latency(samples_ms=slow), Latency(samples_ms=fast))
    assert not exceeds(Latency(samples_ms=slow[:8]), Latency(samples_ms=fast[:8]))
    assert not exceeds(Latency(samples_ms=(1.1, 1.3)), Latency(samples_ms=(1.0, 1.1)))


def test_only_the_runtime_says_that_there_is_no_noise() -> None:
    """One sample each is no proof of a step, unless latencies are computed."""
    slow, fast = Latency(samples_ms=(1.1,)), Latency(samples_ms=(1.0,))
    assert exceeds(slow, fast, noiseless=True) and not exceeds(fast, slow, noiseless=True)
    assert not exceeds(slow, fast)


@pytest.mark.parametrize(
    "gains", [[1.0] * 14 + [-1.0] * 4, [0.5, 0.5, 0.0, -0.5, 1.0, 2.0, 2.0, -2.0, 3.0, 0.1, 0.1]]
)
def test_signed_rank_is_scipys(gains: list[float]) -> None:
    """In every order: ties share their ranks."""
    for seed in range(5):
        differences = np.random.default_rng(seed).permutation(gains)
        oracle = wilcoxon(
            differences, zero_method="wilcox", correction=False, method="asymptotic", alternative="greater"
        )
        assert signed_rank(differences) == pytest.approx(oracle.zstatistic)


def test_exceeds_without_equal_rounds_compares_intervals() -> None:
    low, near = Latency(samples_ms=(1.0, 1.1, 1.2)), Latency(samples_ms=(1.15, 1.3, 1.4, 1.5))
    assert not exceeds(near, low)
    assert exceeds(Latency(samples_ms=(1.25, 1.3, 1.4, 1.5)), low)
    assert not exceeds(low, low)


def by_hand(make_vit: MakeVit, make_staircase: MakeStaircase, **fields: object) -> Staircase:
    """Three blocks; attention is 2/3 of a block at 8 tokens, 3/5 at 4; the trunk takes 12 and 6 ms."""
    vit = make_vit(depth=3, width=4, heads=1, head_dim=4, mlp_width=8, tokens=8)
    return make_staircase({4: 6.0, 8: 12.0}, fixed=1.0, vit=vit, **fields)


def test_predicted_latency_by_hand(make_vit: MakeVit, make_staircase: MakeStaircase) -> None:
    plain = by_hand(make_vit, make_staircase)
    assert predict_ms(plain, (8, 8, 8), "pomt") == pytest.approx(13)
    # block 0: 12/3; block 1: 2/3 of 12/3 and 1/3 of 6/3; block 2: 6/3
    assert predict_ms(plain, (8, 4, 4), "pomt") == pytest.approx(1 + 4 + (8 / 3 + 2 / 3) + 2)
    # block 1: attention at 8, MLP at 6 tokens, where the trunk takes 9 ms; block 2: 64+48 of 176
    share = (64 + 48) / (64 + 48 + 64)
    wanted = 1 + 4 + (8 / 3 + 1) + (share * 3 + (1 - share) * 2)
    assert predict_ms(plain, (8, 6, 4), "pomt") == pytest.approx(wanted)


def test_predicted_latency_with_the_cost_of_cuts(make_vit: MakeVit, make_staircase: MakeStaircase) -> None:
    cuts = tuple(CutCost(tokens_in=n, tokens_out=n - 2, cost_ms=ms) for n, ms in ((8, 0.5), (4, 0.1)))
    costly = by_hand(make_vit, make_staircase, cuts={"pomt": cuts})
    plain = by_hand(make_vit, make_staircase)
    for tokens, cost in {(8, 8, 8): 0.0, (8, 4, 4): 0.5, (6, 6, 5): 0.8, (8, 3, 2): 0.5 + 0.1}.items():
        assert predict_ms(costly, tokens, "pomt") - predict_ms(plain, tokens, "pomt") == pytest.approx(cost)
        assert predict_ms(costly, tokens, "topk") == predict_ms(plain, tokens, "topk")


def test_predicted_latency_is_scaled_to_the_whole_model(make_vit: MakeVit, make_staircase: MakeStaircase) -> None:
    twice = by_hand(make_vit, make_staircase, dense=26.0)
    plain = by_hand(make_vit, make_staircase)
    for tokens in ((8, 8, 8), (8, 4, 4)):
        assert predict_ms(twice, tokens, "pomt") == pytest.approx(2 * predict_ms(plain, tokens, "pomt"))


def test_predicted_latency_of_a_last_block_for_the_prefix(make_vit: MakeVit, make_staircase: MakeStaircase) -> None:
    shares = (LastShare(tokens=4, share=0.5), LastShare(tokens=8, share=0.3))
    known = by_hand(make_vit, make_staircase, last=shares)
    assert predict_ms(known, (8, 8, 8), "pomt", True) == pytest.approx(1 + 4 + 4 + 0.3 * 4)
    assert predict_ms(known, (8, 4, 4), "pomt", True) == pytest.approx(1 + 4 + 10 / 3 + 0.5 * 2)
    assert predict_ms(known, (6, 6, 6), "pomt", True) == pytest.approx(1 + (8 / 3 + 1) + 3 + 0.4 * 3)
    assert predict_ms(known, (8, 8, 8), "pomt") == pytest.approx(13)


def test_costs_come_from_differences_per_round(make_vit: MakeVit) -> None:
    """cut = share of the block at 118 tokens in, the rest at 71 out, and 0.4 ms; last = a quarter of a block."""
    vit = make_vit()
    width, attention, mlp = 192, 4 * 192 * 192 + 2 * 118 * 192, 2 * 192 * 768
    share = attention / (attention + mlp)
    assert width == vit.width
    blocks = {118: 2.0, 71: 1.0}
    samples: Samples = {FIXED: [1.0] * 2, DENSE: [9.0] * 2, trunk(197): [8.0] * 2}
    samples |= {block(n): [ms, 1.5 * ms] for n, ms in blocks.items()}
    samples |= {SampleKey("last", (n,)): [ms / 4, 1.5 * ms / 4] for n, ms in blocks.items()}
    samples[SampleKey("cut", (118, 71), "pomt")] = [drift * (share * 2 + (1 - share) * 1) + 0.4 for drift in (1, 1.5)]
    found = staircase_from_samples(vit, SETUP, samples)
    (cut,) = found.cuts["pomt"]
    assert (cut.tokens_in, cut.tokens_out) == (118, 71) and cut.cost_ms == pytest.approx(0.4)
    assert found.last == (LastShare(tokens=71, share=0.25), LastShare(tokens=118, share=0.25))


def test_between_two_points_on_the_straight_line(make_staircase: MakeStaircase) -> None:
    curve = make_staircase({100: 10.0, 150: 20.0, 197: 20.0})
    assert [trunk_ms(curve, n) for n in (90, 100, 125, 150, 180)] == [10, 10, 15, 20, 20]

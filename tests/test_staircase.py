"""Staircases: treads of hand-made curves, adaptive probing with counted calls, and the additive model by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType

import numpy as np
import pytest
from conftest import SETUP
from numpy.typing import NDArray

from edgeprune.measure import Open, Samples
from edgeprune.records import CutCost, LastShare, Latency, Staircase, Vit
from edgeprune.staircase import (
    all_counts,
    coarse_counts,
    exceeds,
    predict_ms,
    probe,
    snap,
    treads,
    trunk_ms,
)

MakeVit = Callable[..., Vit]
MakeStaircase = Callable[..., Staircase]


def steps(tokens: int) -> float:
    """A staircase with the right ends 93 and 150."""
    return 10.0 + 3 * (tokens > 93) + 3 * (tokens > 150)


def flat(tokens: int) -> float:
    return 10.0


class Machine:
    """Opens fake sessions whose time is a function of their name; counts what was opened and timed."""

    def __init__(self, curve: Callable[[int], float] = steps, stop_after: int | None = None) -> None:
        self.curve, self.stop_after = curve, stop_after
        self.opened: Counter[str] = Counter()
        self.timed: Counter[str] = Counter()
        self.open_now = 0

    def trunk(self, tokens: int) -> Open:
        return lambda: FakeSession(self, f"trunk {tokens}", self.curve(tokens))

    def other(self, name: str, ms: float) -> Open:
        return lambda: FakeSession(self, name, ms)

    def others(self) -> dict[str, Open]:
        return {"fixed": self.other("fixed", 1.0), "dense": self.other("dense", 1 + self.curve(197))}


class FakeSession:
    """What interleave times."""

    def __init__(self, machine: Machine, name: str, ms: float) -> None:
        self.machine, self.name, self.ms = machine, name, ms

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        raise AssertionError("a latency probe infers nothing")

    def time_ms(self) -> float:
        if self.machine.stop_after is not None and self.machine.timed.total() >= self.machine.stop_after:
            raise KeyboardInterrupt
        self.machine.timed[self.name] += 1
        return self.ms

    def __enter__(self) -> FakeSession:
        self.machine.opened[self.name] += 1
        self.machine.open_now += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.machine.open_now -= 1


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
        assert {88, 144, 197} <= set(found), found


def test_exceeds_without_equal_rounds_compares_intervals() -> None:
    low, near = Latency(samples_ms=(1.0, 1.1, 1.2)), Latency(samples_ms=(1.15, 1.3, 1.4, 1.5))
    assert not exceeds(near, low)
    assert exceeds(Latency(samples_ms=(1.25, 1.3, 1.4, 1.5)), low)
    assert not exceeds(low, low)


def test_counts_probed(make_vit: MakeVit) -> None:
    assert coarse_counts(make_vit()) == [*range(24, 193, 8), 197]
    assert all_counts(make_vit()) == list(range(20, 198))
    assert coarse_counts(make_vit(tokens=1025, prefix=5))[:2] == [120, 160]
    small = make_vit(tokens=9, prefix=5)
    assert coarse_counts(small) == [8, 9] and all_counts(small) == [7, 8, 9]
    for vit in (make_vit(tokens=2), make_vit(tokens=7, prefix=5)):
        assert coarse_counts(vit)[-1] == all_counts(vit)[-1] == vit.tokens


@pytest.mark.parametrize("keep_open", [True, False])
def test_probing_finds_the_edges_that_the_grid_misses(keep_open: bool, make_vit: MakeVit) -> None:
    machine = Machine()
    found, samples = probe(make_vit(), SETUP, machine.trunk, machine.others(), 3, keep_open=keep_open)
    assert treads(found) == (93, 150, 197)
    counts = [p.tokens for p in found.points]
    assert set(coarse_counts(make_vit())) < set(counts) and len(counts) < 35
    assert all(p.latency.samples_ms == (steps(p.tokens),) * 3 for p in found.points)
    assert (found.fixed.median_ms, found.dense.median_ms) == (1.0, 17.0)
    assert set(samples) == {"fixed", "dense", *(f"trunk {n}" for n in counts)}
    assert found.probes == 3 * len(counts)
    assert machine.open_now == 0


def test_exhaustive_probing_measures_every_count(make_vit: MakeVit) -> None:
    machine = Machine()
    found, _ = probe(make_vit(), SETUP, machine.trunk, machine.others(), 1, exhaustive=True)
    assert [p.tokens for p in found.points] == all_counts(make_vit())
    assert treads(found) == (93, 150, 197)


@pytest.mark.parametrize("curve", [flat, float])
def test_a_straight_curve_needs_no_more_than_the_grid(curve: Callable[[int], float], make_vit: MakeVit) -> None:
    machine = Machine(curve)
    found, _ = probe(make_vit(), SETUP, machine.trunk, machine.others(), 2)
    assert [p.tokens for p in found.points] == coarse_counts(make_vit())


@pytest.mark.parametrize("stop_after", [200, 333, 420])
def test_an_interrupted_probe_goes_on_where_it_stopped(stop_after: int, make_vit: MakeVit) -> None:
    """The grid's 25 candidates take 375 timings: 3 each to warm up, then 6 rounds of 2; the edges come after."""
    saved: list[Samples] = []
    first = Machine(stop_after=stop_after)
    samples: Samples = {}
    with pytest.raises(KeyboardInterrupt):
        probe(make_vit(), SETUP, first.trunk, first.others(), 6, samples=samples, save=lambda s: saved.append(s))
    assert first.open_now == 0 and saved
    had = {name: len(values) for name, values in samples.items()}
    second = Machine()
    found, samples = probe(make_vit(), SETUP, second.trunk, second.others(), 6, samples=samples)
    assert treads(found) == (93, 150, 197)
    assert all(len(values) == 6 for values in samples.values())
    for name, count in had.items():
        missing = 6 - count
        warm = 3 if missing else 0  # a warm-up, then an untimed run before each timed one
        assert second.timed[name] == warm + 2 * missing, name
        assert second.opened[name] == (1 if missing else 0)
    assert any(had.values())


def test_nothing_is_measured_where_all_is_known(make_vit: MakeVit) -> None:
    first, second = Machine(), Machine()
    one, samples = probe(make_vit(), SETUP, first.trunk, first.others(), 2)
    two, _ = probe(make_vit(), SETUP, second.trunk, second.others(), 2, samples=samples)
    assert one == two
    assert not second.opened and not second.timed


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
    machine = Machine()
    others = machine.others() | {f"block {n}": machine.other(f"block {n}", ms) for n, ms in blocks.items()}
    others["cut pomt 118>71"] = machine.other("cut", share * 2 + (1 - share) * 1 + 0.4)
    others |= {f"last {n}": machine.other(f"last {n}", ms / 4) for n, ms in blocks.items()}
    found, _ = probe(vit, SETUP, machine.trunk, others, 2)
    (cut,) = found.cuts["pomt"]
    assert (cut.tokens_in, cut.tokens_out) == (118, 71) and cut.cost_ms == pytest.approx(0.4)
    assert found.last == (LastShare(tokens=71, share=0.25), LastShare(tokens=118, share=0.25))


def test_between_two_points_on_the_straight_line(make_staircase: MakeStaircase) -> None:
    curve = make_staircase({100: 10.0, 150: 20.0, 197: 20.0})
    assert [trunk_ms(curve, n) for n in (90, 100, 125, 150, 180)] == [10, 10, 15, 20, 20]


def test_snap(make_staircase: MakeStaircase) -> None:
    points = make_staircase({n: steps(n) for n in range(20, 198)})
    assert {n: snap(points, n) for n in (197, 196, 150, 149, 93, 50)} == {
        197: 197,
        196: 150,
        150: 150,
        149: 93,
        93: 93,
        50: 93,
    }

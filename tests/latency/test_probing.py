"""Adaptive probing: counted calls, every simulated Jetson, recordings, injected noise, and its parts by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from types import TracebackType

import numpy as np
import profiling_cost as cost
import pytest
from numpy.typing import NDArray
from support.records import NOISELESS, SETUP

from edgeprune import devices
from edgeprune.latency.probing import (
    FEW,
    SHARE,
    SHARE_CONFIRMED,
    all_counts,
    coarse_counts,
    confirmed_edges,
    edge,
    joined,
    on_edges,
    probe,
    probe_requests,
    split,
    utility_prior,
)
from edgeprune.latency.staircase import DENSE, FIXED, SampleKey, Samples, treads, trunk
from edgeprune.latency.timing import UNLIMITED, Room
from edgeprune.records import ClassFidelity, Conditions, GpuState, Staircase, Vit
from edgeprune.runtimes.inference import Open
from edgeprune.scheduling.goals import Goal, choose
from edgeprune.scheduling.search import Search, Tokens

MakeVit = Callable[..., Vit]
MakeStaircase = Callable[..., Staircase]
GOALS = list(product(cost.ALPHAS, cost.ACCURACIES.values()))
JETSONS = [name for name in devices.names() if devices.load_device(name).simulation]


def steps(tokens: int) -> float:
    """A staircase with the right ends 93 and 150."""
    return 10.0 + 3 * (tokens > 93) + 3 * (tokens > 150)


def flat(tokens: int) -> float:
    return 10.0


class Machine:
    """Opens fake sessions whose time is a function of their name; counts what was opened and timed."""

    def __init__(self, curve: Callable[[int], float] = steps, stop_after: int | None = None) -> None:
        self.curve, self.stop_after = curve, stop_after
        self.opened: Counter[SampleKey] = Counter()
        self.timed: Counter[SampleKey] = Counter()
        self.open_now = 0

    def trunk(self, tokens: int) -> Open:
        return lambda: FakeSession(self, trunk(tokens), self.curve(tokens))

    def other(self, key: SampleKey, ms: float) -> Open:
        return lambda: FakeSession(self, key, ms)

    def others(self) -> dict[SampleKey, Open]:
        return {FIXED: self.other(FIXED, 1.0), DENSE: self.other(DENSE, 1 + self.curve(197))}


class FakeSession:
    """What interleave times."""

    def __init__(self, machine: Machine, key: SampleKey, ms: float) -> None:
        self.machine, self.key, self.ms = machine, key, ms

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        raise AssertionError("a latency probe infers nothing")

    def time_ms(self) -> float:
        if self.machine.stop_after is not None and self.machine.timed.total() >= self.machine.stop_after:
            raise KeyboardInterrupt
        self.machine.timed[self.key] += 1
        return self.ms

    def __enter__(self) -> FakeSession:
        self.machine.opened[self.key] += 1
        self.machine.open_now += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.machine.open_now -= 1


# --- what is probed ---


def test_counts_probed(make_vit: MakeVit) -> None:
    assert coarse_counts(make_vit()) == [20, *range(32, 193, 16), 197]
    assert all_counts(make_vit()) == list(range(20, 198))
    assert coarse_counts(make_vit(tokens=1025, prefix=5))[:3] == [102, 128, 192]
    small = make_vit(tokens=9, prefix=5)
    assert coarse_counts(small) == all_counts(small) == [7, 8, 9]
    for vit in (make_vit(tokens=2), make_vit(tokens=7, prefix=5)):
        assert coarse_counts(vit)[-1] == all_counts(vit)[-1] == vit.tokens


@pytest.mark.parametrize("room", [UNLIMITED, Room(total=0, guess=1)])
def test_probing_finds_the_edges_that_the_grid_misses(room: Room, make_vit: MakeVit) -> None:
    machine = Machine()
    found, samples = probe(make_vit(), NOISELESS, machine.trunk, machine.others(), 1, room=room)
    assert treads(found) == confirmed_edges(found) == (93, 150, 197)
    counts = [p.tokens for p in found.points]
    assert set(coarse_counts(make_vit())) < set(counts) and len(counts) <= SHARE * 178
    assert all(p.latency.samples_ms == (steps(p.tokens),) for p in found.points)
    assert (found.fixed.median_ms, found.dense.median_ms) == (1.0, 17.0)
    assert {key._replace(stage=0) for key in samples} == {FIXED, DENSE, *map(trunk, counts)}
    assert found.probes == len(counts)
    assert machine.open_now == 0


def test_exhaustive_probing_measures_every_count(make_vit: MakeVit) -> None:
    machine = Machine()
    found, samples = probe(make_vit(), SETUP, machine.trunk, machine.others(), FEW, exhaustive=True)
    assert [p.tokens for p in found.points] == all_counts(make_vit())
    assert treads(found) == (93, 150, 197)
    assert {len(ms) for ms in samples.values()} == {FEW}


def test_a_flat_curve_needs_no_more_than_the_grid(make_vit: MakeVit) -> None:
    machine = Machine(flat)
    found, _ = probe(make_vit(), NOISELESS, machine.trunk, machine.others(), 1)
    assert [p.tokens for p in found.points] == coarse_counts(make_vit())
    assert treads(found) == (197,)


def test_a_line_is_not_probed_beyond_the_share(make_vit: MakeVit) -> None:
    machine = Machine(float)
    found, _ = probe(make_vit(), NOISELESS, machine.trunk, machine.others(), 1)
    assert found.probes <= SHARE * len(all_counts(make_vit()))


def test_what_cannot_win_is_not_asked(make_vit: MakeVit, make_staircase: MakeStaircase) -> None:
    """alpha 0.5, A = n / 100. U(50) = 0.7, U(100) = 0.5; between them at best U(99) = 0.945, below 50 0.695."""
    vit = make_vit(tokens=100, prefix=1)
    prior = utility_prior(vit, [0.5], [float])
    gap = make_staircase({10: 1.0, 50: 1.0, 100: 10.0}, vit=vit)
    assert [request.counts for request in probe_requests(gap, prior, 1)] == [(64,)]
    settled_edge = make_staircase({10: 0.9, 50: 1.0, 51: 9.0, 100: 10.0}, vit=vit)
    assert not probe_requests(settled_edge, prior, 1)  # at best 0.5 * 0.91 + 0.5 * 0.49 below, 0.545 above


# --- resumed ---


@pytest.mark.parametrize("stop_after", [150, 250, 450])
def test_an_interrupted_probe_goes_on_where_it_stopped(
    stop_after: int, make_vit: MakeVit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid's 15 candidates take 180 timings: 3 each to warm up, then 9 rounds; the edges come after."""
    monkeypatch.setattr("edgeprune.latency.probing.WARMUP_MS", 0.0)
    saved: list[Samples] = []
    whole, _ = probe(make_vit(), SETUP, Machine().trunk, Machine().others(), 27)
    first = Machine(stop_after=stop_after)
    samples: Samples = {}
    with pytest.raises(KeyboardInterrupt):
        probe(make_vit(), SETUP, first.trunk, first.others(), 27, samples=samples, save=lambda s: saved.append(s))
    assert first.open_now == 0 and saved
    had = sum(map(len, samples.values()))
    second = Machine()
    found, samples = probe(make_vit(), SETUP, second.trunk, second.others(), 27, samples=samples)
    assert found == whole and {93, 150, 197} <= set(treads(found))
    assert all(len(values) == FEW for values in samples.values())
    timed = sum(second.timed.values()) - 3 * sum(second.opened.values())  # but for warm-up
    assert timed == sum(map(len, samples.values())) - had


def test_nothing_is_measured_where_all_is_known(make_vit: MakeVit) -> None:
    first, second = Machine(), Machine()
    one, samples = probe(make_vit(), SETUP, first.trunk, first.others(), 2)
    two, _ = probe(make_vit(), SETUP, second.trunk, second.others(), 2, samples=samples)
    assert one == two
    assert not second.opened and not second.timed


# --- against probing every count ---


@pytest.mark.parametrize("device", JETSONS)
def test_simulated_jetsons(device: str) -> None:
    """At most a fifth of the probes, within 1 % of the best utility, the chosen edge exact."""
    cases = [*product(cost.SHAPES[:1], cost.PRECISIONS, (1, 4)), (cost.SHAPES[1], "fp32", 16)]
    for vit, precision, batch in cases:
        source = cost.simulated(device, vit, precision, batch)
        for found in cost.outcomes(source, GOALS, cost.Machine()):
            assert found.share <= SHARE_CONFIRMED and found.regret <= 0.01 and found.exact, (source.setup, found)


@pytest.mark.parametrize("batch", [4, 8])
def test_all_edges_that_a_search_uses_are_exact(batch: int) -> None:
    """Many counts in one schedule; KL is made up: each block loses by the tokens it lacks, later ones less."""
    source = cost.simulated("orin-nx", cost.SHAPES[0], "fp16", batch)
    accuracy = cost.ACCURACIES["vit_tiny"]

    def kept(tokens: Tokens) -> ClassFidelity:
        lost = sum((1 - accuracy(n)) / (block + 1) for block, n in enumerate(tokens))
        return ClassFidelity(kl=lost, agreement=100.0)

    machine = cost.Machine()
    trunks = {n: machine.opener(ms) for n, ms in source.trunk.items()}
    others = {name: machine.opener(ms) for name, ms in source.others.items()}
    how = (source.vit, source.setup, trunks.__getitem__, others, 1)
    probed, samples = probe(*how)
    for speedup in (1.2, 1.6):
        search = Search(probed, "fold", lambda tokens, base: kept(tokens))
        goal = Goal(speedup=speedup)
        front = search.front(goal.limit_ms(probed.dense.median_ms))
        tokens = choose(front, probed, "fold", goal, lambda tokens: 0.0).tokens
        staircase, _ = probe(*how, samples={k: [*v] for k, v in samples.items()}, used=set(tokens))
        exact = on_edges(staircase, tokens)
        assert all(source.is_edge(n) for n in exact), exact
        assert staircase.probes <= SHARE_CONFIRMED * len(source.trunk)
        assert list(exact) == sorted(exact, reverse=True)


@pytest.mark.parametrize("source", list(cost.recordings()), ids=lambda source: source.vit.name)
def test_recordings(source: cost.Source) -> None:
    """Against what probing every count chooses; the median of a few seeds, samples being drawn from the recorded."""
    goals = [(alpha, cost.accuracy_of(source)) for alpha in cost.ALPHAS]
    found = [cost.outcomes(source, goals, cost.Machine(seed=seed), cost.ROUNDS) for seed in range(5)]
    for runs in zip(*found, strict=True):
        assert all(o.share <= SHARE_CONFIRMED and o.exact for o in runs), runs
        assert np.median([o.regret for o in runs]) <= 0.01, runs


# --- noise ---


@pytest.mark.parametrize("noise", cost.NOISES)
def test_injected_noise(noise: str) -> None:
    """A few of the hundred runs of benchmarks/profiling_cost.py, probed like measured latencies."""
    source = cost.simulated("orin-nano", cost.SHAPES[0], "fp16", 4)
    goal = [(0.5, cost.accuracy_of(source))]
    found = [cost.outcomes(source, goal, cost.Machine(noise, seed), cost.ROUNDS)[0] for seed in range(8)]
    assert all(o.share <= SHARE_CONFIRMED and o.exact for o in found), found
    assert sum(o.regret <= 0.02 for o in found) >= 7, found


def test_noise_is_no_step(make_vit: MakeVit) -> None:
    """On a flat curve all choices are equal, and nothing but the unpruned count may be called a tread."""
    clean, vit = 0, make_vit()
    for seed in range(20):
        machine = cost.Machine("jitter", seed)
        others = {FIXED: machine.opener([1.0]), DENSE: machine.opener([11.0])}
        found, _ = probe(vit, SETUP, lambda n, m=machine: m.opener([10.0]), others, cost.ROUNDS)  # type: ignore[misc]
        clean += treads(found) == (197,)
        assert found.probes <= SHARE * cost.ROUNDS * len(all_counts(vit))
    assert clean >= 18


def test_ends_are_confirmed_one_after_another(make_vit: MakeVit) -> None:
    """Small steps at odd counts: side by side the budget would end before any of three ends is found."""
    vit, found = make_vit(), 0
    spread = 1 + 0.005 * np.random.default_rng(0).standard_normal(200)
    for seed in range(8):
        machine = cost.Machine(seed=seed)

        def opener(n: int, machine: cost.Machine = machine) -> Open:
            return machine.opener(list(spread * (4 + 0.25 * np.ceil((n - 7) / 16))))

        others = {FIXED: machine.opener(list(spread)), DENSE: machine.opener(list(spread * 17))}
        probed, samples = probe(vit, SETUP, opener, others, cost.ROUNDS)
        used = {min(treads(probed), key=lambda n: abs(n - wanted)) for wanted in (150, 100, 60)}
        kept = {key: [*values] for key, values in samples.items()}
        confirmed, _ = probe(vit, SETUP, opener, others, cost.ROUNDS, samples=kept, used=used)
        found += sum(edge(confirmed, n) in confirmed_edges(confirmed) for n in used)
    assert found >= 3


# --- its parts ---


def test_stages_are_scaled_by_what_they_share() -> None:
    """The second stage runs half as fast again: 12 ms there are 8 in the first."""
    again = {trunk(9)._replace(stage=1): [16.5], trunk(7)._replace(stage=1): [12.0]}
    samples = {trunk(9): [10.0, 12.0, 11.0], DENSE: [20.0]} | again
    whole = joined(samples)
    assert whole[trunk(9)] == pytest.approx([10, 12, 11, 11])
    assert whole[trunk(7)] == pytest.approx([8]) and whole[DENSE] == [20]
    assert samples[trunk(9)] == [10.0, 12.0, 11.0]


@pytest.mark.parametrize(
    ("low", "high", "batch", "middle"),
    [
        (33, 48, 1, 40),  # the middle
        (20, 33, 1, 24),  # rounder than 26, and not at the border
        (64, 80, 1, 65),  # 64 is rounder than all above it: its edge first
        (65, 80, 1, 72),
        (50, 52, 1, 51),
        (50, 53, 3, 52),
        (144, 160, 4, 145),
        (145, 160, 4, 152),
    ],
)
def test_where_a_gap_is_split(low: int, high: int, batch: int, middle: int) -> None:
    assert split(low, high, batch) == middle


def test_any_gap_can_be_split() -> None:
    assert all(a < split(a, b, batch) < b for a in range(1, 40) for b in range(a + 2, 80) for batch in (1, 3, 8))


def test_schedules_move_onto_exact_edges(make_staircase: MakeStaircase) -> None:
    """93 is exact (94 is slower) and so is the unpruned count; nothing above 120 and 140 is known to be as fast."""
    probed = make_staircase({n: steps(n) + 0.01 * (n > 120) for n in (60, 80, 93, 94, 120, 140, 197)})
    assert treads(probed) == (93, 120, 140, 197) and confirmed_edges(probed) == (93, 197)
    assert edge(probed, 80) == 93 and edge(probed, 94) == 120
    assert on_edges(probed, (197, 130, 110, 80, 60)) == (197, 140, 120, 93, 93)
    sparse = make_staircase({60: 6.0, 197: 10.0})
    assert on_edges(sparse, (197, 60)) == (197, 60)


def test_fewest_rounds_can_tell_a_step() -> None:
    rising = np.arange(1, FEW + 1)
    from edgeprune.latency.staircase import MANY
    from edgeprune.stats import signed_rank

    assert signed_rank(rising) > MANY > signed_rank(rising[:-1])


# --- conditions ---


@pytest.mark.parametrize(
    ("reasons", "events", "throttled"),
    [((), {"heat, gpu": 2}, False), ((), {}, None), (("heat, gpu",), {}, True)],
)
def test_a_staircase_taken_while_clocks_were_lowered_is_marked(
    reasons: tuple[str, ...], events: dict[str, int], throttled: bool | None, make_vit: MakeVit
) -> None:
    """The GPU is asked before and after each stage; the last stage of two or more shows what lowers its clocks.

    Without counters nobody knows what happened in between.
    """
    asked: list[GpuState] = []
    conditions: list[Conditions] = []

    def gpu_state() -> GpuState:
        active = reasons if len(asked) > 2 else ()
        asked.append(GpuState(clock_mhz=1020.0, temperature_c=60.0, throttles=active, events=events))
        return asked[-1]

    found, _ = probe(
        make_vit(), SETUP, Machine().trunk, Machine().others(), 9, conditions=conditions, gpu_state=gpu_state
    )
    assert len(asked) == 2 * len(conditions) >= 4 and list(found.conditions) == conditions
    assert found.throttled is throttled
    unknown, _ = probe(make_vit(), SETUP, Machine().trunk, Machine().others(), 9)
    assert unknown.conditions == () and unknown.throttled is None

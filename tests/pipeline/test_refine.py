"""What is built beside a schedule, and which of those that were measured is kept."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from edgeprune.pipeline.refine import MISS, Tried, correction, meets, neighbours, pick
from edgeprune.records import Candidate, Latency, Schedule, Vit, check_tokens
from edgeprune.scheduling.goals import Goal

LEVELS = (40, 80, 120, 160, 197)


def cuts(tokens: tuple[int, ...]) -> list[tuple[int, int]]:
    """(block, tokens left) of every cut."""
    before = (LEVELS[-1], *tokens)
    return [(block, n) for block, n in enumerate(tokens) if n < before[block]]


@pytest.mark.parametrize(
    "tokens", [(197, 120, 120, 80, 80, 80), (160,) * 6, (197, 197, 197, 197, 120, 40), (197,) * 6]
)
@pytest.mark.parametrize("prefix_last", [False, True])
def test_neighbours_differ_in_one_cut_by_one_step(
    tokens: tuple[int, ...], prefix_last: bool, make_vit: Callable[..., Vit]
) -> None:
    if prefix_last and tokens[-1] != tokens[-2]:
        tokens = (*tokens[:-1], tokens[-2])
    vit, last = make_vit(depth=6), 4 if prefix_last else 5
    found = list(neighbours(tokens, LEVELS, last))
    assert len(found) == len(set(found)) and tokens not in found
    assert bool(found) == bool(cuts(tokens))
    for other in found:
        check_tokens(other, vit, prefix_last)
        assert set(other) <= set(LEVELS)
        changed = set(cuts(tokens)) ^ set(cuts(other))
        assert 1 <= len(changed) <= 3, (tokens, other)
        moved = {block for block, _ in changed}
        assert max(moved) - min(moved) <= 1 or len(cuts(other)) != len(cuts(tokens))


def test_all_four_steps_of_a_lone_cut_are_there() -> None:
    found = set(neighbours((197, 197, 120, 120, 120), LEVELS, 4))
    assert found == {
        (197, 197, 80, 80, 80),
        (197, 197, 160, 160, 160),
        (197, 120, 120, 120, 120),
        (197, 197, 197, 120, 120),
    }


def tried(vit: Vit, ms: float, kl: float, agreement: float = 90.0, dense_ms: float = 10.0) -> Tried:
    """A schedule of that latency and fidelity."""
    schedule = Schedule(vit=vit, method="fold", policy="search", tokens=(int(ms * 10),) * vit.depth)
    fidelity = Candidate(schedule.tokens, ms, kl, agreement, None)
    ratio = dense_ms / ms
    samples = Latency(samples_ms=(0.98 * ms, ms, ms, ms, 1.02 * ms))
    return Tried(schedule, fidelity, ms, samples, ratio, (0.98 * ratio, 1.02 * ratio))


def job(drop: Callable[[Any], float] = lambda _: 0.0, **goal: float) -> Any:
    return SimpleNamespace(options=SimpleNamespace(goal=Goal(**goal)), drop=drop)


def test_the_least_kl_of_those_that_meet_the_goal_is_kept(make_vit: Callable[..., Vit]) -> None:
    vit = make_vit()
    slow, good, fast = tried(vit, 6.0, 0.01), tried(vit, 5.05, 0.05), tried(vit, 4.0, 0.5)
    for goal in ({"speedup": 2.0}, {"budget_ms": 5.0}):
        assert pick(job(**goal), [slow, good, fast]) == good, "within the interval counts as met"
        assert pick(job(**goal), [slow, fast]) == fast
        assert pick(job(**goal), [slow]) == slow, "the fastest there is"


def test_alpha_weighs_what_was_measured(make_vit: Callable[..., Vit]) -> None:
    vit = make_vit()
    exact, fast = tried(vit, 9.0, 0.0, 100.0), tried(vit, 5.0, 0.3, 80.0)
    assert pick(job(alpha=0.1), [exact, fast]) == exact
    assert pick(job(alpha=0.9), [exact, fast]) == fast


def test_max_drop_takes_the_fastest_that_keeps_it(make_vit: Callable[..., Vit]) -> None:
    """Only what is faster than the schedule that is known to keep it is evaluated."""
    vit, asked = make_vit(), []

    def drop(tokens: tuple[int, ...]) -> float:
        asked.append(tokens[0])
        return 5.0 if tokens[0] < 50 else 0.5

    known, lossy, better, slower = (tried(vit, ms, 0.1) for ms in (6.0, 4.0, 5.5, 7.0))
    assert pick(job(drop, max_drop=1.0), [known, lossy, better, slower]) == better
    assert asked == [40, 55]
    assert pick(job(drop, max_drop=1.0), [known, lossy, slower]) == known


def test_a_missed_goal_is_corrected_by_the_ratio(make_vit: Callable[..., Vit]) -> None:
    vit = make_vit()
    last = tried(vit, 10 / 1.8, 0.1)
    corrected = correction(Goal(speedup=2.0), Goal(speedup=2.0), last)
    assert corrected is not None and corrected.speedup == pytest.approx(2.0 * 2.0 / 1.8)
    assert correction(Goal(speedup=1.8 * (1 + MISS / 2)), Goal(speedup=2.0), last) is None
    corrected = correction(Goal(budget_ms=5.0), Goal(budget_ms=5.0), last)
    assert corrected is not None and corrected.budget_ms == pytest.approx(5.0 * 5.0 * 1.8 / 10)
    assert correction(Goal(alpha=0.5), Goal(alpha=0.5), last) is None
    assert correction(Goal(speedup=1.0), Goal(speedup=1.0), tried(vit, 2.0, 0.1)).speedup == 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("speedup", "high", "met"), [(1.5, 1.5, True), (1.49, 1.51, True), (1.49, 1.495, False), (1.46, 1.6, False)]
)
def test_a_goal_is_met_unless_measurement_or_margin_say_otherwise(
    speedup: float, high: float, met: bool, make_vit: Callable[..., Vit]
) -> None:
    found = tried(make_vit(), 10 / speedup, 0.1)._replace(speedup=speedup, speedup_interval=(1.4, high))
    assert meets(Goal(speedup=1.5), found) == met and meets(Goal(alpha=0.5), found)
    low = Latency(samples_ms=(10 / high, *(10 / speedup for _ in range(3)), 10 / 1.4))
    assert meets(Goal(budget_ms=10 / 1.5), found._replace(latency=low)) == met
    assert (correction(Goal(speedup=1.5), Goal(speedup=1.5), found) is None) == met

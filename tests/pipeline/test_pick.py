"""Which of the schedules that were measured is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.computed import ComputedScores, context_of

from edgeprune.pipeline.measure import Measured, MeasuredSchedule
from edgeprune.pipeline.refine import pick
from edgeprune.records import Candidate, Latency, Schedule, Vit
from edgeprune.scheduling.goals import Goal

MakeVit = Callable[..., Vit]


def timed(vit: Vit, ms: float, kl: float, agreement: float = 90.0, dense_ms: float = 10.0) -> MeasuredSchedule:
    """A schedule of that latency and fidelity."""
    schedule = Schedule(vit=vit, method="fold", policy="search", tokens=(int(ms * 10),) * vit.depth)
    fidelity = Candidate(schedule.tokens, ms, kl, agreement, None)
    ratio = dense_ms / ms
    latency = Latency(samples_ms=(0.98 * ms, ms, ms, ms, 1.02 * ms))
    measured = Measured(latency, Latency(samples_ms=(dense_ms,)), ratio, (0.98 * ratio, 1.02 * ratio))
    return MeasuredSchedule(schedule, ms, measured, fidelity)


@pytest.fixture
def scores(make_vit: MakeVit, tmp_path: Path) -> ComputedScores:
    return ComputedScores(context_of(make_vit(), tmp_path))


def test_the_least_kl_of_those_that_meet_the_goal_is_kept(make_vit: MakeVit, scores: ComputedScores) -> None:
    vit = make_vit()
    slow, good, fast = timed(vit, 6.0, 0.01), timed(vit, 5.05, 0.05), timed(vit, 4.0, 0.5)
    for goal in (Goal(speedup=2.0), Goal(budget_ms=5.0)):
        assert pick(goal, [slow, good, fast], scores) == good, "within the interval counts as met"
        assert pick(goal, [slow, fast], scores) == fast
        assert pick(goal, [slow], scores) == slow, "the fastest there is"


def test_alpha_weighs_what_was_measured(make_vit: MakeVit, scores: ComputedScores) -> None:
    vit = make_vit()
    exact, fast = timed(vit, 9.0, 0.0, 100.0), timed(vit, 5.0, 0.3, 80.0)
    assert pick(Goal(alpha=0.1), [exact, fast], scores) == exact
    assert pick(Goal(alpha=0.9), [exact, fast], scores) == fast


def test_max_drop_takes_the_fastest_that_keeps_it(
    make_vit: MakeVit, scores: ComputedScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, goal = make_vit(), Goal(max_drop=1.0)
    monkeypatch.setattr(scores, "drop", lambda tokens: 5.0 if tokens[0] < 50 else 0.5)
    first, lossy, better, slower = (timed(vit, ms, 0.1) for ms in (6.0, 4.0, 5.5, 7.0))
    assert pick(goal, [first, lossy, better, slower], scores) == better
    assert pick(goal, [first, lossy, slower], scores) == first
    assert pick(goal, [lossy, slower], scores) == slower
    assert pick(goal, [lossy], scores) == lossy, "none keeps it: the first"

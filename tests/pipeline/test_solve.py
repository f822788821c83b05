"""The schedule for a goal on a staircase: each policy, and what of it is kept in the work folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support.computed import ComputedScores, Machine, context_of, kl_of

from edgeprune.errors import InputError, ScheduleError
from edgeprune.latency.staircase import predict_ms, treads
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.scores import SAVE_EVERY, ScheduleScores
from edgeprune.pipeline.solve import searched, solve, with_tread_ends
from edgeprune.records import Staircase, Vit
from edgeprune.scheduling.goals import Goal, finished, pareto, single_cut

MakeVit = Callable[..., Vit]
GOALS = [Goal(speedup=1.4), Goal(budget_ms=7.5), Goal(alpha=0.6), Goal(max_drop=8.0)]


@pytest.fixture
def staircase(make_vit: MakeVit) -> Staircase:
    """Every count measured: edges at 50, 85, 121, 157 and 197 of 197 tokens; 11 ms unpruned."""
    return Machine(make_vit()).truth


@pytest.fixture
def context(staircase: Staircase, tmp_path: Path) -> Context:
    return context_of(staircase.vit, tmp_path)


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_the_search_gives_what_the_goal_asks_for(goal: Goal, staircase: Staircase, context: Context) -> None:
    scores = ComputedScores(context)
    schedule, candidates = solve(context, staircase, scores, goal)
    assert schedule == finished(staircase, "fold", "search", schedule.tokens, True)
    assert {*schedule.tokens} <= {*treads(staircase)} and schedule.cuts
    assert schedule.predicted_ms is not None
    by_tokens = {c.tokens: c for c in candidates}
    assert len(by_tokens) == len(candidates) > 20
    chosen, front = by_tokens[schedule.tokens], pareto(candidates)
    if goal.limits_latency:
        limit = 7.5 if goal.budget_ms else 11 / 1.4
        assert schedule.predicted_ms <= limit and chosen.kl == min(
            c.kl for c in candidates if c.predicted_ms <= limit
        )
    elif goal.max_drop is not None:
        kept = [c for c in front if scores.drop(c.tokens) <= goal.max_drop]
        assert chosen == min(kept, key=lambda c: c.predicted_ms)
        assert len(kept) < len(front), "some candidates lose too much"
    else:
        assert chosen == max(front, key=lambda c: goal.utility(c.predicted_ms / 11, c.agreement / 100))


def test_what_was_solved_is_kept(staircase: Staircase, context: Context) -> None:
    """Not evaluated again by another process; another goal, staircase or method is another question."""
    goal, first = Goal(speedup=1.4), ComputedScores(context)
    wanted = solve(context, staircase, first, goal)
    assert first.evaluator.asked
    again = ComputedScores(context)
    again.evaluator.stop_after = 0
    assert solve(context, staircase, again, goal) == wanted
    slower = solve(context, staircase, ComputedScores(context), Goal(speedup=1.2))
    assert slower.schedule.predicted_ms is not None and wanted.schedule.predicted_ms is not None
    assert slower.schedule.predicted_ms > wanted.schedule.predicted_ms
    topk = context.with_method("topk")
    with pytest.raises(KeyboardInterrupt):
        stopped = ComputedScores(topk)
        stopped.evaluator.stop_after = 0
        solve(topk, staircase, stopped, goal)
    less = msgspec.structs.replace(staircase, points=staircase.points[60:])
    found = solve(context, less, ComputedScores(context), Goal(speedup=1.2))
    assert min(found.schedule.tokens) >= less.points[0].tokens


def test_an_interrupted_search_goes_on_where_it_stopped(staircase: Staircase, context: Context) -> None:
    first, second = ComputedScores(context), ComputedScores(context)
    first.evaluator.stop_after = stop = 5 * SAVE_EVERY + 3
    with pytest.raises(KeyboardInterrupt):
        searched(context, staircase, first, 8.0)
    second = ComputedScores(context)
    candidates = searched(context, staircase, second, 8.0)
    assert not {*first.evaluator.asked} & {*second.evaluator.asked}
    assert len(first.evaluator.asked) == stop and len({*first.evaluator.asked, *second.evaluator.asked}) >= len(
        candidates
    )
    scores = {c.tokens: c.kl for c in candidates}
    assert all(kl == pytest.approx(kl_of(tokens, 197)) for tokens, kl in scores.items())


def test_scores_that_cannot_be_read_are_made_again(staircase: Staircase, context: Context) -> None:
    first = ComputedScores(context)
    wanted = first.candidate(staircase, single_cut(staircase.vit, 3, 85))
    first.path.write_bytes(b'{"197": [1')
    again = ComputedScores(context)
    assert again.candidate(staircase, wanted.tokens) == wanted and len(again.evaluator.asked) == 1


@pytest.mark.parametrize("policy", ["search", "paper"])
def test_a_goal_out_of_reach_is_refused_with_what_is_possible(
    policy: str, staircase: Staircase, context: Context, tmp_path: Path
) -> None:
    fastest = {"search": (50,) * 12, "paper": (197,) * 3 + (50,) * 9}[policy]
    best = 11 / predict_ms(staircase, fastest, "fold", True)
    context = context_of(staircase.vit, tmp_path, policy=policy)
    with pytest.raises(ScheduleError, match=f"{best:.2f}x"):
        solve(context, staircase, ComputedScores(context), Goal(speedup=best * 1.05))
    assert solve(context, staircase, ComputedScores(context), Goal(speedup=best * 0.999)).schedule.tokens == fastest


def test_the_papers_policy_is_one_cut(staircase: Staircase, tmp_path: Path) -> None:
    context = context_of(staircase.vit, tmp_path, policy="paper", method="pomt", block=2)
    for goal in (Goal(speedup=1.3), Goal(alpha=0.5)):
        schedule, candidates = solve(context, staircase, ComputedScores(context), goal)
        assert schedule.cuts == (2,) and (schedule.policy, schedule.method) == ("paper", "pomt") and candidates == ()
    with pytest.raises(ScheduleError, match="--max-drop"):
        solve(context, staircase, ComputedScores(context), Goal(max_drop=1.0))


@pytest.mark.parametrize("policy", ["search", "paper"])
def test_no_method_is_no_cut(policy: str, staircase: Staircase, tmp_path: Path) -> None:
    """Whatever the goal: there is nothing to choose, and no picture is needed."""
    context = context_of(staircase.vit, tmp_path, policy=policy, method="none")
    scores = ScheduleScores(context)
    schedule, candidates = solve(context, staircase, scores, Goal(speedup=9.0))
    assert schedule.tokens == (197,) * 12 and schedule.policy == policy and candidates == ()


def test_without_pictures_nothing_is_searched(staircase: Staircase, context: Context) -> None:
    with pytest.raises(InputError, match="pass --images"):
        solve(context, staircase, ScheduleScores(context), Goal())


@pytest.mark.parametrize("missing", [86, 122])
def test_counts_move_to_the_ends_of_treads(missing: int, staircase: Staircase) -> None:
    """Also where the count after it was not measured: nothing larger is known to be as fast."""
    points = tuple(p for p in staircase.points if p.tokens != missing)
    sparse = msgspec.structs.replace(staircase, points=points)
    schedule = finished(sparse, "fold", "search", (197, 157, 150, 121, 121, 100, 85, 85, 60, 50, 50, 50))
    moved = with_tread_ends(sparse, schedule)
    ends = (197, 157, 157, 121, 121, 121, 85, 85, 85, 50, 50, 50)
    assert moved == finished(sparse, "fold", "search", ends)
    assert with_tread_ends(sparse, moved) == moved

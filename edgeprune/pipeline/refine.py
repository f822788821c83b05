"""A schedule refined by measurement: the goal corrected by what engines take, then similar schedules compared."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from edgeprune.errors import ScheduleError
from edgeprune.latency.probing import confirmed_edges
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.measure import MeasuredSchedule, corrected_goal, measured_schedules, meets
from edgeprune.pipeline.profile import confirmed
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.pipeline.solve import solve, with_confirmed_edges
from edgeprune.records import Candidate, Schedule, Staircase
from edgeprune.scheduling.goals import Goal, finished
from edgeprune.scheduling.search import Tokens

log = logging.getLogger(__name__)

CORRECTIONS = 2  # times a schedule whose measured latency misses the goal is solved again


class Refined(NamedTuple):
    """The schedule to ship, the staircase it rests on, all schedules that were timed, and all that were searched."""

    schedule: Schedule
    staircase: Staircase
    measured: tuple[MeasuredSchedule, ...]
    candidates: tuple[Candidate, ...]


def refine(context: Context, staircase: Staircase, scores: ScheduleScores) -> Refined:
    """Solve, build, time; correct the goal by the measurement and solve again; then let similar schedules compete.

    The additive model knows latencies of single treads, not what the blocks of one engine do to each other. Raises
    ScheduleError where no schedule meets the goal even by prediction.
    """
    asked = goal = context.options.goal
    tried: list[MeasuredSchedule] = []
    seen: dict[Tokens, Candidate] = {}
    for _ in range(CORRECTIONS + 1):
        try:
            solution = solve(context, staircase, scores, goal)
        except ScheduleError:
            if not tried:
                raise
            log.info("no faster schedule exists; keeping the best that was measured")
            break
        seen |= {c.tokens: c for c in solution.candidates}
        staircase = confirmed(context, staircase, (context.method,), solution.schedule.tokens)
        schedule = with_confirmed_edges(staircase, solution.schedule)
        if any(m.schedule.tokens == schedule.tokens for m in tried):
            break
        tried += with_fidelity(measured_schedules(context, staircase, [schedule]), staircase, scores)
        corrected = corrected_goal(asked, goal, tried[-1].measured)
        if corrected is None:
            break
        goal = corrected
    best = pick(asked, tried, scores)
    similar = most_promising(context, staircase, scores, best, tried)
    if similar:
        schedules = [best.schedule, *similar]
        together = with_fidelity(measured_schedules(context, staircase, schedules), staircase, scores)
        best = pick(asked, together, scores)
        tried = [m for m in tried if m.schedule.tokens != together[0].schedule.tokens] + together
    seen |= {m.fidelity.tokens: m.fidelity for m in tried if m.fidelity is not None}
    chosen = best.schedule
    last = finished(staircase, chosen.method, chosen.policy, chosen.tokens, chosen.prefix_last)
    return Refined(last, staircase, tuple(tried), tuple(seen.values()))


def with_fidelity(
    measured: Sequence[MeasuredSchedule], staircase: Staircase, scores: ScheduleScores
) -> list[MeasuredSchedule]:
    """Measured schedules with their fidelity on the search pictures, where a search chose them."""
    return [
        m._replace(fidelity=scores.candidate(staircase, m.schedule.tokens)) if is_searched(m.schedule) else m
        for m in measured
    ]


def is_searched(schedule: Schedule) -> bool:
    """Did the search choose a schedule, by its fidelity?"""
    return schedule.policy == "search" and schedule.method != "none"


def pick(goal: Goal, tried: Sequence[MeasuredSchedule], scores: ScheduleScores) -> MeasuredSchedule:
    """The best by measurement: what the goal asks for among those that meet it; else the fastest."""
    if goal.max_drop is not None:
        first = tried[0].measured.latency.median_ms
        faster = [m for m in tried[1:] if m.measured.latency.median_ms < first]
        faster.sort(key=lambda m: m.measured.latency.median_ms)
        return next((m for m in faster if scores.drop(m.schedule.tokens) <= goal.max_drop), tried[0])
    if not goal.limits_latency:
        return max(tried, key=lambda m: goal.utility(1 / m.speedup, agreement_of(m) / 100))
    good = [m for m in tried if meets(goal, m.measured)]
    if good:
        return min(good, key=lambda m: (m.fidelity.kl if m.fidelity else 0.0, m.measured.latency.median_ms))
    return max(tried, key=lambda m: m.speedup)


def agreement_of(found: MeasuredSchedule) -> float:
    """Agreement with the unpruned model, percent; of what was not searched 100, so that latency decides."""
    return found.fidelity.agreement if found.fidelity else 100.0


def most_promising(
    context: Context,
    staircase: Staircase,
    scores: ScheduleScores,
    best: MeasuredSchedule,
    tried: Sequence[MeasuredSchedule],
) -> list[Schedule]:
    """The similar schedules worth building, by the additive model corrected with what was measured of the best."""
    schedule, goal = best.schedule, context.options.goal
    if best.fidelity is None or not context.options.neighbours:
        return []
    known = {m.schedule.tokens for m in tried}
    last = schedule.vit.depth - (2 if schedule.prefix_last else 1)
    scale = best.measured.latency.median_ms / best.fidelity.predicted_ms
    dense_ms = best.speedup * best.measured.latency.median_ms
    limit_ms = goal.limit_ms(dense_ms)
    ranked: list[tuple[float, Schedule]] = []
    for tokens in similar_schedules(schedule.tokens, confirmed_edges(staircase), last):
        if tokens in known:
            continue
        other = finished(staircase, schedule.method, schedule.policy, tokens, schedule.prefix_last)
        score = scores.candidate(staircase, tokens)
        ms = score.predicted_ms * scale
        if limit_ms is None:
            ranked.append((-goal.utility(ms / dense_ms, score.agreement / 100), other))
        elif ms <= limit_ms:
            ranked.append((score.kl, other))
    ranked.sort(key=lambda entry: (entry[0], entry[1].tokens))
    return [other for _, other in ranked[: context.options.neighbours]]


def similar_schedules(tokens: Tokens, levels: Sequence[int], last: int) -> Iterator[Tokens]:
    """Schedules that differ in one cut by one tread of `levels` (ascending), or by one block; cuts end at `last`."""
    before = (levels[-1], *tokens)
    cuts = [block for block in range(len(tokens)) if tokens[block] < before[block]]
    for index, cut in enumerate(cuts):
        end = cuts[index + 1] if index + 1 < len(cuts) else len(tokens)
        count, upper, lower = tokens[cut], before[cut], tokens[end] if end < len(tokens) else 0
        less, more = [n for n in levels if n < count], [n for n in levels if n > count]
        for other in (*less[-1:], *more[:1]):
            if lower <= other <= upper:
                yield (*tokens[:cut], *((other,) * (end - cut)), *tokens[end:])
        if cut + 1 < end and cut + 1 <= last:
            yield (*tokens[:cut], upper, *tokens[cut + 1 :])
        if cut > (cuts[index - 1] + 1 if index else 0):
            yield (*tokens[: cut - 1], count, *tokens[cut:])

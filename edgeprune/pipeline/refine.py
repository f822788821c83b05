"""Refine a schedule by measurement: correct the goal by measured latencies, then compare similar schedules."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from edgeprune.errors import ScheduleError
from edgeprune.latency.staircase import treads
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.measure import MISS, MeasuredSchedule, corrected_goal, measured_schedules, meets
from edgeprune.pipeline.profile import confirmed
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.pipeline.solve import solve, with_tread_ends
from edgeprune.records import Candidate, Schedule, Staircase
from edgeprune.scheduling.goals import Goal, finished
from edgeprune.scheduling.search import Tokens
from edgeprune.stats import ROUNDING

log = logging.getLogger(__name__)

CORRECTIONS = 2  # times that solving is repeated for a schedule whose measured latency misses the goal
RIVALS = 6  # schedules, the best one included, that recovery may choose from
WORST = 1.5  # loss of such a schedule before recovery, compared with the best one


class Refined(NamedTuple):
    """The final schedule, the staircase it is based on, all schedules that were timed, and all evaluated ones."""

    schedule: Schedule
    staircase: Staircase
    measured: tuple[MeasuredSchedule, ...]
    candidates: tuple[Candidate, ...]
    rivals: tuple[Schedule, ...] = ()  # others that were timed and are as good for the goal, for recovery


def refine(context: Context, staircase: Staircase, scores: ScheduleScores) -> Refined:
    """Solve, build and time; correct the goal by the measurement and solve again; then compare similar schedules.

    The additive model adds up latencies of blocks at constant token counts and cannot know how the blocks of one
    engine affect each other. Raises ScheduleError where no schedule meets the goal even by prediction.
    """
    asked = goal = context.options.goal
    recovers = context.recovery is not None and asked.limits_latency and context.options.neighbours > 0
    measured: list[MeasuredSchedule] = []
    seen: dict[Tokens, Candidate] = {}
    for _ in range(CORRECTIONS + 1):
        try:
            solution = solve(context, staircase, scores, goal, recovers)
        except ScheduleError:
            if not measured:
                raise
            log.info("no faster schedule exists; keeping the best one measured so far")
            break
        seen |= {c.tokens: c for c in solution.candidates}
        staircase = confirmed(context, staircase, (context.method,), solution.schedule.tokens)
        schedule = within_bound(staircase, solution.schedule, scores, goal)
        if any(m.schedule.tokens == schedule.tokens for m in measured):
            break
        measured += with_search_fidelity(measured_schedules(context, staircase, [schedule]), staircase, scores)
        corrected = corrected_goal(asked, measured[-1], staircase.dense.median_ms)
        if corrected is None:
            break
        goal = corrected
    best = pick(asked, measured, scores)
    if recovers:
        others = ending_differently(context, staircase, best, seen.values())
    else:
        others = most_promising(context, staircase, scores, best, measured)
    if others:
        tried = [m.schedule for m in measured if m is not best]  # speed-ups differ by a few percent between sessions
        schedules = [best.schedule, *others, *tried]
        together = with_search_fidelity(measured_schedules(context, staircase, schedules), staircase, scores)
        best = pick(asked, together, scores)
        slowest = best.measured.latency.median_ms * (1 + MISS)  # as fast, but for noise
        others = [
            m.schedule
            for m in together[: 1 + len(others)]
            if recovers and m is not best and (meets(asked, m.measured) or m.measured.latency.median_ms <= slowest)
        ]
        measured = together
    seen |= {m.fidelity.tokens: m.fidelity for m in measured if m.fidelity is not None}
    last, *rivals = (
        finished(staircase, each.method, each.policy, each.tokens, each.prefix_last)
        for each in (best.schedule, *others)
    )
    return Refined(last, staircase, tuple(measured), tuple(seen.values()), tuple(rivals))


def ending_differently(
    context: Context, staircase: Staircase, best: MeasuredSchedule, candidates: Iterable[Candidate]
) -> list[Schedule]:
    """For each number of tokens at the end the schedule with the lowest loss that should meet a latency goal.

    The loss before recovery does not tell which schedule is best after it: few tokens in the last blocks are the
    hardest to repair (docs/benchmarks.md). Latencies are predicted, scaled to the measurement of the best schedule,
    whose number at the end is left out.
    """
    schedule, limit_ms = best.schedule, context.options.goal.limit_ms(best.speedup * best.measured.latency.median_ms)
    if best.fidelity is None or limit_ms is None or not schedule.cuts:
        return []
    scale = best.measured.latency.median_ms / best.fidelity.predicted_ms
    found: dict[int, Schedule] = {}
    for candidate in sorted(candidates, key=lambda c: (c.loss, c.tokens)):
        if candidate.loss > WORST * best.fidelity.loss:
            break
        own = finished(staircase, schedule.method, schedule.policy, candidate.tokens, schedule.prefix_last)
        own = with_tread_ends(staircase, own)
        assert own.predicted_ms is not None
        if own.predicted_ms * scale <= limit_ms and own.tokens[-1] != schedule.tokens[-1]:
            found.setdefault(own.tokens[-1], own)
    return [*found.values()][: RIVALS - 1]


def within_bound(staircase: Staircase, schedule: Schedule, scores: ScheduleScores, goal: Goal) -> Schedule:
    """The schedule at the ends of treads; as it was found where a bound on fidelity would be missed there."""
    moved = with_tread_ends(staircase, schedule)
    if not goal.limits_fidelity or not is_searched(schedule):
        return moved
    if is_kept(goal, scores, scores.candidate(staircase, moved.tokens)):
        return moved
    return finished(staircase, schedule.method, schedule.policy, schedule.tokens, schedule.prefix_last)


def with_search_fidelity(
    measured: Sequence[MeasuredSchedule], staircase: Staircase, scores: ScheduleScores
) -> list[MeasuredSchedule]:
    """Measured schedules with their fidelity on the search pictures, if the search found them."""
    return [
        m._replace(fidelity=scores.candidate(staircase, m.schedule.tokens)) if is_searched(m.schedule) else m
        for m in measured
    ]


def is_searched(schedule: Schedule) -> bool:
    """Was a schedule found by the search, which evaluates fidelity?"""
    return schedule.policy == "search" and schedule.method != "none"


def is_kept(goal: Goal, scores: ScheduleScores, found: Candidate | None) -> bool:
    """Is a candidate within the bound of the goal on fidelity? True for goals without one."""
    if goal.max_drop is not None and found is not None:
        return scores.drop(found.tokens) <= goal.max_drop + ROUNDING
    return goal.kept_by(found)


def pick(goal: Goal, measured: Sequence[MeasuredSchedule], scores: ScheduleScores) -> MeasuredSchedule:
    """The best measured schedule for the goal among those that meet it; the fastest if none does."""
    if goal.limits_fidelity:
        good = [m for m in measured if is_kept(goal, scores, m.fidelity)]
        return min(good or measured[:1], key=lambda m: m.measured.latency.median_ms)
    if not goal.limits_latency:
        return max(measured, key=lambda m: goal.utility(1 / m.speedup, accuracy_of(m) / 100))
    good = [m for m in measured if meets(goal, m.measured)]
    if good:
        return min(good, key=lambda m: (m.fidelity.loss if m.fidelity else 0.0, m.measured.latency.median_ms))
    return max(measured, key=lambda m: m.speedup)


def accuracy_of(found: MeasuredSchedule) -> float:
    """Candidate.accuracy, percent; 100 without a search, so that latency decides."""
    return found.fidelity.accuracy if found.fidelity else 100.0


def most_promising(
    context: Context,
    staircase: Staircase,
    scores: ScheduleScores,
    best: MeasuredSchedule,
    measured: Sequence[MeasuredSchedule],
) -> list[Schedule]:
    """The similar schedules most worth building, by the additive model scaled to the measurement of the best."""
    schedule, goal = best.schedule, context.options.goal
    if best.fidelity is None or not context.options.neighbours:
        return []
    known = {m.schedule.tokens for m in measured}
    last = schedule.vit.depth - (2 if schedule.prefix_last else 1)
    scale = best.measured.latency.median_ms / best.fidelity.predicted_ms
    dense_ms = best.speedup * best.measured.latency.median_ms
    limit_ms = goal.limit_ms(dense_ms)
    ranked: list[tuple[float, Schedule]] = []
    similar = [t for t in similar_schedules(schedule.tokens, treads(staircase), last) if t not in known]
    scores.ahead([(tokens, tokens) for tokens in similar])
    for tokens in similar:
        other = finished(staircase, schedule.method, schedule.policy, tokens, schedule.prefix_last)
        score = scores.candidate(staircase, tokens)
        ms = score.predicted_ms * scale
        if goal.max_drop is not None:
            # The loss is less noisy than points on a few pictures: among several that pass, some only seem to.
            if is_kept(goal, scores, score) and score.loss <= best.fidelity.loss:
                ranked.append((ms, other))
        elif goal.limits_fidelity:
            if is_kept(goal, scores, score):
                ranked.append((ms, other))
        elif limit_ms is None:
            ranked.append((-goal.utility(ms / dense_ms, score.accuracy / 100), other))
        elif ms <= limit_ms:
            ranked.append((score.loss, other))
    ranked.sort(key=lambda entry: (entry[0], entry[1].tokens))
    return [other for _, other in ranked[: context.options.neighbours]]


def similar_schedules(tokens: Tokens, levels: Sequence[int], last: int) -> Iterator[Tokens]:
    """Schedules that differ in one cut, by one of `levels` (ascending) or by one block; no cut after block `last`."""
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

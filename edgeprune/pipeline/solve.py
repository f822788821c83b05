"""The schedule for a goal by the requested policy; solutions are kept in the work folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from edgeprune.io import encode, load, read_bytes, save, write_bytes
from edgeprune.latency.probing import on_edges
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.records import Candidate, Schedule, Staircase
from edgeprune.scheduling.goals import Goal, choose, finished, pareto
from edgeprune.scheduling.paper import paper_schedule
from edgeprune.scheduling.search import Search


class Solution(NamedTuple):
    """A schedule and the candidates it was chosen from; no candidates where nothing was searched."""

    schedule: Schedule
    candidates: tuple[Candidate, ...]


def solve(
    context: Context, staircase: Staircase, scores: ScheduleScores, goal: Goal, every_end: bool = False
) -> Solution:
    """The schedule for a goal; `every_end` as in `searched`.

    Raises ScheduleError where the goal is out of reach, InputError without pictures.
    """
    options, prefix_last = context.options, context.prefix_last
    if context.method == "none":
        return Solution(finished(staircase, "none", options.policy, context.dense_tokens, prefix_last), ())
    candidates: tuple[Candidate, ...] = ()
    if options.policy == "search":
        candidates = searched(context, staircase, scores, goal.limit_ms(staircase.dense.median_ms), every_end)

    def make(path: Path) -> None:
        if options.policy == "paper":
            found = paper_schedule(
                staircase, context.method, goal, scores.accuracy_of_random, options.block, prefix_last,
                context.progress,
            )  # fmt: skip
        else:
            best = choose(pareto(candidates), staircase, context.method, goal, scores.drop)
            found = finished(staircase, context.method, "search", best.tokens, prefix_last)
        save(found, path)

    parts = (encode(staircase), goal, options.policy, options.block, every_end, *scores.key)
    return Solution(load(context.target.work.step("schedule", ".json", parts, make), Schedule), candidates)


def searched(
    context: Context, staircase: Staircase, scores: ScheduleScores, limit_ms: float | None, every_end: bool = False
) -> tuple[Candidate, ...]:
    """All schedules that the search evaluates within `limit_ms`; over all latencies where that is None.

    `every_end`: the best with each number of tokens at the end, too, for recovery to choose from.
    """

    def make(path: Path) -> None:
        search = Search(
            staircase, context.method, scores.of, context.prefix_last, context.progress, scores.ahead, every_end
        )
        try:
            search.front(limit_ms)
        finally:
            scores.save()
        write_bytes(path, msgspec.json.encode(list(search.found.values())))

    parts = (encode(staircase), limit_ms, every_end, *scores.key)
    path = context.target.work.step("candidates", ".json", parts, make)
    return msgspec.json.decode(read_bytes(path), type=tuple[Candidate, ...])


def with_tread_ends(staircase: Staircase, schedule: Schedule) -> Schedule:
    """The schedule with every count at the right end of its tread."""
    tokens = on_edges(staircase, schedule.tokens)
    return finished(staircase, schedule.method, schedule.policy, tokens, schedule.prefix_last)

"""Methods side by side at equal measured latency: solved, exported, timed interleaved, evaluated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgeprune.errors import InputError, ScheduleError
from edgeprune.pipeline.context import Context, Options, context_for
from edgeprune.pipeline.evaluate import logits_on, with_fidelity
from edgeprune.pipeline.measure import MISS, MeasuredSchedule, corrected_goal, measured_schedules, report_of
from edgeprune.pipeline.onnx_files import dense_onnx, pruned_onnx
from edgeprune.pipeline.pictures import BIASED
from edgeprune.pipeline.profile import confirmed, measured_staircase
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.pipeline.solve import solve, with_confirmed_edges
from edgeprune.records import Progress, Report, Schedule, Setup, Staircase, silent
from edgeprune.runtimes.target import work_lock
from edgeprune.scheduling.goals import Goal, finished
from edgeprune.scheduling.published import published_schedule
from edgeprune.vit.reducers import reducer_named

log = logging.getLogger(__name__)

SESSIONS = 3  # in which schedules are corrected at most; one more measures those that are kept


@dataclass(frozen=True)
class Entry:
    """One method, shaped by one policy, for one target speed-up."""

    method: str
    policy: str  # search, or published: the baseline's own shape
    target: float
    schedule: Schedule
    goal: Goal  # given to the additive model, corrected by measurements
    report: Report | None = None


@dataclass(frozen=True)
class Comparison:
    """All entries with their reports, measured in one session; those out of reach by name and reason."""

    entries: tuple[Entry, ...]
    missing: tuple[tuple[str, str, float, str], ...]  # method, policy, target, reason
    setup: Setup
    staircase: Staircase


def compare(
    options: Options, methods: Sequence[str], targets: Sequence[float], progress: Progress = silent
) -> Comparison:
    """Every method at every target speed-up, by the search and in its published shape.

    Schedules are chosen on the search pictures and reported on all others. Raises any EdgepruneError.
    """
    if not methods or len(set(methods)) < len(methods):
        raise InputError("--methods needs one or more different names, separated by commas")
    if not targets or min(targets) < 1:
        raise InputError("--speedup needs one or more factors of at least 1, separated by commas")
    for method in methods:
        reducer_named(method)
    if options.precision != "fp32" and not options.simulate:
        raise InputError(f"compare measures fp32, not {options.precision}: leave out --precision, or --simulate")
    context = context_for(options, progress)
    with work_lock(options.work):
        return _Methods(context, methods).compared(targets)


class _Methods:
    """The methods of one comparison on one staircase, whose treads are confirmed as schedules come to use them."""

    def __init__(self, context: Context, methods: Sequence[str]) -> None:
        self.context, self.methods = context, tuple(methods)
        self.contexts = {method: context.with_method(method) for method in methods}
        self.scores = {method: ScheduleScores(own) for method, own in self.contexts.items()}
        self.staircase = measured_staircase(context.target, context.model, self.methods, context.options.exhaustive)

    def compared(self, targets: Sequence[float]) -> Comparison:
        """Solve, correct by measurement, measure once more, evaluate."""
        entries: list[Entry] = []
        missing: list[tuple[str, str, float, str]] = []
        for method in self.methods:
            for policy in ("search", "published"):
                for target in targets if method != "none" else targets[:1]:
                    goal = Goal(speedup=target)
                    try:
                        schedule = self.solved(method, policy, goal)
                    except ScheduleError as error:
                        missing.append((method, policy, target, str(error)))
                        continue
                    if schedule is not None:
                        entries.append(Entry(method, policy, target, schedule, goal))
        entries = self.corrected(self.confirmed(entries))
        reported = self.reported(entries)
        return Comparison(tuple(reported), tuple(missing), self.context.target.setup, self.staircase)

    def solved(self, method: str, policy: str, goal: Goal) -> Schedule | None:
        """A schedule for a goal; None for a method without a published shape. Raises ScheduleError."""
        if policy == "search":
            return solve(self.contexts[method], self.staircase, self.scores[method], goal).schedule
        limit = goal.limit_ms(self.staircase.dense.median_ms)
        assert limit is not None
        return published_schedule(self.staircase, method, limit, self.context.prefix_last)

    def confirmed(self, entries: Sequence[Entry]) -> list[Entry]:
        """Entries on confirmed edges, as `build` does it; published shapes stay what they are."""
        used = {n for entry in entries if entry.policy == "search" for n in entry.schedule.tokens}
        self.staircase = confirmed(self.context, self.staircase, self.methods, used)
        moved = []
        for entry in entries:
            old = entry.schedule
            if entry.policy == "search":
                schedule = with_confirmed_edges(self.staircase, old)
            else:
                schedule = finished(self.staircase, old.method, old.policy, old.tokens, old.prefix_last)
            moved.append(replace(entry, schedule=schedule))
        return moved

    def corrected(self, entries: Sequence[Entry]) -> list[Entry]:
        """For each entry the schedule, of those that a few sessions tried, that meets its target most narrowly."""
        tries: list[list[tuple[float, Entry]]] = [[] for _ in entries]  # measured speed-up, and of what
        for _ in range(SESSIONS):
            measured = measured_schedules(self.context, self.staircase, [e.schedule for e in entries])
            for found, entry, mine in zip(tries, entries, measured, strict=True):
                found.append((mine.speedup, entry))
            again = self.confirmed([self.sought_again(e, m) for e, m in zip(entries, measured, strict=True)])
            if [e.schedule.tokens for e in again] == [e.schedule.tokens for e in entries]:
                break
            entries = again
        return self.confirmed([narrowest(found) for found in tries])

    def sought_again(self, entry: Entry, measured: MeasuredSchedule) -> Entry:
        """The entry solved for a corrected goal where its measured speed-up misses the target."""
        asked = Goal(speedup=entry.target)
        goal = corrected_goal(asked, entry.goal, measured.measured) if entry.method != "none" else None
        if goal is None:
            return entry
        log.info("%s, %s: measured %.3fx for %.2fx", entry.method, entry.policy, measured.speedup, entry.target)
        try:
            schedule = self.solved(entry.method, entry.policy, goal)
        except ScheduleError:
            return entry
        return entry if schedule is None else replace(entry, schedule=schedule, goal=goal)

    def reported(self, entries: Sequence[Entry]) -> list[Entry]:
        """Entries measured in one session, with their reports on the pictures that no schedule was chosen on."""
        context, pictures = self.context, self.context.needed_pictures()
        measured = measured_schedules(context, self.staircase, [e.schedule for e in entries])
        method = next((m for m in self.methods if m != "none"), "none")
        kept, held_out = pictures.held_out(method, context.target.onnx_precision)
        if not held_out:
            log.warning(BIASED, len(kept))
        labels = pictures.labels(kept)
        dense = logits_on(context, pictures, dense_onnx(context))[kept]
        reported = []
        for entry, mine in zip(entries, measured, strict=True):
            own = self.contexts[entry.method]
            logits = logits_on(own, pictures, pruned_onnx(own, entry.schedule))[kept]
            report = report_of(mine.measured, entry.schedule, self.staircase)
            reported.append(replace(entry, report=with_fidelity(report, dense, logits, labels, held_out)))
        return reported


def narrowest(found: Sequence[tuple[float, Entry]]) -> Entry:
    """The slowest that meets its target, short of MISS; the fastest where none does."""
    met = [(speedup, entry) for speedup, entry in found if speedup >= entry.target * (1 - MISS)]
    return min(met, key=lambda pair: pair[0])[1] if met else max(found, key=lambda pair: pair[0])[1]

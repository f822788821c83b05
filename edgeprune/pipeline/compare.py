"""Compare methods at equal measured latency: solve, export, time in interleaved rounds, evaluate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgeprune.errors import InputError, ScheduleError
from edgeprune.pipeline.context import Context, Options, context_for
from edgeprune.pipeline.evaluate import logits_on, with_fidelity, with_unrecovered
from edgeprune.pipeline.measure import FINAL, MISS, MeasuredSchedule, corrected_goal, measured_schedules, report_of
from edgeprune.pipeline.onnx_files import dense_onnx, layers_in_int8, precise_onnx, pruned_onnx
from edgeprune.pipeline.profile import confirmed, measured_staircase
from edgeprune.pipeline.recovery import recover
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.pipeline.solve import solve, with_tread_ends
from edgeprune.records import Progress, Recovery, Report, Schedule, Setup, Staircase, silent
from edgeprune.scheduling.goals import Goal, finished
from edgeprune.scheduling.published import published_schedule
from edgeprune.scheduling.search import Tokens
from edgeprune.vit.reducers import check_method

log = logging.getLogger(__name__)

SESSIONS = 3  # of measurement, at most, that correct the schedules; one more chooses, the last measures those


@dataclass(frozen=True)
class Entry:
    """The schedule of one method by one policy for one target speed-up."""

    method: str
    policy: str  # search, or published: the schedule shape of the method's authors
    target: float
    schedule: Schedule
    goal: Goal  # as given to the additive model, after correction by measurement
    report: Report | None = None
    recovery: Recovery | None = None


@dataclass(frozen=True)
class Comparison:
    """All entries with their reports, measured in one session, and the targets that could not be reached."""

    entries: tuple[Entry, ...]
    missing: tuple[tuple[str, str, float, str], ...]  # method, policy, target, reason
    setup: Setup
    staircase: Staircase


def compare(
    options: Options,
    methods: Sequence[str],
    targets: Sequence[float],
    progress: Progress = silent,
    searched: Sequence[str] | None = None,
) -> Comparison:
    """Every method at every target speed-up, with a searched schedule and with one of its published shape.

    `searched` are the methods whose schedules are searched, by default all. Schedules are chosen on the search
    pictures; figures are of all other pictures, against the unpruned model in fp32. Speed-ups are over the unpruned
    model in the same precision. Raises any EdgepruneError.
    """
    if not methods or len(set(methods)) < len(methods):
        raise InputError("--methods needs one or more different names, separated by commas")
    if not targets:
        raise InputError("--speedup needs one or more factors, separated by commas")
    for target in targets:
        Goal(speedup=target).check()
    for method in methods:
        check_method(method)
    context = context_for(options, progress)
    with context.target.work.lock():
        return _Methods.of(context, methods, searched).compared(targets)


@dataclass(frozen=True)
class _Methods:
    """The methods of one comparison. The staircase, whose tread ends are confirmed on the way, is passed along."""

    context: Context
    methods: tuple[str, ...]
    searched: tuple[str, ...]  # those whose schedules are searched
    contexts: Mapping[str, Context]
    scores: Mapping[str, ScheduleScores]

    @classmethod
    def of(cls, context: Context, methods: Sequence[str], searched: Sequence[str] | None = None) -> _Methods:
        """`searched` are by default all methods."""
        contexts = {method: context.with_method(method) for method in methods}
        scores = {method: ScheduleScores(own) for method, own in contexts.items()}
        return cls(context, tuple(methods), tuple(methods if searched is None else searched), contexts, scores)

    def compared(self, targets: Sequence[float]) -> Comparison:
        """Measure the staircase, solve, correct by measurement, measure once more, evaluate."""
        context = self.context
        staircase = measured_staircase(context.target, context.model, self.methods, context.options.exhaustive)
        entries: list[Entry] = []
        missing: list[tuple[str, str, float, str]] = []
        for method in self.methods:
            for policy in ("search", "published") if method in self.searched else ("published",):
                for target in targets if method != "none" else targets[:1]:
                    goal = Goal(speedup=target)
                    try:
                        schedule = self.solved(staircase, method, policy, goal)
                    except ScheduleError as error:
                        missing.append((method, policy, target, str(error)))
                        continue
                    if schedule is not None:
                        entries.append(Entry(method, policy, target, schedule, goal))
            self.scores[method].release()
        if not entries:
            raise ScheduleError(missing[0][3] if missing else f"no shape of {', '.join(self.methods)} was published")
        staircase, entries = self.corrected(*self.confirmed(staircase, entries))
        reported = self.reported(staircase, entries)
        return Comparison(tuple(reported), tuple(missing), context.target.setup, staircase)

    def solved(self, staircase: Staircase, method: str, policy: str, goal: Goal) -> Schedule | None:
        """A schedule for a goal; None for a method without a published shape. Raises ScheduleError."""
        if policy == "search":
            return solve(self.contexts[method], staircase, self.scores[method], goal).schedule
        limit = goal.limit_ms(staircase.dense.median_ms)
        assert limit is not None
        return published_schedule(staircase, method, limit, self.context.prefix_last)

    def confirmed(self, staircase: Staircase, entries: Sequence[Entry]) -> tuple[Staircase, list[Entry]]:
        """The staircase with confirmed tread ends, and entries that use them, as in `build`.

        Published shapes do not change.
        """
        used = {n for entry in entries if entry.policy == "search" for n in entry.schedule.tokens}
        staircase = confirmed(self.context, staircase, self.methods, used)
        moved = []
        for entry in entries:
            old = entry.schedule
            if entry.policy == "search":
                schedule = with_tread_ends(staircase, old)
            else:
                schedule = finished(staircase, old.method, old.policy, old.tokens, old.prefix_last)
            moved.append(replace(entry, schedule=schedule))
        return staircase, moved

    def corrected(self, staircase: Staircase, entries: Sequence[Entry]) -> tuple[Staircase, list[Entry]]:
        """For each entry the schedule, of all tried in a few sessions, that meets its target most narrowly.

        Speed-ups differ by a few percent between sessions, so those that are compared are measured in one.
        """
        tries: list[dict[Tokens, Entry]] = [{} for _ in entries]
        for _ in range(SESSIONS):
            for own, entry in zip(tries, entries, strict=True):
                own.setdefault(entry.schedule.tokens, entry)
            measured = measured_schedules(self.context, staircase, [e.schedule for e in entries])
            again = [self.solved_again(staircase, e, m) for e, m in zip(entries, measured, strict=True)]
            staircase, again = self.confirmed(staircase, again)
            if [e.schedule.tokens for e in again] == [e.schedule.tokens for e in entries]:
                break
            entries = again
        for own, entry in zip(tries, entries, strict=True):
            own.setdefault(entry.schedule.tokens, entry)
        several = {(e.method, tokens): e.schedule for own in tries if len(own) > 1 for tokens, e in own.items()}
        together = measured_schedules(self.context, staircase, [*several.values()]) if several else []
        speedups = {key: found.speedup for key, found in zip(several, together, strict=True)}
        chosen = [narrowest([(speedups.get((e.method, t), 0.0), e) for t, e in own.items()]) for own in tries]
        return self.confirmed(staircase, chosen)

    def solved_again(self, staircase: Staircase, entry: Entry, measured: MeasuredSchedule) -> Entry:
        """The entry solved for a corrected goal where its measured speed-up misses the target."""
        target = Goal(speedup=entry.target)
        goal = corrected_goal(target, measured, staircase.dense.median_ms) if entry.method != "none" else None
        if goal is None:
            return entry
        log.info(
            "%s (%s): measured %.3fx for a target of %.2fx; solving again",
            entry.method, entry.policy, measured.speedup, entry.target,
        )  # fmt: skip
        try:
            schedule = self.solved(staircase, entry.method, entry.policy, goal)
        except ScheduleError:
            return entry
        return entry if schedule is None else replace(entry, schedule=schedule, goal=goal)

    def reported(self, staircase: Staircase, entries: Sequence[Entry]) -> list[Entry]:
        """Entries measured in one session, with reports on the pictures that were not used to choose a schedule."""
        context, pictures = self.context, self.context.needed_pictures()
        measured = measured_schedules(context, staircase, [e.schedule for e in entries], FINAL)
        method = next((m for m in self.methods if m != "none"), "none")
        precision = context.target.onnx_precision
        kept, held_out = pictures.held_out(method, precision)
        labels = pictures.labels(kept)
        exact = context if precision == "fp32" else context.at("fp32")
        dense = logits_on(exact, pictures, dense_onnx(context))[kept]
        reported = []
        for entry, result in zip(entries, measured, strict=True):
            own = self.contexts[entry.method]
            recovered = None
            if own.recovery and entry.schedule.cuts:
                recovered = recover(own, entry.schedule, layers_in_int8(own, entry.schedule))
            logits = logits_on(own, pictures, precise_onnx(own, pruned_onnx(own, entry.schedule, recovered)))[kept]
            report = report_of(result.measured, entry.schedule, staircase)
            report = with_fidelity(report, dense, logits, labels, held_out, context.task)
            if recovered is not None:
                before = logits_on(own, pictures, precise_onnx(own, pruned_onnx(own, entry.schedule)))[kept]
                report = with_unrecovered(report, dense, before, logits, labels, context.task)
            reported.append(replace(entry, report=report, recovery=recovered.record if recovered else None))
        return reported


def narrowest(attempts: Sequence[tuple[float, Entry]]) -> Entry:
    """The slowest entry that meets its target within MISS; the fastest where none does."""
    met = [(speedup, entry) for speedup, entry in attempts if speedup >= entry.target * (1 - MISS)]
    return min(met, key=lambda pair: pair[0])[1] if met else max(attempts, key=lambda pair: pair[0])[1]

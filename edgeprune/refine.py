"""A schedule refined by measurement: the goal corrected by what engines really take, then neighbours compared."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from edgeprune import measure
from edgeprune.adaptive import settled
from edgeprune.errors import ScheduleError
from edgeprune.job import Job
from edgeprune.planning import Scores, on_exact_edges, solve, weighed
from edgeprune.realise import dense_onnx, nominal_onnx, pruned_onnx, timed
from edgeprune.records import Candidate, Latency, Report, Schedule, Trial
from edgeprune.schedule import Goal, finished
from edgeprune.search import Tokens
from edgeprune.staircase import predict_ms

log = logging.getLogger(__name__)

CORRECTIONS = 2  # times a schedule whose measured latency misses the goal is sought anew
MISS = 0.02  # of the goal, beyond which it counts as missed whatever the noise
OFF = 0.05  # of the prediction, beyond which the user is told


class Tried(NamedTuple):
    """A schedule that was built and measured beside the unpruned model, its fidelity where it was searched."""

    schedule: Schedule
    fidelity: Candidate | None
    predicted_ms: float
    latency: Latency
    speedup: float
    speedup_interval: tuple[float, float]


class Refined(NamedTuple):
    """The schedule to ship, all that were built on the way, and all that the search weighed."""

    schedule: Schedule
    trials: tuple[Trial, ...]
    weighed: tuple[Candidate, ...]


def refine(job: Job) -> Refined:
    """Solve, build, measure; correct the goal by the measurement and solve anew; then let neighbours compete.

    The additive model holds latencies of single treads, not what a schedule's engines do together. Raises
    ScheduleError where no schedule meets the goal even on paper.
    """
    asked = goal = job.options.goal
    tried: list[Tried] = []
    seen: dict[Tokens, Candidate] = {}
    for _ in range(CORRECTIONS + 1):
        try:
            solved = solve(job, goal)
        except ScheduleError:
            if not tried:
                raise
            log.info("no schedule is faster: keeping the best that was measured")
            break
        seen |= {c.tokens: c for c in weighed(job, goal)}
        solved = on_exact_edges(job, solved)
        if any(t.schedule.tokens == solved.tokens for t in tried):
            break
        tried += measured(job, [solved])
        corrected = correction(asked, goal, tried[-1])
        if corrected is None:
            break
        goal = corrected
    best = pick(job, tried)
    near = nearby(job, best, tried)
    if near:
        together = measured(job, [best.schedule, *near])
        best = pick(job, together)
        tried = [t for t in tried if t.schedule.tokens != together[0].schedule.tokens] + together
    seen |= {t.fidelity.tokens: t.fidelity for t in tried if t.fidelity is not None}
    trials = (Trial(tokens=t.schedule.tokens, predicted_ms=t.predicted_ms, latency=t.latency) for t in tried)
    schedule = best.schedule
    last = finished(job.staircase, schedule.method, schedule.policy, schedule.tokens, schedule.prefix_last)
    return Refined(last, tuple(trials), tuple(seen.values()))


def measured(job: Job, schedules: Sequence[Schedule]) -> list[Tried]:
    """Schedules built and timed in the same rounds as the unpruned model, predictions scaled by its drift."""
    fp32 = job.target.onnx_precision == "fp32"
    exact = {"dense": dense_onnx(job)} | {str(i): pruned_onnx(job, s) for i, s in enumerate(schedules)}
    files = exact if fp32 else {name: nominal_onnx(job, file) for name, file in exact.items()}
    samples = timed(job, files, "schedules against the unpruned model")
    drift = float(np.median(samples["dense"])) / job.staircase.dense.median_ms
    found = []
    for index, schedule in enumerate(schedules):
        mine = samples[str(index)]
        predicted = predict_ms(job.staircase, schedule.tokens, schedule.method, schedule.prefix_last) * drift
        speedup, interval = measure.ratio(samples["dense"], mine)
        latency = Latency(samples_ms=tuple(mine), warmup=measure.WARMUP)
        found.append(Tried(schedule, _fidelity(job, schedule), predicted, latency, speedup, interval))
    off = float(np.median([t.latency.median_ms / t.predicted_ms for t in found])) - 1
    if abs(off) > OFF:
        log.warning("measured %+.0f %% off the prediction: corrected by the measurement", 100 * off)
    return found


def _fidelity(job: Job, schedule: Schedule) -> Candidate | None:
    """On the search pictures; None where nothing is searched."""
    if schedule.policy != "search" or schedule.method == "none":
        return None
    scores = Scores(job)
    score = scores.of(schedule.tokens, schedule.tokens)
    scores.save()
    predicted = predict_ms(job.staircase, schedule.tokens, schedule.method, schedule.prefix_last)
    return Candidate(schedule.tokens, predicted, score.kl, score.agreement, score.top1)


def correction(asked: Goal, used: Goal, last: Tried) -> Goal | None:
    """The goal to give the additive model so that the measurement meets `asked`; None where it does, and narrowly."""
    if asked.speedup is not None and used.speedup is not None:
        error = last.speedup / asked.speedup
        corrected = Goal(speedup=max(used.speedup / error, 1.0))
    elif asked.budget_ms is not None and used.budget_ms is not None:
        error = asked.budget_ms / last.latency.median_ms
        corrected = Goal(budget_ms=used.budget_ms * error)
    else:
        return None
    return corrected if error > 1 + MISS or not meets(asked, last) else None


def meets(goal: Goal, found: Tried | Report) -> bool:
    """Is a latency goal met, or short of it by no more than MISS and by what the 95 % interval leaves open?

    True for a goal that limits no latency.
    """
    if goal.speedup is not None:
        assert found.speedup is not None and found.speedup_interval is not None
        return found.speedup_interval[1] >= goal.speedup and found.speedup >= goal.speedup * (1 - MISS)
    if goal.budget_ms is None:
        return True
    latency = found.latency
    return latency.interval_ms[0] <= goal.budget_ms and latency.median_ms <= goal.budget_ms * (1 + MISS)


def pick(job: Job, tried: Sequence[Tried]) -> Tried:
    """The best by measurement: what the goal asks for of those that meet it; else the fastest."""
    goal = job.options.goal
    if goal.max_drop is not None:
        fastest = sorted(tried[1:], key=lambda t: t.latency.median_ms)
        faster = (t for t in fastest if t.latency.median_ms < tried[0].latency.median_ms)
        return next((t for t in faster if job.drop(t.schedule.tokens) <= goal.max_drop), tried[0])
    if goal.speedup is None and goal.budget_ms is None:
        alpha = 0.5 if goal.alpha is None else goal.alpha
        return max(tried, key=lambda t: alpha * (1 - 1 / t.speedup) + (1 - alpha) * _agreement(t) / 100)
    good = [t for t in tried if meets(goal, t)]
    if good:
        return min(good, key=lambda t: (t.fidelity.kl if t.fidelity else 0.0, t.latency.median_ms))
    return max(tried, key=lambda t: t.speedup)


def _agreement(tried: Tried) -> float:
    return tried.fidelity.agreement if tried.fidelity else 100.0


def nearby(job: Job, best: Tried, tried: Sequence[Tried]) -> list[Schedule]:
    """The most promising neighbours of a searched schedule, by the model corrected with what was measured of it."""
    schedule, goal = best.schedule, job.options.goal
    if best.fidelity is None or not job.options.neighbours:
        return []
    known = {t.schedule.tokens for t in tried}
    last = schedule.vit.depth - (2 if schedule.prefix_last else 1)
    scale = best.latency.median_ms / best.fidelity.predicted_ms
    dense_ms = best.speedup * best.latency.median_ms
    ranked: list[tuple[float, Schedule]] = []
    for tokens in neighbours(schedule.tokens, settled(job.staircase), last):
        if tokens in known:
            continue
        other = finished(job.staircase, schedule.method, schedule.policy, tokens, schedule.prefix_last)
        assert other.predicted_ms is not None
        ms, score = other.predicted_ms * scale, _fidelity(job, other)
        assert score is not None
        limit_ms = goal.limit_ms(dense_ms)
        if goal.max_drop is not None or limit_ms is None:
            alpha = 0.5 if goal.alpha is None else goal.alpha
            ranked.append((alpha * ms / dense_ms - (1 - alpha) * score.agreement / 100, other))
        elif ms <= limit_ms:
            ranked.append((score.kl, other))
    ranked.sort(key=lambda entry: (entry[0], entry[1].tokens))
    return [other for _, other in ranked[: job.options.neighbours]]


def neighbours(tokens: Tokens, levels: Sequence[int], last: int) -> Iterator[Tokens]:
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


def tell_missed(goal: Goal, report: Report) -> None:
    """Warn where the bundle's own measurement misses the goal."""
    if report.speedup is not None and not meets(goal, report):
        ms = report.latency.median_ms
        log.warning("the goal is missed: %.3fx, %.3f ms is the best that was measured", report.speedup, ms)

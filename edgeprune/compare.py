"""Methods side by side at equal measured latency: solved, exported, measured interleaved, evaluated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edgeprune import measure
from edgeprune.errors import InputError, ScheduleError
from edgeprune.job import BIASED, Job, Options
from edgeprune.measure import Samples
from edgeprune.planning import solve
from edgeprune.profiling import staircase_of_model
from edgeprune.realise import dense_onnx, logits_on, pruned_onnx
from edgeprune.records import Latency, Progress, Report, Schedule, Setup, Staircase, sha256_file, silent, write_bytes
from edgeprune.reducers import reducer_named
from edgeprune.schedule import Goal, published_schedule
from edgeprune.target import alone

log = logging.getLogger(__name__)

MISS = 0.03  # of the target speed-up, beyond which a schedule is sought anew
SESSIONS = 3  # in which schedules are corrected at most; one more measures those that are kept


@dataclass(frozen=True)
class Entry:
    """One method, shaped by one policy, for one target speed-up."""

    method: str
    policy: str  # search, or published: the baseline's own shape
    target: float
    schedule: Schedule
    asked: float  # the speed-up given to the additive model, corrected by measurements
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
    job = Job(options, progress)
    with alone(options.work):
        return _compared(job, methods, targets)


def _compared(job: Job, methods: Sequence[str], targets: Sequence[float]) -> Comparison:
    options = job.options
    job.staircase = staircase_of_model(job.target, job.model, tuple(methods), options.exhaustive)
    jobs = {method: job.with_method(method) for method in methods}
    entries: list[Entry] = []
    missing: list[tuple[str, str, float, str]] = []
    for method in methods:
        for policy in ("search", "published"):
            for target in targets if method != "none" else targets[:1]:
                try:
                    schedule = _solved(jobs[method], policy, target)
                except ScheduleError as error:
                    missing.append((method, policy, target, str(error)))
                    continue
                if schedule is not None:
                    entries.append(Entry(method, policy, target, schedule, target))
    entries = _settled(job, jobs, entries)
    samples = _measured(job, [pruned_onnx(jobs[e.method], e.schedule) for e in entries])
    reported = _reported(job, jobs, entries, samples)
    return Comparison(tuple(reported), tuple(missing), job.target.setup, job.staircase)


def _solved(job: Job, policy: str, speedup: float) -> Schedule | None:
    if policy == "search":
        return solve(job, Goal(speedup=speedup))
    limit = job.staircase.dense.median_ms / speedup
    return published_schedule(job.staircase, job.options.method, limit, job.prefix_last)


def _corrected(job: Job, entry: Entry, mine: Sequence[float], dense: Sequence[float]) -> Entry:
    """The entry sought anew where its measured speed-up misses the target; itself where it does not."""
    speedup, _ = measure.ratio(dense, mine)
    if entry.method == "none" or abs(speedup / entry.target - 1) <= MISS:
        return entry
    asked = entry.asked * entry.target / speedup
    log.info("%s, %s: measured %.3fx for %.2fx", entry.method, entry.policy, speedup, entry.target)
    try:
        schedule = _solved(job, entry.policy, max(asked, 1.0))
    except ScheduleError:
        return entry
    return entry if schedule is None else replace(entry, schedule=schedule, asked=asked)


def _settled(job: Job, jobs: dict[str, Job], entries: Sequence[Entry]) -> list[Entry]:
    """For each entry the schedule, of those that a few sessions tried, that meets its target most narrowly."""
    tries: list[list[tuple[float, Entry]]] = [[] for _ in entries]  # measured speed-up, and of what
    for _ in range(SESSIONS):
        samples = _measured(job, [pruned_onnx(jobs[e.method], e.schedule) for e in entries])
        mine = [samples[str(i)] for i in range(len(entries))]
        for found, entry, ms in zip(tries, entries, mine, strict=True):
            found.append((measure.ratio(samples["dense"], ms)[0], entry))
        corrected = [_corrected(jobs[e.method], e, ms, samples["dense"]) for e, ms in zip(entries, mine, strict=True)]
        if [e.schedule for e in corrected] == [e.schedule for e in entries]:
            break
        entries = corrected
    return [_nearest(found) for found in tries]


def _nearest(found: Sequence[tuple[float, Entry]]) -> Entry:
    """The slowest that meets its target, short of MISS; the fastest where none does."""
    met = [(speedup, entry) for speedup, entry in found if speedup >= entry.target * (1 - MISS)]
    return min(met, key=lambda pair: pair[0])[1] if met else max(found, key=lambda pair: pair[0])[1]


def _measured(job: Job, models: Sequence[Path]) -> Samples:
    """Samples of the unpruned model ("dense") and of every entry (by its number), in the same rounds."""
    target = job.target
    files = {str(i): onnx for i, onnx in enumerate(models)}
    files["dense"] = dense_onnx(job)
    rounds = 1 if target.setup.noiseless else job.options.rounds

    def make(path: Path) -> None:
        candidates = {name: target.opener(file) for name, file in files.items()}
        found = measure.interleave(candidates, rounds, progress=job.progress, what=f"{len(files)} engines")
        write_bytes(path, msgspec.json.encode(found))

    hashes = {name: sha256_file(file) for name, file in files.items()}
    path = target.step("session", ".json", (hashes, target.setup, rounds), make)
    return msgspec.json.decode(path.read_bytes(), type=Samples)


def _reported(job: Job, jobs: dict[str, Job], entries: Sequence[Entry], samples: Samples) -> list[Entry]:
    """Entries with their reports, on the pictures that no schedule was chosen on, if enough are left."""
    dense = Latency(samples_ms=tuple(samples["dense"]), warmup=measure.WARMUP)
    drift = dense.median_ms / job.staircase.dense.median_ms
    kept, held_out = job.held_out
    if not held_out:
        log.warning(BIASED, len(kept))
    labels = job.labels_of(kept)
    unpruned = logits_on(job, dense_onnx(job))[kept]
    reported = []
    for index, entry in enumerate(entries):
        own = jobs[entry.method]
        logits = logits_on(own, pruned_onnx(own, entry.schedule))[kept]
        speedup, interval = measure.ratio(samples["dense"], samples[str(index)])
        assert entry.schedule.predicted_ms is not None
        report = Report(
            latency=Latency(samples_ms=tuple(samples[str(index)]), warmup=measure.WARMUP),
            dense_latency=dense,
            speedup=speedup,
            speedup_interval=interval,
            agreement=measure.agreement(unpruned, logits),
            kl=measure.kl_divergence(unpruned, logits),
            top1=measure.top1(logits, labels) if labels else None,
            dense_top1=measure.top1(unpruned, labels) if labels else None,
            images=len(kept),
            held_out=held_out,
            probes=job.staircase.probes,
            predicted_ms=entry.schedule.predicted_ms * drift,
        )
        reported.append(replace(entry, report=report))
    return reported

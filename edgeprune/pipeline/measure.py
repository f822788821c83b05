"""Engines timed beside the unpruned model's in the same rounds, and goals corrected by what that shows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edgeprune import stats
from edgeprune.io import read_bytes, sha256_file, write_bytes
from edgeprune.latency.staircase import predict_ms
from edgeprune.latency.timing import WARMUP, interleave
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.onnx_files import dense_onnx, nominal_onnx, pruned_onnx
from edgeprune.records import Candidate, Latency, Report, Schedule, Staircase
from edgeprune.runtimes.target import Target
from edgeprune.scheduling.goals import Goal

log = logging.getLogger(__name__)

MISS = 0.02  # of the goal, beyond which it counts as missed whatever the noise
OFF = 0.05  # of the prediction, beyond which the user is told


class Measured(NamedTuple):
    """An engine's latency, and its speed-up over the unpruned model where that was timed in the same rounds."""

    latency: Latency
    dense: Latency | None = None
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None


class MeasuredSchedule(NamedTuple):
    """A schedule that was built and timed; its fidelity on the search pictures where it was searched."""

    schedule: Schedule
    predicted_ms: float
    measured: Measured
    fidelity: Candidate | None = None

    @property
    def speedup(self) -> float:
        """Over the unpruned model."""
        assert self.measured.speedup is not None
        return self.measured.speedup


def measured_engines(target: Target, files: Sequence[Path], dense: Path | None, rounds: int) -> list[Measured]:
    """Engines of ONNX files, timed in the same interleaved rounds as that of the unpruned model, if there is one.

    Kept in the work folder by the hashes of the files. Raises EngineError, OutputError.
    """
    rounds = 1 if target.setup.noiseless else rounds
    everything = [*files, *([dense] if dense else [])]
    what = f"timing {len(everything)} engines"

    def make(path: Path) -> None:
        openers = dict(enumerate(target.opener(file) for file in everything))
        samples = interleave(openers, rounds, progress=target.progress, what=what)
        write_bytes(path, msgspec.json.encode([samples[i] for i in range(len(everything))]))

    parts = ([sha256_file(file) for file in everything], dense is not None, target.setup, rounds)
    path = target.step("latency", ".json", parts, make)
    latencies = [
        Latency(samples_ms=tuple(ms), warmup=WARMUP)
        for ms in msgspec.json.decode(read_bytes(path), type=list[list[float]])
    ]
    if dense is None:
        return [Measured(latency) for latency in latencies]
    unpruned = latencies.pop()
    found = []
    for latency in latencies:
        speedup, interval = stats.ratio(unpruned.samples_ms, latency.samples_ms)
        found.append(Measured(latency, unpruned, speedup, interval))
    return found


def measured_schedules(
    context: Context, staircase: Staircase, schedules: Sequence[Schedule]
) -> list[MeasuredSchedule]:
    """Schedules exported, compiled and timed beside the unpruned model; predictions scaled by its drift."""
    files = [nominal_onnx(context, pruned_onnx(context.with_method(s.method), s)) for s in schedules]
    dense = nominal_onnx(context, dense_onnx(context))
    found = [
        MeasuredSchedule(schedule, predicted_ms(staircase, schedule, measured), measured)
        for schedule, measured in zip(
            schedules, measured_engines(context.target, files, dense, context.options.rounds), strict=True
        )
    ]
    off = float(np.median([m.measured.latency.median_ms / m.predicted_ms for m in found])) - 1
    if abs(off) > OFF:
        way = "above" if off > 0 else "below"
        log.warning("measured latency is %.0f %% %s the prediction; using the measurement", 100 * abs(off), way)
    return found


def predicted_ms(staircase: Staircase, schedule: Schedule, measured: Measured) -> float:
    """Prediction of the additive model, ms, scaled by how the unpruned model has drifted since the staircase."""
    drift = measured.dense.median_ms / staircase.dense.median_ms if measured.dense else 1.0
    return predict_ms(staircase, schedule.tokens, schedule.method, schedule.prefix_last) * drift


def report_of(measured: Measured, schedule: Schedule, staircase: Staircase | None) -> Report:
    """What was measured of an engine, as a report without fidelity."""
    return Report(
        latency=measured.latency,
        dense_latency=measured.dense,
        speedup=measured.speedup,
        speedup_interval=measured.speedup_interval,
        probes=staircase.probes if staircase else 0,
        predicted_ms=predicted_ms(staircase, schedule, measured) if staircase else None,
    )


def corrected_goal(asked: Goal, used: Goal, measured: Measured) -> Goal | None:
    """The goal to give the additive model so that the measurement meets `asked`.

    None where it is met and exceeded by no more than MISS, or limits no latency.
    """
    if asked.speedup is not None and used.speedup is not None:
        assert measured.speedup is not None
        error = measured.speedup / asked.speedup
        corrected = Goal(speedup=max(used.speedup / error, 1.0))
    elif asked.budget_ms is not None and used.budget_ms is not None:
        error = asked.budget_ms / measured.latency.median_ms
        corrected = Goal(budget_ms=used.budget_ms * error)
    else:
        return None
    return corrected if error > 1 + MISS or not meets(asked, measured) else None


def meets(goal: Goal, found: Measured | Report) -> bool:
    """Is a latency goal met, or missed by no more than MISS and by what the 95 % interval leaves open?

    True for a goal that limits no latency.
    """
    if goal.speedup is not None:
        assert found.speedup is not None and found.speedup_interval is not None
        return found.speedup_interval[1] >= goal.speedup and found.speedup >= goal.speedup * (1 - MISS)
    if goal.budget_ms is None:
        return True
    latency = found.latency
    return latency.interval_ms[0] <= goal.budget_ms and latency.median_ms <= goal.budget_ms * (1 + MISS)


def warn_if_missed(goal: Goal, report: Report) -> None:
    """Warn where the bundle's own measurement misses the goal."""
    if report.speedup is not None and not meets(goal, report):
        ms = report.latency.median_ms
        log.warning("goal not met: the best measured is %.3fx, %.3f ms", report.speedup, ms)

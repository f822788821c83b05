"""Time engines and the unpruned model in the same rounds, and correct a latency goal by the measurement."""

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
from edgeprune.latency.timing import UNLIMITED, WARMUP, WARMUP_MS, Room, interleave
from edgeprune.onnx_graph.graph import weights_of
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.onnx_files import dense_onnx, nominal_onnx, precise_onnx, pruned_onnx
from edgeprune.records import Candidate, DenseFidelity, Latency, Report, Schedule, Staircase
from edgeprune.runtimes.target import Target
from edgeprune.scheduling.goals import Goal
from edgeprune.stats import ROUNDING
from edgeprune.tasks import points_from

log = logging.getLogger(__name__)

FINAL = "final"  # the session whose figures are reported; no schedule is chosen by it
MISS = 0.02  # relative error beyond which a goal counts as missed whatever the noise
OFF = 0.05  # relative error of the prediction beyond which a warning is logged
OPEN_SHARE = 0.7  # of the free memory, for engines that are open at once
COPIES = 1.5  # of its weights that a session of ONNX Runtime holds, roughly; others know their size


class Measured(NamedTuple):
    """The latency of an engine, and its speed-up if the unpruned model was timed in the same rounds."""

    latency: Latency
    dense: Latency | None = None
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None


class MeasuredSchedule(NamedTuple):
    """A schedule that was built and timed, with its fidelity on the search pictures if the search found it."""

    schedule: Schedule
    predicted_ms: float
    measured: Measured
    fidelity: Candidate | None = None

    @property
    def speedup(self) -> float:
        """Speed-up over the unpruned model."""
        assert self.measured.speedup is not None
        return self.measured.speedup


def interleaved(engines: Sequence[tuple[Target, Path]], rounds: int, session: str = "") -> list[Latency]:
    """Latencies of the engines of ONNX files, each on its target (they differ in precision alone), in one session.

    The result is kept in the work folder under the hashes of the files and the name of the session: the engines of a
    session of another name are timed again. Raises EngineError, OutputError.
    """
    target = engines[0][0]
    rounds = 1 if target.setup.noiseless else rounds
    what = f"timing {len(engines)} engines, round"

    def make(path: Path) -> None:
        openers = dict(enumerate(own.opener(file) for own, file in engines))
        graphs: dict[int, bool | None] = {}
        warmup_ms = 0.0 if target.setup.noiseless else WARMUP_MS
        with target.alone():
            samples = interleave(
                openers, rounds, progress=target.progress, what=what, warmup_ms=warmup_ms, graphs=graphs,
                room=room_for(engines),
            )  # fmt: skip
        found = [Latency(samples_ms=tuple(samples[i]), warmup=WARMUP, cuda_graph=graphs.get(i)) for i in openers]
        write_bytes(path, msgspec.json.encode(found))

    parts = ([(sha256_file(file), own.setup) for own, file in engines], rounds, session)
    path = target.work.step("latency", ".json", parts, make)
    return msgspec.json.decode(read_bytes(path), type=list[Latency])


def room_for(engines: Sequence[tuple[Target, Path]]) -> Room:
    """The memory for the engines of ONNX files, which have a common device."""
    free_bytes = engines[0][0].runtime.free_bytes()
    if free_bytes is None:
        return UNLIMITED
    sizes = [sum(part.stat().st_size for part in (file, *weights_of(file))) for _, file in engines]
    return Room(OPEN_SHARE * free_bytes, round(COPIES * max(sizes)))


def measured_engines(
    target: Target,
    files: Sequence[Path],
    dense: Path | None,
    rounds: int,
    rivals: Sequence[tuple[Target, Path]] = (),
    session: str = "",
) -> list[Measured]:
    """Engines of ONNX files, then `rivals` in other precisions, timed together with the unpruned model `dense`.

    `session` is as in `interleaved`. Raises EngineError, OutputError.
    """
    ends = [(target, dense)] if dense else []
    latencies = interleaved([*((target, file) for file in files), *rivals, *ends], rounds, session)
    if dense is None:
        return [Measured(latency) for latency in latencies]
    unpruned = latencies.pop()
    found = []
    for latency in latencies:
        speedup, interval = stats.ratio(unpruned.samples_ms, latency.samples_ms)
        found.append(Measured(latency, unpruned, speedup, interval))
    return found


def measured_schedules(
    context: Context, staircase: Staircase, schedules: Sequence[Schedule], session: str = ""
) -> list[MeasuredSchedule]:
    """Export and compile schedules and time them with the unpruned model; predictions are scaled by its drift.

    `session` is as in `interleaved`; in the FINAL one, INT8 and FP8 files have calibrated ranges, and the layers that
    calibration leaves in floating point. The unpruned model has none of these. Raises ExportError, EngineError,
    OutputError.
    """
    converted = precise_onnx if session == FINAL else nominal_onnx
    files = [converted(context, pruned_onnx(context.with_method(s.method), s)) for s in schedules]
    dense = nominal_onnx(context, dense_onnx(context))
    timed = measured_engines(context.target, files, dense, context.options.rounds, session=session)
    found = [
        MeasuredSchedule(schedule, predicted_ms(staircase, schedule, measured), measured)
        for schedule, measured in zip(schedules, timed, strict=True)
    ]
    off = float(np.median([m.measured.latency.median_ms / m.predicted_ms for m in found])) - 1
    if abs(off) > OFF:
        way = "above" if off > 0 else "below"
        log.warning("measured latency is %.0f %% %s the prediction; using the measurement", 100 * abs(off), way)
    return found


def predicted_ms(staircase: Staircase, schedule: Schedule, measured: Measured) -> float:
    """Prediction of the additive model, ms, scaled by the drift of the unpruned model since the staircase."""
    drift = measured.dense.median_ms / staircase.dense.median_ms if measured.dense else 1.0
    return predict_ms(staircase, schedule.tokens, schedule.method, schedule.prefix_last) * drift


def report_of(measured: Measured, schedule: Schedule, staircase: Staircase | None) -> Report:
    """A report with the latency of an engine, without fidelity."""
    return Report(
        latency=measured.latency,
        dense_latency=measured.dense,
        speedup=measured.speedup,
        speedup_interval=measured.speedup_interval,
        probes=staircase.probes if staircase else 0,
        predicted_ms=predicted_ms(staircase, schedule, measured) if staircase else None,
    )


def corrected_goal(asked: Goal, found: MeasuredSchedule, dense_ms: float) -> Goal | None:
    """The goal to give the additive model so that the measurement meets `asked`, from its error for one schedule.

    A schedule can be predicted to be faster than the goal that it was found for, so the error is that of the
    prediction, not the distance from the goal. `dense_ms` is the unpruned latency in the staircase. None where
    `asked` is met and exceeded by no more than MISS, and for goals that do not limit latency.
    """
    measured = found.measured
    if not asked.limits_latency:
        return None
    assert measured.dense is not None and measured.speedup is not None
    ratio = measured.dense.median_ms / found.predicted_ms / measured.speedup  # predicted over measured speed-up
    if asked.speedup is not None:
        exceeded = measured.speedup / asked.speedup
        corrected = Goal(speedup=max(asked.speedup * ratio, 1.0))
    else:
        assert asked.budget_ms is not None
        exceeded = asked.budget_ms / measured.latency.median_ms
        drift = measured.dense.median_ms / dense_ms
        corrected = Goal(budget_ms=asked.budget_ms * found.predicted_ms / drift / measured.latency.median_ms)
    return corrected if exceeded > 1 + MISS or not meets(asked, measured) else None


def meets(goal: Goal, found: Measured | Report) -> bool:
    """Is a latency goal met? The 95 % interval has to contain it, and the median may miss it by MISS at most.

    True for a goal that does not limit latency.
    """
    if goal.speedup is not None:
        assert found.speedup is not None and found.speedup_interval is not None
        return found.speedup_interval[1] >= goal.speedup and found.speedup >= goal.speedup * (1 - MISS)
    if goal.budget_ms is None:
        return True
    latency = found.latency
    return latency.interval_ms[0] <= goal.budget_ms and latency.median_ms <= goal.budget_ms * (1 + MISS)


def warn_if_missed(goal: Goal, report: Report) -> None:
    """Log a warning if the final measurement misses the goal, or a bound on the loss on the final pictures."""
    cosine = report.fidelity.cosine if report.fidelity else None
    error = report.fidelity.error if isinstance(report.fidelity, DenseFidelity) else None
    lost = points_from(report.dense_top1, report.top1, report.agreement)
    if goal.max_error is not None and error is not None and error > goal.max_error:
        missed, advice = error, "higher"
    elif goal.min_cosine is not None and cosine is not None and cosine < goal.min_cosine:
        missed, advice = cosine, "lower"
    elif goal.max_drop is not None and lost is not None and lost > goal.max_drop + ROUNDING:
        missed, advice = lost, "higher"
    else:
        missed, advice = None, ""
    if missed is not None:
        log.warning(
            "the goal (%s) is not met on the %d %s: it is %.4f; allow a %s one, or use more --search-images",
            goal, report.images, "held-out pictures" if report.held_out else "evaluation pictures",
            missed, advice,
        )  # fmt: skip
    if report.speedup is not None and not meets(goal, report):
        ms = report.latency.median_ms
        log.warning(
            "the goal (%s) is not met: measured %.3fx, %.3f ms; relax the goal",
            goal, report.speedup, ms,
        )  # fmt: skip

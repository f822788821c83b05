"""`--precision auto`: a build in every precision that the device has; the fastest that loses little is kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import msgspec

from edgeprune.bundles.format import check_out
from edgeprune.errors import DeviceError, EngineError, ExportError, MissingError, ScheduleError
from edgeprune.pipeline.build import Built, evaluated_schedule, written
from edgeprune.pipeline.context import Context, Options, context_for
from edgeprune.pipeline.evaluate import Evaluated
from edgeprune.pipeline.measure import Measured, interleaved, meets
from edgeprune.pipeline.refine import Refined
from edgeprune.records import DenseFidelity, PrecisionResult, Progress, Report, silent
from edgeprune.runtimes.kernel_times import BYTES
from edgeprune.runtimes.target import PRECISIONS
from edgeprune.scheduling.goals import Goal

log = logging.getLogger(__name__)

# What keeps one precision from being built; anything else ends the whole build.
OBSTACLES = (DeviceError, EngineError, ExportError, MissingError, ScheduleError)


@dataclass(frozen=True)
class PrecisionBuild:
    """A build in one precision that lacks nothing but its bundle."""

    context: Context
    refined: Refined
    evaluated: Evaluated


def build_fastest(options: Options, progress: Progress = silent) -> Built:
    """Build in every precision and write the bundle of the best (`best_of`); `options.precision` does not count.

    A precision is accepted if the same schedule in the next wider accepted one, and in fp32, is slower and little
    better (`evaluate.gate`). All that were built are then timed together. Raises any EdgepruneError; what keeps a
    precision other than fp32 from being built is its reason in `Built.precisions` instead.
    """
    first = context_for(replace(options, precision=PRECISIONS[0]), progress)
    first.needed_pictures()
    with first.target.work.lock():
        results: list[PrecisionResult] = []
        built: dict[str, PrecisionBuild] = {}
        obstacles: list[Exception] = []
        for precision in PRECISIONS:
            log.info("precision auto: %s", precision)
            try:
                build = _build_at(first, precision, results)
            except OBSTACLES as error:
                if precision == PRECISIONS[0] and not isinstance(error, ScheduleError):
                    raise
                obstacles.append(error)
                results.append(PrecisionResult(precision=precision, reason=str(error)))
            else:
                built[precision] = build
                results.append(result_of(precision, build.evaluated))
        if not any(result.accepted for result in results):
            raise next(error for error in reversed(obstacles) if isinstance(error, ScheduleError))
        engines = [(each.context.target, each.evaluated.onnx) for each in built.values()]
        latencies = dict(zip(built, interleaved(engines, options.rounds), strict=True))
        timed = [msgspec.structs.replace(r, latency=latencies.get(r.precision)) for r in results]
        best = best_of(timed, options.goal, common_losses(built))
        log.info("precision auto: keeping %s", best)
        chosen = built[best]
        finished = written(chosen.context, chosen.refined, chosen.evaluated)
        return replace(finished, precisions=explained(timed, best, options.goal))


def _build_at(first: Context, precision: str, results: Sequence[PrecisionResult]) -> PrecisionBuild:
    """Everything but the bundle in one precision; `results` are those of the precisions before."""
    context = first.at(precision)
    check_out(context.out, context.target.work.path)
    return PrecisionBuild(context, *evaluated_schedule(context, wider_of(precision, results)))


def wider_of(precision: str, results: Sequence[PrecisionResult]) -> tuple[str, ...]:
    """What a precision is judged against: the next wider one that was accepted, and fp32."""
    accepted = [r.precision for r in results if r.accepted and BYTES[r.precision] > BYTES[precision]]
    return tuple(dict.fromkeys([*accepted[-1:], PRECISIONS[0]])) if precision != PRECISIONS[0] else ()


def result_of(precision: str, evaluated: Evaluated) -> PrecisionResult:
    """The result of a build that was evaluated, without its latency."""
    report, refused = evaluated.report, evaluated.refused
    return PrecisionResult(
        precision=precision, top1=report.top1, agreement=report.agreement, kl=report.kl,
        cosine=report.fidelity.cosine if report.fidelity else None, error=error_of(report),
        accepted=refused is None, reason=refused,
    )  # fmt: skip


def error_of(report: Report) -> float | None:
    """The relative error of dense features; None for the others."""
    return report.fidelity.error if isinstance(report.fidelity, DenseFidelity) else None


def common_losses(built: Mapping[str, PrecisionBuild]) -> dict[str, float]:
    """Mean loss (KL) of each precision on the pictures that the reports of all have in common."""
    each = {precision: build.evaluated.losses or {} for precision, build in built.items()}
    common = sorted(set.intersection(*map(set, each.values())))
    return {precision: fmean(losses[i] for i in common) for precision, losses in each.items()}


def best_of(results: Sequence[PrecisionResult], goal: Goal, losses: Mapping[str, float]) -> str:
    """The fastest accepted precision; for a latency budget the one with the lowest loss that keeps to it.

    `losses` are of the same pictures for all precisions, unlike the figures of the results. Each precision has its
    own schedule. All schedules for a budget are about as fast, and a faster precision prunes less for it.
    """
    accepted = [(r, r.latency) for r in results if r.accepted and r.latency is not None]
    if goal.budget_ms is not None:
        met = [(r, latency) for r, latency in accepted if meets(goal, Measured(latency))]
        if met:
            return min(met, key=lambda pair: (losses[pair[0].precision], pair[1].median_ms))[0].precision
    return min(accepted, key=lambda pair: pair[1].median_ms)[0].precision


def explained(results: Sequence[PrecisionResult], best: str, goal: Goal) -> tuple[PrecisionResult, ...]:
    """The results, with a reason for each that was accepted but not chosen."""
    why = f"{best} is faster" if goal.budget_ms is None else f"{best} is better for the budget"
    return tuple(msgspec.structs.replace(r, reason=why) if r.accepted and r.precision != best else r for r in results)

"""Model to bundle: staircase, schedule, ONNX, engine, measurement. Steps found in the work folder are reused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edgeprune.bundles.format import check_out
from edgeprune.errors import PrecisionError
from edgeprune.images import normalise
from edgeprune.pipeline.context import Context, Options, context_for
from edgeprune.pipeline.evaluate import Evaluated, evaluate
from edgeprune.pipeline.export import metadata_of
from edgeprune.pipeline.measure import warn_if_missed
from edgeprune.pipeline.onnx_files import layers_in_int8
from edgeprune.pipeline.profile import measured_staircase
from edgeprune.pipeline.recovery import Recovered, recover_best
from edgeprune.pipeline.refine import Refined, refine
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.pipeline.write import bundle_from_onnx, noise_batch
from edgeprune.records import (
    BuildTrace,
    Manifest,
    ModelMetadata,
    PrecisionResult,
    Progress,
    Sample,
    Staircase,
    Trial,
    silent,
)

log = logging.getLogger(__name__)

SHOWN = 4  # pictures on the report page of a bundle


@dataclass(frozen=True)
class Built:
    """A finished build."""

    path: Path
    manifest: Manifest
    staircase: Staircase
    precisions: tuple[PrecisionResult, ...] = ()  # what --precision auto tried


def build(options: Options, progress: Progress = silent) -> Built:
    """Build a bundle. Raises any EdgepruneError; nothing half-written is left."""
    context = context_for(options, progress)
    check_out(context.out, context.target.work.path)
    with context.target.work.lock():
        refined, evaluated = evaluated_schedule(context)
        if evaluated.refused is not None:
            raise PrecisionError(
                f"{options.precision} is refused because {evaluated.refused}: build with --precision fp32 or auto"
            )
        return written(context, refined, evaluated)


def evaluated_schedule(context: Context, wider: Sequence[str] | None = None) -> tuple[Refined, Evaluated]:
    """All steps but the last: staircase, schedule, engine, measurement, fidelity. `wider` is as in `evaluate`."""
    options = context.options
    steps = 5 if context.recovery else 4
    name = context.model.vit.name
    log.info("step 1 of %d: measuring the latency staircase of %s on %s", steps, name, options.device)
    staircase = measured_staircase(context.target, context.model, (context.method,), options.exhaustive)
    log.info(
        "step 2 of %d: searching for a schedule (goal: %s), then building and timing the best", steps, options.goal
    )
    refined = refine(context, staircase, ScheduleScores(context))
    recovered = None
    if context.recovery is not None:
        log.info("step 3 of %d: recovering accuracy on %d pictures", steps, len(context.recovery.files))
        schedule, recovered = recover_best(
            context, [refined.schedule, *refined.rivals], partial(layers_in_int8, context)
        )
        refined = refined._replace(schedule=schedule)
    log.info(
        "step %d of %d: measuring and evaluating the chosen schedule against the unpruned model", steps - 1, steps
    )
    evaluated = evaluate(context, refined.staircase, refined.schedule, wider, recovered)
    warn_if_missed(options.goal, evaluated.report)
    return refined, evaluated


def written(context: Context, refined: Refined, evaluated: Evaluated) -> Built:
    """The last step: write the bundle. Raises EngineError, OutputError."""
    log.info("last step: writing the bundle %s", context.out)
    pictures, batch, recovered = context.pictures, context.options.batch, evaluated.recovered
    record = recovered.record if recovered else None
    metadata = metadata_of(context.model, refined.schedule, pictures.files.class_names if pictures else None, record)
    if pictures is not None and evaluated.steadiest is not None:
        golden = pictures.pixels[np.resize(evaluated.steadiest, batch)]
        example = normalise(golden, pictures.how)
    else:
        example = noise_batch(metadata.vit, batch)
    manifest = bundle_from_onnx(
        context.target, context.out, evaluated.onnx, metadata, evaluated.report, example, refined.staircase,
        trace=lambda: build_trace(context, metadata, refined, recovered), asked=str(context.options.goal),
    )  # fmt: skip
    return Built(context.out, manifest, refined.staircase)


def build_trace(
    context: Context, metadata: ModelMetadata, refined: Refined, recovered: Recovered | None = None
) -> BuildTrace:
    """How a build chose its schedule: what it evaluated, what it built and timed, the effect on a few pictures."""
    from edgeprune.vit.token_groups import samples_of

    samples: tuple[Sample, ...] = ()
    pictures = context.pictures
    if pictures is not None and metadata.schedule.cuts:
        shown = np.unique(np.linspace(0, len(pictures.pixels) - 1, SHOWN).astype(int))
        samples = samples_of(
            context.model, metadata.schedule, pictures.pixels[shown], pictures.labels(shown), metadata.labels,
            recovered.model if recovered else None, context.task,
        )  # fmt: skip
    trials = (
        Trial(tokens=m.schedule.tokens, predicted_ms=m.predicted_ms, latency=m.measured.latency)
        for m in refined.measured
    )
    return BuildTrace(candidates=refined.candidates, trials=tuple(trials), samples=samples)

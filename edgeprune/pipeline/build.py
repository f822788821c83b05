"""Model to bundle: staircase, schedule, ONNX, engine, measurement. Steps found in the work folder are reused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeprune.bundles.format import check_out
from edgeprune.errors import PrecisionError
from edgeprune.images import normalise
from edgeprune.pipeline.context import Context, Options, context_for
from edgeprune.pipeline.evaluate import Evaluated, evaluate
from edgeprune.pipeline.export import metadata_of
from edgeprune.pipeline.measure import warn_if_missed
from edgeprune.pipeline.profile import measured_staircase
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
    check_out(context.out)
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
    log.info("step 1 of 4: measuring the latency staircase of %s on %s", context.model.vit.name, options.device)
    staircase = measured_staircase(context.target, context.model, (context.method,), options.exhaustive)
    log.info("step 2 of 4: searching for a schedule (goal: %s), then building and timing the best", options.goal)
    refined = refine(context, staircase, ScheduleScores(context))
    log.info("step 3 of 4: measuring and evaluating the chosen schedule against the unpruned model")
    evaluated = evaluate(context, refined.staircase, refined.schedule, wider)
    warn_if_missed(options.goal, evaluated.report)
    return refined, evaluated


def written(context: Context, refined: Refined, evaluated: Evaluated) -> Built:
    """The last step: write the bundle. Raises EngineError, OutputError."""
    log.info("step 4 of 4: writing the bundle %s", context.out)
    pictures, batch = context.pictures, context.options.batch
    metadata = metadata_of(context.model, refined.schedule, pictures.files.class_names if pictures else None)
    if pictures is not None and evaluated.steadiest is not None:
        golden = pictures.pixels[np.resize(evaluated.steadiest, batch)]
        example = normalise(golden, pictures.how)
    else:
        example = noise_batch(metadata.vit, batch)
    manifest = bundle_from_onnx(
        context.target, context.out, evaluated.onnx, metadata, evaluated.report, example, refined.staircase,
        trace=lambda: build_trace(context, metadata, refined),
    )  # fmt: skip
    return Built(context.out, manifest, refined.staircase)


def build_trace(context: Context, metadata: ModelMetadata, refined: Refined) -> BuildTrace:
    """How a build chose its schedule: what it evaluated, what it built and timed, the effect on a few pictures."""
    from edgeprune.vit.token_groups import samples_of

    samples: tuple[Sample, ...] = ()
    pictures = context.pictures
    if pictures is not None and metadata.schedule.cuts:
        shown = np.unique(np.linspace(0, len(pictures.pixels) - 1, SHOWN).astype(int))
        samples = samples_of(
            context.model, metadata.schedule, pictures.pixels[shown], pictures.labels(shown), metadata.labels
        )
    trials = (
        Trial(tokens=m.schedule.tokens, predicted_ms=m.predicted_ms, latency=m.measured.latency)
        for m in refined.measured
    )
    goal = str(context.options.goal)
    return BuildTrace(asked=goal, candidates=refined.candidates, trials=tuple(trials), samples=samples)

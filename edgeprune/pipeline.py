"""Model to bundle: staircase, schedule, ONNX, engine, measurement. What the work folder holds is not redone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune import export
from edgeprune.bundle import check_out
from edgeprune.compiling import bundle_from_onnx, example_of
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.images import ImageSet, batches, load_pixels, normalise
from edgeprune.job import Job, Options
from edgeprune.planning import check_policy, solve
from edgeprune.precision import CONVERSIONS, calibrated, int8
from edgeprune.records import Card, Manifest, Progress, Report, Schedule, Staircase, load, silent
from edgeprune.refine import CALIBRATION_IMAGES, CORRECTIONS, Attempt, best_of, correction, realise
from edgeprune.target import alone

if TYPE_CHECKING:
    import onnx

    from edgeprune.models import Model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A finished build."""

    path: Path
    manifest: Manifest
    staircase: Staircase


def build(options: Options, progress: Progress = silent) -> Built:
    """Model to bundle. Raises any EdgepruneError; nothing half-written is left."""
    check_policy(options.policy)
    check_out(options.folder())
    with alone(options.work):
        return _built(options, progress)


def _built(options: Options, progress: Progress) -> Built:
    job = Job(options, progress)
    goal = options.goal
    attempts: list[Attempt] = []
    for attempt in range(CORRECTIONS + 1):
        schedule = solve(job, goal)
        onnx, report = realise(job, schedule)
        attempts.append(Attempt(schedule, onnx, report))
        corrected = correction(job, options.goal, goal, report)
        if corrected is None or attempt == CORRECTIONS:
            break
        log.info("measured %.3fx, correcting the goal by it", report.speedup)
        try:
            if solve(job, corrected).tokens == schedule.tokens:
                break
        except EdgepruneError:  # the corrected goal is beyond what the model can give: keep what was built
            log.info("no schedule is faster: keeping the one that was measured")
            break
        goal = corrected
    schedule, onnx, report = best_of(attempts, options.goal)
    return Built(options.folder(), _bundle(job, schedule, onnx, report), job.staircase)


def _bundle(job: Job, schedule: Schedule, onnx: Path, report: Report) -> Manifest:
    """Write the bundle, unless the very same one is already there."""
    options, model = job.options, job.model
    card = card_for(model, schedule, job.pictures.class_names if job.pictures else None)
    if job.pictures is not None:
        index = np.arange(options.batch) % len(job.pixels)
        example = normalise(job.pixels[index], model.preprocessing)
    else:
        example = example_of(card, options.batch, None)
    return bundle_from_onnx(job.target, options.folder(), onnx, card, report, example, job.staircase)


def card_for(model: Model, schedule: Schedule, class_names: tuple[str, ...] | None) -> Card:
    """What an exported file says of itself."""
    from edgeprune.models import class_labels

    labels = class_labels(model.vit, class_names)
    return Card(vit=model.vit, schedule=schedule, preprocessing=model.preprocessing, labels=labels)


def export_model(
    model: Model,
    schedule: Path | None,
    batch: int,
    out: Path,
    precision: str = "fp32",
    pictures: ImageSet | None = None,
    progress: Progress = silent,
) -> Path:
    """Write a pruned or, without a schedule, the unpruned model; its card lies in the metadata.

    `pictures` give the INT8 ranges. Raises InputError, ExportError, OutputError.
    """
    import torch

    from edgeprune.fidelity import pruned_module

    vit, how = model.vit, model.preprocessing
    found = Schedule(vit=vit, method="none", policy="search", tokens=(vit.tokens,) * vit.depth)
    if schedule is not None:
        found = load(schedule, Schedule)
        if found.vit != vit:
            raise InputError(f"{schedule} is of {found.vit.name} with other weights: make it for this model")
    if precision == "int8" and pictures is None:
        raise InputError("INT8 ranges come from pictures: pass --images DIR|CSV")
    card = card_for(model, found, pictures.class_names if pictures else None)

    def quantised(graph: onnx.ModelProto) -> onnx.ModelProto:
        assert pictures is not None
        pixels = load_pixels(pictures.part(CALIBRATION_IMAGES).paths, how)
        ranges = calibrated(graph, [images for images, _ in batches(pixels, how, batch)], progress)
        return int8(graph, ranges.ranges, ranges.kept)

    example = torch.zeros(batch, 3, vit.image_px, vit.image_px)
    module = pruned_module(model, found.method, found.tokens, found.prefix_last)
    convert = quantised if precision == "int8" else CONVERSIONS.get(precision)
    export.onnx_from_module(module, example, out, convert=convert, card=card)
    return out

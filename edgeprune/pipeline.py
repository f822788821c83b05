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
from edgeprune.errors import InputError
from edgeprune.images import ImageSet, batches, calibration_indices, load_pixels, normalise
from edgeprune.job import Job, Options
from edgeprune.planning import check_policy
from edgeprune.precision import CONVERSIONS, calibrated, int8
from edgeprune.realise import realise
from edgeprune.records import Card, Manifest, Progress, Sample, Schedule, Staircase, Story, load, silent
from edgeprune.refine import Refined, refine, tell_missed
from edgeprune.target import alone

if TYPE_CHECKING:
    import onnx

    from edgeprune.models import Model

log = logging.getLogger(__name__)

SHOWN = 4  # pictures on the page of a bundle


@dataclass(frozen=True)
class Built:
    """A finished build."""

    path: Path
    manifest: Manifest
    staircase: Staircase


def build(options: Options, progress: Progress = silent) -> Built:
    """Model to bundle. Raises any EdgepruneError; nothing half-written is left."""
    check_policy(options.policy)
    job = Job(options, progress)
    check_out(options.folder())
    with alone(options.work):
        return _built(job)


def _built(job: Job) -> Built:
    options = job.options
    refined = refine(job)
    onnx, report, steady = realise(job, refined.schedule)
    tell_missed(options.goal, report)
    card = card_for(job.model, refined.schedule, job.pictures.class_names if job.pictures else None)
    if steady is None:
        example = example_of(card, options.batch, None)
    else:
        example = normalise(job.pixels[np.resize(steady, options.batch)], job.model.preprocessing)

    def story() -> Story:
        return _story(job, card, refined)

    manifest = bundle_from_onnx(job.target, options.folder(), onnx, card, report, example, job.staircase, story=story)
    return Built(options.folder(), manifest, job.staircase)


def _story(job: Job, card: Card, refined: Refined) -> Story:
    """How a build came to its schedule: what was weighed, what was built, and what that does to pictures."""
    from edgeprune.explain import samples_of

    samples: tuple[Sample, ...] = ()
    if job.pictures is not None and card.schedule.cuts:
        shown = sorted({*np.linspace(0, len(job.pixels) - 1, SHOWN).astype(int).tolist()})
        labels = [job.pictures.labels[i] for i in shown] if job.pictures.labels else None
        samples = samples_of(job.model, card.schedule, job.pixels[shown], labels, card.labels)
    return Story(asked=str(job.options.goal), candidates=refined.weighed, trials=refined.trials, samples=samples)


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
        pixels = load_pixels([pictures.paths[i] for i in calibration_indices(len(pictures))], how)
        ranges = calibrated(graph, [images for images, _ in batches(pixels, how, batch)], progress)
        return int8(graph, ranges.ranges, ranges.kept)

    example = torch.zeros(batch, 3, vit.image_px, vit.image_px)
    module = pruned_module(model, found.method, found.tokens, found.prefix_last)
    convert = quantised if precision == "int8" else CONVERSIONS.get(precision)
    export.onnx_from_module(module, example, out, convert=convert, card=card)
    return out

"""Model to bundle: staircase, schedule, ONNX, engine, measurement. What the work folder holds is not redone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune import export
from edgeprune.bundle import DEVICE, MANIFEST, ONNX, check_out, load_bundle, write_bundle
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.graph import attention_forms, load_graph
from edgeprune.images import normalise
from edgeprune.job import Job, Options
from edgeprune.planning import POLICIES, on_exact_edges, solve
from edgeprune.plots import staircase_svg
from edgeprune.precision import CONVERSIONS
from edgeprune.records import (
    Engine,
    Manifest,
    Progress,
    Report,
    Schedule,
    Staircase,
    encode,
    load,
    sha256_file,
    silent,
)
from edgeprune.refine import CORRECTIONS, Attempt, best_of, correction, realise
from edgeprune.runtimes import Inspected, Session

if TYPE_CHECKING:
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
    if options.policy not in POLICIES:
        raise InputError(f"unknown policy {options.policy!r}: choose search or paper")
    job = Job(options, progress)
    check_out(options.folder())
    goal = options.goal
    attempts: list[Attempt] = []
    for attempt in range(CORRECTIONS + 1):
        schedule = on_exact_edges(job, solve(job, goal))
        onnx, report = realise(job, schedule)
        attempts.append(Attempt(job.staircase, schedule, onnx, report))
        corrected = correction(job, options.goal, goal, report)
        if corrected is None or attempt == CORRECTIONS:
            break
        log.info("measured %.3fx, correcting the goal by it", report.speedup)
        try:
            if on_exact_edges(job, solve(job, corrected)).tokens == schedule.tokens:
                break
        except EdgepruneError:  # the corrected goal is beyond what the model can give: keep what was built
            log.info("no schedule is faster: keeping the one that was measured")
            break
        goal = corrected
    best = best_of(attempts, options.goal)
    return Built(options.folder(), _bundle(job, *best), best.staircase)


def _bundle(job: Job, staircase: Staircase, schedule: Schedule, onnx: Path, report: Report) -> Manifest:
    """Write the bundle, unless the very same one is already there."""
    from edgeprune.models import class_labels

    options, model = job.options, job.model
    out = options.folder()
    engine_file = job.target.engine(onnx)
    engine = Engine(
        path=f"model{engine_file.suffix}",
        sha256=sha256_file(engine_file),
        onnx_sha256=sha256_file(onnx),
        size_bytes=engine_file.stat().st_size,
        setup=job.target.setup,
    )
    if (out / MANIFEST).is_file():
        try:
            old = load_bundle(out)
        except EdgepruneError:
            old = None
        if old and (old.engine, old.schedule, old.report) == (engine, schedule, report):
            log.info("bundle: reused %s", out)
            return old
    if job.pictures is not None:
        index = np.arange(options.batch) % len(job.pixels)
        batch = normalise(job.pixels[index], model.preprocessing)
    else:
        shape = (options.batch, 3, model.vit.image_px, model.vit.image_px)
        batch = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with job.target.opener(onnx)() as session:
        golden = session.infer(batch)
        check_fusion(session, onnx, job.target.setup.precision)
    return write_bundle(
        out,
        vit=model.vit,
        files={engine.path: engine_file, ONNX: onnx},
        engine=engine,
        schedule=schedule,
        staircase=staircase,
        report=report,
        preprocessing=model.preprocessing,
        labels=class_labels(model.vit, job.pictures.class_names if job.pictures else None),
        golden=(batch, golden),
        extra={DEVICE: encode(job.target.device), **staircase_svg(staircase, schedule)},
    )


def check_fusion(session: Session, onnx: Path, precision: str) -> None:
    """Warn where TensorRT fused fewer attention layers than stand in the form that it fuses (fp16 and INT8 alone)."""
    if not isinstance(session, Inspected) or precision == "fp32":
        return
    fused, expected = session.fused_attention(), sum(attention_forms(load_graph(onnx)))
    if fused is not None and fused < expected:
        log.warning(
            "TensorRT fused %d of %d attention layers without a cut: look into its build log", fused, expected
        )
    elif fused is not None:
        log.info("fused attention: %d of %d", fused, expected)


def export_model(model: Model, schedule: Path | None, batch: int, out: Path, precision: str = "fp32") -> Path:
    """Write a pruned or, without a schedule, the unpruned model. Raises InputError, ExportError, OutputError."""
    if precision == "int8":
        raise InputError("INT8 ranges come from pictures: use edgeprune build --precision int8")
    import torch

    from edgeprune.fidelity import pruned_module

    method, tokens, prefix_last = "none", (model.vit.tokens,) * model.vit.depth, False
    if schedule is not None:
        found = load(schedule, Schedule)
        if found.vit != model.vit:
            raise InputError(f"{schedule} is of {found.vit.name} with other weights: make it for this model")
        method, tokens, prefix_last = found.method, found.tokens, found.prefix_last
    example = torch.zeros(batch, 3, model.vit.image_px, model.vit.image_px)
    module = pruned_module(model, method, tokens, prefix_last)
    export.onnx_from_module(module, example, out, convert=CONVERSIONS[precision])
    return out

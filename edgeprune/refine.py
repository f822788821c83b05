"""Schedules built for real: compiled, measured beside the unpruned model, sought anew where a goal is missed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from edgeprune import export, measure
from edgeprune.errors import ExportError
from edgeprune.job import Job
from edgeprune.measure import Samples
from edgeprune.profiling import export_probes
from edgeprune.records import Latency, Report, Schedule, replacing, sha256_file, write_bytes
from edgeprune.schedule import Goal
from edgeprune.staircase import predict_ms
from edgeprune.target import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

CORRECTIONS = 2  # times a schedule whose measured latency misses the goal is sought anew
MISS = 0.02  # of the goal, beyond which it counts as missed
PARITY_IMAGES = 8
PARITY = 1e-4


class Attempt(NamedTuple):
    """A schedule that was built and measured."""

    schedule: Schedule
    engine: Path
    report: Report


def best_of(attempts: Sequence[Attempt], goal: Goal) -> Attempt:
    """Of the attempts that meet a goal, short of MISS, the one with the least KL; else the fastest, warned of."""
    good = [a for a in attempts if _meets(goal, a.report)]
    if good:
        return min(good, key=lambda a: (a.report.kl or 0.0, a.report.latency.median_ms))
    best = max(attempts, key=lambda a: a.report.speedup)
    median = best.report.latency.median_ms
    log.warning("the goal is missed: %.3fx, %.3f ms is the fastest that was measured", best.report.speedup, median)
    return best


def _meets(goal: Goal, report: Report) -> bool:
    if goal.speedup is not None:
        return report.speedup >= goal.speedup * (1 - MISS)
    return goal.budget_ms is None or report.latency.median_ms <= goal.budget_ms * (1 + MISS)


def correction(job: Job, asked: Goal, used: Goal, report: Report) -> Goal | None:
    """The goal to give the additive model so that the measurement meets `asked`; None where it does."""
    if asked.speedup is not None and used.speedup is not None:
        error = report.speedup / asked.speedup
        return Goal(speedup=used.speedup / error) if abs(error - 1) > MISS else None
    if asked.budget_ms is not None and used.budget_ms is not None:
        error = asked.budget_ms / report.latency.median_ms
        return Goal(budget_ms=used.budget_ms * error) if abs(error - 1) > MISS else None
    return None


def dense_onnx(job: Job) -> Path:
    """The unpruned model's ONNX, among the probes."""
    folder = job.target.path("probes", "", job.model.vit, job.options.batch)
    export_probes(job.model, (), job.options.batch, folder)
    return folder / "dense.onnx"


def pruned_onnx(job: Job, schedule: Schedule) -> Path:
    """The pruned model's ONNX, checked against PyTorch. Raises ExportError."""
    if not schedule.cuts and not schedule.prefix_last:
        return dense_onnx(job)

    def make(path: Path) -> None:
        import torch

        from edgeprune.fidelity import pruned_module

        vit = job.model.vit
        example = torch.zeros(job.options.batch, 3, vit.image_px, vit.image_px)
        job.progress("exporting ONNX", 0, 1)
        module = pruned_module(job.model, schedule.method, schedule.tokens, schedule.prefix_last)
        export.onnx_from_module(module, example, path)
        job.progress("exporting ONNX", 1, 1)

    parts = (job.model.vit, schedule.method, schedule.tokens, schedule.prefix_last, job.options.batch)
    return job.target.step("model", ".onnx", parts, make)


def check_parity(job: Job, schedule: Schedule, logits: NDArray[np.float32]) -> float:
    """Largest difference of the engine's logits to PyTorch's over a few real images. Raises ExportError."""
    from edgeprune.fidelity import logits_of_schedule

    count = min(PARITY_IMAGES, len(logits))
    pixels = job.pixels[:count]
    wanted = logits_of_schedule(job.model, schedule.method, schedule.tokens, pixels, schedule.prefix_last)
    worst = float(np.abs(wanted - logits[:count]).max())
    if not worst <= PARITY:  # NaN is worse than any number
        raise ExportError(f"the engine's logits differ from PyTorch's by {worst:.2g}, above {PARITY}: report this")
    return worst


def realise(job: Job, schedule: Schedule) -> tuple[Path, Report]:
    """Compile a schedule and the unpruned model, measure both interleaved, compare their outputs."""
    target, options = job.target, job.options
    files = [compiled(target, onnx) for onnx in (dense_onnx(job), pruned_onnx(job, schedule))]
    hashes = [sha256_file(file) for file in files]
    rounds = 1 if target.setup.simulated else options.rounds

    def time_both(path: Path) -> None:
        candidates = {n: target.opener(f) for n, f in zip(("dense", "pruned"), files, strict=True)}
        samples = measure.interleave(candidates, rounds, progress=job.progress, what="unpruned against pruned")
        write_bytes(path, msgspec.json.encode(samples))

    latency = target.step("latency", ".json", (hashes, target.setup, rounds), time_both)
    samples = msgspec.json.decode(latency.read_bytes(), type=Samples)
    speedup, interval = measure.ratio(samples["dense"], samples["pruned"])
    dense = Latency(samples_ms=tuple(samples["dense"]), warmup=measure.WARMUP)
    drift = dense.median_ms / job.staircase.dense.median_ms
    report = Report(
        latency=Latency(samples_ms=tuple(samples["pruned"]), warmup=measure.WARMUP),
        dense_latency=dense,
        speedup=speedup,
        speedup_interval=interval,
        probes=job.staircase.probes,
        predicted_ms=predict_ms(job.staircase, schedule.tokens, schedule.method, schedule.prefix_last) * drift,
    )
    if job.pictures is not None:
        unpruned, pruned = (logits_on(job, file) for file in files)
        check_parity(job, schedule, pruned)
        labels = job.pictures.labels
        report = msgspec.structs.replace(
            report,
            agreement=measure.agreement(unpruned, pruned),
            kl=measure.kl_divergence(unpruned, pruned),
            top1=measure.top1(pruned, labels) if labels else None,
            dense_top1=measure.top1(unpruned, labels) if labels else None,
            images=len(job.pictures),
        )
    return files[1], report


def compiled(target: Target, onnx: Path) -> Path:
    """The engine of an ONNX file on the target."""

    def make(path: Path) -> None:
        target.runtime.compile(onnx, target.setup, path)

    return target.step("engine", ".onnx", (sha256_file(onnx), target.setup), make)


def logits_on(job: Job, engine: Path) -> NDArray[np.float32]:
    """Outputs of an engine over all pictures, (images, classes)."""

    def make(path: Path) -> None:
        with job.target.runtime.open(engine, job.target.setup) as session:
            array = measure.logits_of(session, job.pixels, job.model.preprocessing, job.options.batch, job.progress)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)

    parts = (sha256_file(engine), job.target.setup, job.pictures_key, job.model.preprocessing)
    logits: NDArray[np.float32] = np.load(job.target.step("logits", ".npy", parts, make), allow_pickle=False)
    return logits

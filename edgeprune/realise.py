"""A schedule built for real: its ONNX in the precision asked for, measured, evaluated, and refused where it loses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import onnx as onnx_graph

from edgeprune import export, fusion, measure
from edgeprune.errors import REPORT, ExportError, PrecisionError
from edgeprune.export import Convert
from edgeprune.graph import save_graph, static_or_raise
from edgeprune.images import batches, calibration_indices
from edgeprune.job import BIASED, Job
from edgeprune.measure import Samples
from edgeprune.precision import CONVERSIONS, calibrated, int8
from edgeprune.profiling import export_probes, probes_folder
from edgeprune.records import (
    Int8Ranges,
    Latency,
    Report,
    Schedule,
    code_key,
    key_of,
    load,
    replacing,
    save,
    sha256_file,
    write_bytes,
)
from edgeprune.staircase import predict_ms

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

PARITY_IMAGES = 8
MOST_LOST = 1.5  # points of top-1 that a precision may lose against fp32
MOST_CHANGED = 5.0  # points of agreement, where there are no labels


def dense_onnx(job: Job) -> Path:
    """The unpruned model's fp32 ONNX, among the probes where those are fp32."""
    if job.target.onnx_precision != "fp32":
        dense = (job.model.vit.tokens,) * job.model.vit.depth
        return _exported(job, "none", dense, False)
    folder = probes_folder(job.target, job.model.vit)
    export_probes(job.model, (), job.options.batch, folder)
    return folder / "dense.onnx"


def pruned_onnx(job: Job, schedule: Schedule) -> Path:
    """The pruned model's fp32 ONNX. Raises ExportError."""
    if not schedule.cuts and not schedule.prefix_last:
        return dense_onnx(job)
    return _exported(job, schedule.method, schedule.tokens, schedule.prefix_last)


def _exported(job: Job, method: str, tokens: tuple[int, ...], prefix_last: bool) -> Path:
    def make(path: Path) -> None:
        import torch

        from edgeprune.fidelity import pruned_module

        vit = job.model.vit
        example = torch.zeros(job.options.batch, 3, vit.image_px, vit.image_px)
        job.progress("exporting ONNX", 0, 1)
        module = pruned_module(job.model, method, tokens, prefix_last)
        export.onnx_from_module(module, example, path)
        job.progress("exporting ONNX", 1, 1)

    parts = (job.model.vit, method, tokens, prefix_last, job.options.batch)
    return job.target.step("model", ".onnx", parts, make)


def check_parity(job: Job, schedule: Schedule, logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Compare the engine's logits with PyTorch's on a few real images, by measure.typical_difference.

    Returns the indices of these images, the one on which both agree best first. Raises ExportError.
    """
    from edgeprune.fidelity import logits_of_schedule

    count = min(PARITY_IMAGES, len(logits))
    pixels = job.pixels[:count]
    wanted = logits_of_schedule(job.model, schedule.method, schedule.tokens, pixels, schedule.prefix_last)
    typical = measure.typical_difference(logits[:count], wanted)
    most = job.target.runtime.parity
    if not typical <= most:  # NaN, even of one image, is worse than any number
        raise ExportError(f"the engine's logits differ from PyTorch's by {typical:.2g}, above {most}: {REPORT}")
    return np.argsort(measure.differences(logits[:count], wanted), kind="stable")


def timed(job: Job, files: dict[str, Path], what: str) -> Samples:
    """Latencies (ms) of ONNX files in interleaved rounds, by name; kept in the work folder."""
    target = job.target
    hashes = [sha256_file(file) for file in files.values()]
    rounds = 1 if target.setup.noiseless else job.options.rounds

    def time_all(path: Path) -> None:
        candidates = {name: target.opener(file) for name, file in files.items()}
        samples = measure.interleave(candidates, rounds, progress=job.progress, what=what)
        write_bytes(path, msgspec.json.encode(samples))

    latency = target.step("latency", ".json", (hashes, target.setup, rounds), time_all)
    samples: Samples = msgspec.json.decode(latency.read_bytes(), type=Samples)
    return dict(zip(files, samples.values(), strict=True))


class Realised(NamedTuple):
    """A schedule's ONNX and report, and pictures without a tie of scores: their results are alike on any runtime."""

    onnx: Path
    report: Report
    steady: NDArray[np.int64] | None  # indices, the best first; None without pictures


def realise(job: Job, schedule: Schedule) -> Realised:
    """A schedule's ONNX and its report: compiled, measured beside the unpruned model, their outputs compared.

    In fp16 and INT8 the unpruned model is measured in that precision too, outputs are compared with the fp32
    one's, and the pruned model in fp32 is the measure of what the precision gains and loses (`gate`). Fidelity is
    of the pictures that chose nothing (`Job.held_out`).
    """
    target = job.target
    reference, exact = dense_onnx(job), pruned_onnx(job, schedule)
    files = {"dense": reference, "pruned": exact}
    if target.onnx_precision != "fp32":
        files = {"dense": nominal_onnx(job, reference), "pruned": precise_onnx(job, exact), "fp32": exact}
    fusable = fusion.foretold(files["pruned"], schedule, target.setup)
    samples = timed(job, files, "unpruned against pruned")
    speedup, interval = measure.ratio(samples["dense"], samples["pruned"])
    dense = Latency(samples_ms=tuple(samples["dense"]), warmup=measure.WARMUP)
    drift = dense.median_ms / job.staircase.dense.median_ms
    report = Report(
        latency=Latency(samples_ms=tuple(samples["pruned"]), warmup=measure.WARMUP),
        dense_latency=dense,
        speedup=speedup,
        speedup_interval=interval,
        probes=job.staircase.probes,
        fusable_attention=fusable,
        predicted_ms=predict_ms(job.staircase, schedule.tokens, schedule.method, schedule.prefix_last) * drift,
    )
    steady = None
    if job.pictures is not None:
        unpruned, pruned, whole = (logits_on(job, file) for file in (reference, files["pruned"], exact))
        steady = check_parity(job, schedule, whole)
        kept, held_out = job.held_out
        unpruned, pruned, whole = unpruned[kept], pruned[kept], whole[kept]
        labels = job.labels_of(kept)
        if "fp32" in files:
            gate(job, samples, pruned, whole, labels)
        if not held_out:
            log.warning(BIASED, len(kept))
        report = msgspec.structs.replace(
            report,
            agreement=measure.agreement(unpruned, pruned),
            kl=measure.kl_divergence(unpruned, pruned),
            top1=measure.top1(pruned, labels) if labels else None,
            dense_top1=measure.top1(unpruned, labels) if labels else None,
            images=len(kept),
            held_out=held_out,
        )
    return Realised(files["pruned"], report, steady)


def gate(
    job: Job,
    samples: Samples,
    logits: NDArray[np.float32],
    exact: NDArray[np.float32],
    labels: Sequence[int] | None,
) -> None:
    """Raise PrecisionError where a precision is slower than fp32, or loses more than allowed.

    Allowed are the goal's --max-drop or MOST_LOST points of top-1; without labels MOST_CHANGED of agreement.
    """
    precision = job.target.setup.precision
    gain, _ = measure.ratio(samples["fp32"], samples["pruned"])
    if gain < 1:
        slow, fast = (float(np.median(samples[name])) for name in ("pruned", "fp32"))
        raise PrecisionError(f"{precision} is refused: {slow:.3g} ms against {fast:.3g} ms in fp32: build fp32")
    if labels:
        lost, most, what = measure.top1(exact, labels) - measure.top1(logits, labels), MOST_LOST, "top-1"
        most = most if job.options.goal.max_drop is None else job.options.goal.max_drop
    else:
        lost, most, what = 100 - measure.agreement(exact, logits), MOST_CHANGED, "agreement"
    if lost > most:
        raise PrecisionError(
            f"{precision} is refused: it loses {lost:.2f} points of {what} against fp32, {most} are allowed, "
            f"for {gain:.2f}x: build fp32, or more --search-images"
        )
    log.info("%s: %.2fx against fp32, %.2f points of %s lost", precision, gain, lost, what)


def nominal_onnx(job: Job, onnx: Path) -> Path:
    """An fp32 ONNX in the target's precision, INT8 with nominal ranges: for its latency alone."""
    return _converted(job, onnx, CONVERSIONS[job.target.onnx_precision], "nominal")


def precise_onnx(job: Job, onnx: Path) -> Path:
    """An fp32 ONNX in the target's precision; INT8 ranges come from calibration pictures and stay in calib/."""
    if job.target.onnx_precision != "int8":
        return nominal_onnx(job, onnx)
    found = int8_ranges(job, onnx)
    return _converted(job, onnx, lambda model: int8(model, found.ranges, found.kept), found)


def int8_ranges(job: Job, onnx: Path) -> Int8Ranges:
    """Ranges for one ONNX file, kept by the hash of it, of the pictures and of the code."""
    images, how = calibration_indices(len(job.pixels)), job.model.preprocessing
    key = key_of(code_key(), sha256_file(onnx), job.pictures_key, how, images.tolist())
    path = job.options.calib / f"int8-{key}.json"
    if path.exists():
        log.info("int8 ranges: reused %s", path)
        return load(path, Int8Ranges)
    normalised = [piece for piece, _ in batches(job.pixels[images], how, job.options.batch)]
    found = calibrated(onnx_graph.load(onnx), normalised, job.progress)
    save(found, path)
    return found


def _converted(job: Job, onnx: Path, convert: Convert, how: object) -> Path:
    def make(path: Path) -> None:
        model = convert(onnx_graph.load(onnx))
        static_or_raise(model)
        save_graph(model, path)

    parts = (sha256_file(onnx), job.target.onnx_precision, how)
    return job.target.step("precise", ".onnx", parts, make)


def logits_on(job: Job, onnx: Path) -> NDArray[np.float32]:
    """Outputs of an ONNX file's engine over all pictures, (images, classes)."""

    def make(path: Path) -> None:
        with job.target.opener(onnx)() as session:
            array = measure.logits_of(session, job.pixels, job.model.preprocessing, job.options.batch, job.progress)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)

    parts = (sha256_file(onnx), job.target.setup, job.pictures_key, job.model.preprocessing)
    logits: NDArray[np.float32] = np.load(job.target.step("logits", ".npy", parts, make), allow_pickle=False)
    return logits

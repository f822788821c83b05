"""The final engine of a schedule: timed with the unpruned model, outputs compared, refused if it loses too much."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from edgeprune import stats
from edgeprune.errors import REPORT, ExportError, PrecisionError
from edgeprune.io import save_array, sha256_file
from edgeprune.onnx_graph import attention_fusion
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.measure import Measured, measured_engines, report_of
from edgeprune.pipeline.onnx_files import dense_onnx, nominal_onnx, precise_onnx, pruned_onnx
from edgeprune.pipeline.pictures import Pictures
from edgeprune.records import Report, Schedule, Staircase
from edgeprune.runtimes.inference import logits_of
from edgeprune.scheduling.goals import Goal

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

PARITY_IMAGES = 8
MOST_LOST = 1.5  # points of top-1 that a precision may lose against fp32
MOST_CHANGED = 5.0  # points of agreement that it may lose where there are no labels


class Evaluated(NamedTuple):
    """The final ONNX, its report, and for the golden input the indices of pictures on which runtimes agree best."""

    onnx: Path
    report: Report
    steadiest: NDArray[np.int64] | None


def evaluate(context: Context, staircase: Staircase, schedule: Schedule) -> Evaluated:
    """Compile, time with the unpruned model, and compare outputs on pictures that were not used to choose anything.

    In fp16 and INT8 the unpruned model is timed in the same precision, outputs are compared with those of the
    unpruned model in fp32, and the pruned model in fp32 shows what the precision gains and loses (`gate`). Raises
    ExportError, EngineError, PrecisionError.
    """
    target = context.target
    reference, exact = dense_onnx(context), pruned_onnx(context, schedule)
    file, lowered = precise_onnx(context, exact), target.onnx_precision != "fp32"
    fusable = attention_fusion.expected(file, schedule, target.setup)
    files = [file, exact] if lowered else [file]
    measured = measured_engines(target, files, nominal_onnx(context, reference), context.options.rounds)
    report = report_of(measured[0], schedule, staircase)
    report = msgspec.structs.replace(report, fusable_attention=fusable)
    pictures = context.pictures
    if pictures is None:
        return Evaluated(file, report, None)
    dense, whole, pruned = (logits_on(context, pictures, each) for each in (reference, exact, file))
    steadiest = check_parity(context, pictures, schedule, whole)
    kept, held_out = pictures.held_out(schedule.method, target.onnx_precision)
    labels = pictures.labels(kept)
    if lowered:
        gate(target.setup.precision, context.options.goal, measured, pruned[kept], whole[kept], labels)
    return Evaluated(file, with_fidelity(report, dense[kept], pruned[kept], labels, held_out), steadiest)


def with_fidelity(
    report: Report,
    dense: NDArray[np.float32] | None,
    pruned: NDArray[np.float32],
    labels: Sequence[int] | None,
    held_out: bool | None,
) -> Report:
    """The report with top-1 if there are labels, and agreement and KL if there are logits of the unpruned model.

    Logits are (images, classes) of the same pictures. `held_out`: the pictures were not used to choose anything.
    """
    return msgspec.structs.replace(
        report,
        agreement=None if dense is None else stats.agreement(dense, pruned),
        kl=None if dense is None else stats.kl_divergence(dense, pruned),
        top1=stats.top1(pruned, labels) if labels else None,
        dense_top1=stats.top1(dense, labels) if labels and dense is not None else None,
        images=len(pruned),
        held_out=held_out,
    )


def check_parity(
    context: Context, pictures: Pictures, schedule: Schedule, logits: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Compare the engine's logits (images, classes) with PyTorch's on a few images, by stats.typical_difference.

    Returns the indices of these images, best agreement first. Raises ExportError where they differ on most images.
    """
    from edgeprune.vit.fidelity import logits_of_schedule

    count = min(PARITY_IMAGES, len(logits))
    wanted = logits_of_schedule(
        context.model, schedule.method, schedule.tokens, pictures.pixels[:count], schedule.prefix_last
    )
    typical, most = stats.typical_difference(logits[:count], wanted), context.target.runtime.parity
    if not typical <= most:  # written so that NaN, even of one image, fails
        raise ExportError(f"the engine's logits differ from PyTorch's by {typical:.2g}, above {most}: {REPORT}")
    return np.argsort(stats.differences(logits[:count], wanted), kind="stable")


def gate(
    precision: str,
    goal: Goal,
    measured: Sequence[Measured],
    logits: NDArray[np.float32],
    exact: NDArray[np.float32],
    labels: Sequence[int] | None,
) -> None:
    """Raise PrecisionError if a precision is slower than fp32 or loses more accuracy than allowed.

    `measured` holds the latency in the precision, then in fp32; `logits` and `exact` (images, classes) are in the
    precision and in fp32. The limit is the goal's --max-drop or MOST_LOST points of top-1, and MOST_CHANGED points
    of agreement where there are no labels.
    """
    lower, fp32 = (each.latency for each in measured)
    gain, _ = stats.ratio(fp32.samples_ms, lower.samples_ms)
    if gain < 1:
        times = f"{lower.median_ms:.3g} ms against {fp32.median_ms:.3g} ms in fp32"
        raise PrecisionError(f"{precision} is refused because it is slower, {times}: build with --precision fp32")
    if labels:
        lost, most, what = stats.top1(exact, labels) - stats.top1(logits, labels), MOST_LOST, "top-1"
        most = most if goal.max_drop is None else goal.max_drop
    else:
        lost, most, what = 100 - stats.agreement(exact, logits), MOST_CHANGED, "agreement"
    if lost > most:
        raise PrecisionError(
            f"{precision} is refused because it loses {lost:.2f} points of {what} against fp32 (limit {most}) for "
            f"{gain:.2f}x: build with --precision fp32 or pass more --search-images"
        )
    log.info("%s: %.2fx faster than fp32, %.2f points of %s lost", precision, gain, lost, what)


def logits_on(context: Context, pictures: Pictures, file: Path) -> NDArray[np.float32]:
    """Logits of an ONNX file's engine for all pictures, (images, classes). Raises EngineError, OutputError."""

    def make(path: Path) -> None:
        with context.target.opener(file)() as session:
            array = logits_of(
                session, pictures.pixels, pictures.how, context.options.batch, context.progress, "evaluating images"
            )
        save_array(array, path)

    parts = (sha256_file(file), context.target.setup, pictures.key, pictures.how)
    logits: NDArray[np.float32] = np.load(context.target.work.step("logits", ".npy", parts, make), allow_pickle=False)
    return logits

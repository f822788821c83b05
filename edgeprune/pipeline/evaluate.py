"""A schedule's final engine: timed beside the unpruned model, its outputs compared, and refused where it loses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from edgeprune import stats
from edgeprune.errors import REPORT, ExportError, PrecisionError
from edgeprune.io import replacing, sha256_file
from edgeprune.onnx_graph import attention_fusion
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.measure import Measured, measured_engines, report_of
from edgeprune.pipeline.onnx_files import dense_onnx, nominal_onnx, precise_onnx, pruned_onnx
from edgeprune.pipeline.pictures import BIASED, Pictures
from edgeprune.records import Report, Schedule, Staircase
from edgeprune.runtimes.inference import logits_of
from edgeprune.scheduling.goals import Goal

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

PARITY_IMAGES = 8
MOST_LOST = 1.5  # points of top-1 that a precision may lose against fp32
MOST_CHANGED = 5.0  # points of agreement, where there are no labels


class Evaluated(NamedTuple):
    """The ONNX to ship, its report, and the pictures on which runtimes agree best (indices), for the golden input."""

    onnx: Path
    report: Report
    steadiest: NDArray[np.int64] | None


def evaluate(context: Context, staircase: Staircase, schedule: Schedule) -> Evaluated:
    """Compile, time beside the unpruned model, compare outputs on pictures that chose nothing.

    In fp16 and INT8 the unpruned model is timed in that precision too, outputs are compared with the fp32 one's, and
    the pruned model in fp32 shows what the precision gains and loses (`gate`). Raises ExportError, PrecisionError.
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
    if not held_out:
        log.warning(BIASED, len(kept))
    return Evaluated(file, with_fidelity(report, dense[kept], pruned[kept], labels, held_out), steadiest)


def with_fidelity(
    report: Report,
    dense: NDArray[np.float32] | None,
    pruned: NDArray[np.float32],
    labels: Sequence[int] | None,
    held_out: bool | None,
) -> Report:
    """A report with top-1 where there are labels, agreement and KL where the unpruned model's logits are known.

    Logits are (images, classes) of the same pictures; `held_out` says whether these chose nothing.
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
    """Compare the engine's logits with PyTorch's on a few images, by stats.typical_difference.

    Returns the indices of these images, the one on which both agree best first. Raises ExportError.
    """
    from edgeprune.vit.fidelity import logits_of_schedule

    count = min(PARITY_IMAGES, len(logits))
    wanted = logits_of_schedule(
        context.model, schedule.method, schedule.tokens, pictures.pixels[:count], schedule.prefix_last
    )
    typical, most = stats.typical_difference(logits[:count], wanted), context.target.runtime.parity
    if not typical <= most:  # NaN, even of one image, is worse than any number
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
    """Raise PrecisionError where a precision is slower than fp32, or loses more than allowed.

    `measured` and logits (images, classes) are of the precision and of fp32. Allowed are the goal's --max-drop or
    MOST_LOST points of top-1; without labels MOST_CHANGED of agreement.
    """
    lower, fp32 = (each.latency for each in measured)
    gain, _ = stats.ratio(fp32.samples_ms, lower.samples_ms)
    if gain < 1:
        times = f"{lower.median_ms:.3g} ms against {fp32.median_ms:.3g} ms in fp32"
        raise PrecisionError(f"{precision} is refused: {times}: build fp32")
    if labels:
        lost, most, what = stats.top1(exact, labels) - stats.top1(logits, labels), MOST_LOST, "top-1"
        most = most if goal.max_drop is None else goal.max_drop
    else:
        lost, most, what = 100 - stats.agreement(exact, logits), MOST_CHANGED, "agreement"
    if lost > most:
        raise PrecisionError(
            f"{precision} is refused: it loses {lost:.2f} points of {what} against fp32, {most} are allowed, "
            f"for {gain:.2f}x: build fp32, or more --search-images"
        )
    log.info("%s: %.2fx against fp32, %.2f points of %s lost", precision, gain, lost, what)


def logits_on(context: Context, pictures: Pictures, file: Path) -> NDArray[np.float32]:
    """Outputs of an ONNX file's engine over all pictures, (images, classes)."""

    def make(path: Path) -> None:
        with context.target.opener(file)() as session:
            array = logits_of(session, pictures.pixels, pictures.how, context.options.batch, context.progress)
        with replacing(path) as temporary, open(temporary, "wb") as out:
            np.save(out, array, allow_pickle=False)

    parts = (sha256_file(file), context.target.setup, pictures.key, pictures.how)
    logits: NDArray[np.float32] = np.load(context.target.step("logits", ".npy", parts, make), allow_pickle=False)
    return logits

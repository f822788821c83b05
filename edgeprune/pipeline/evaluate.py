"""The final engine of a schedule: timed with the unpruned model, outputs compared, refused if it loses too much."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from edgeprune import stats
from edgeprune.distributed.engines import can_spread, spread_logits
from edgeprune.errors import REPORT, ExportError
from edgeprune.io import save_array, sha256_file
from edgeprune.onnx_graph import attention_fusion
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.measure import FINAL, Measured, measured_engines, report_of
from edgeprune.pipeline.onnx_files import dense_onnx, nominal_onnx, precise_onnx, pruned_onnx
from edgeprune.pipeline.pictures import Pictures
from edgeprune.pipeline.recovery import Recovered
from edgeprune.records import DenseFidelity, Report, Schedule, Staircase, Unrecovered
from edgeprune.runtimes.inference import check_finite, logits_of
from edgeprune.scheduling.goals import Goal
from edgeprune.stats import ROUNDING
from edgeprune.tasks import Answers, Task, points_lost

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

PARITY_IMAGES = 8
MOST_LOST = 1.5  # points of top-1 that a precision may lose against fp32
MOST_CHANGED = 5.0  # points of agreement that it may lose where there are no labels
MOST_COSINE = 0.002  # of the mean cosine that it may lose where fp32 does not keep to --min-cosine, either
MOST_OFF = 10.0  # relative error of dense features that it may add, percent
MORE = 0.25  # of a bound that fp32 does not keep to, either, that a precision may add


class Evaluated(NamedTuple):
    """The final ONNX, its report, and for the golden input the indices of pictures on which runtimes agree best."""

    onnx: Path
    report: Report
    steadiest: NDArray[np.int64] | None
    refused: str | None = None  # why its precision is not worth it
    recovered: Recovered | None = None  # the weights in it, where they were tuned
    losses: Mapping[int, float] | None = None  # with `wider`: the loss (KL) of each picture of the report, by index


def evaluate(
    context: Context,
    staircase: Staircase,
    schedule: Schedule,
    wider: Sequence[str] | None = None,
    recovered: Recovered | None = None,
) -> Evaluated:
    """Compile, time with the unpruned model, and compare outputs on held-out pictures.

    The same pictures decide whether a precision below fp32 is accepted, and with --precision auto for a latency
    budget which of them is kept; nothing else is chosen by them.

    In fp16, INT8 and FP8 the unpruned model is timed in the same precision, and outputs are compared with those of
    the unpruned model in fp32. The pruned model is also built and timed in the precisions `wider`, by default fp32
    unless the precision is that or simulated, and must gain enough over each (`gate`). With recovered weights, the
    report also has the figures without recovery. Raises ExportError, EngineError.
    """
    target, options = context.target, context.options
    lowered = target.onnx_precision != "fp32"
    exact = context.at("fp32") if lowered else context
    reference, whole_file = dense_onnx(context), pruned_onnx(context, schedule, recovered)
    file = precise_onnx(context, whole_file)
    fusable = attention_fusion.expected(file, schedule, target.setup)
    compared = wider is not None
    if wider is None:
        wider = ("fp32",) if lowered else ()
    others = [(other, precise_onnx(other, whole_file)) for other in map(context.at, wider)]
    rivals = [(other.target, each) for other, each in others]
    unpruned = nominal_onnx(context, reference)
    own, *slower = measured_engines(target, [file], unpruned, options.rounds, rivals, FINAL)
    report = report_of(own, schedule, staircase)
    report = msgspec.structs.replace(report, fusable_attention=fusable)
    pictures = context.pictures
    if pictures is None:
        return Evaluated(file, report, None, None, recovered)
    dense, whole = (logits_on(exact, pictures, each) for each in (reference, whole_file))
    pruned = logits_on(context, pictures, file)
    steadiest = check_parity(context, pictures, schedule, whole, recovered)
    kept, held_out = pictures.held_out(schedule.method, target.onnx_precision)
    labels = pictures.labels(kept)
    refused = None
    for (other, each), measured in zip(others, slower, strict=True):
        logits = logits_on(other, pictures, each)[kept]
        names = (target.setup.precision, other.target.setup.precision)
        refused = refused or gate(names, options.goal, (own, measured), pruned[kept], logits, labels, context.task)
        refused = refused or beyond_bound(
            names[1], options.goal, context.task, dense[kept], pruned[kept], logits, labels
        )
    report = with_fidelity(report, dense[kept], pruned[kept], labels, held_out, context.task)
    if recovered is not None:
        original = logits_on(context, pictures, precise_onnx(context, pruned_onnx(context, schedule)))
        report = with_unrecovered(report, dense[kept], original[kept], pruned[kept], labels, context.task)
    losses = None
    if compared:  # some losses are relative to all pictures: `kept` differs among precisions
        losses = dict(zip(kept.tolist(), context.task.losses(dense, pruned)[kept].tolist(), strict=True))
    return Evaluated(file, report, steadiest, refused, recovered, losses)


def with_fidelity(
    report: Report,
    dense: NDArray[np.float32] | None,
    pruned: NDArray[np.float32],
    labels: Sequence[int] | None,
    held_out: bool | None,
    task: Task,
) -> Report:
    """The report with top-1 if there are labels, and agreement and KL if there are outputs of the unpruned model.

    Outputs are (images, values) of the same pictures. `held_out` is as in Report.
    """
    found = task.fidelity(dense, pruned, labels)
    return msgspec.structs.replace(
        report,
        agreement=found.agreement,
        kl=found.kl,
        top1=found.top1,
        dense_top1=task.fidelity(None, dense, labels).top1 if labels and dense is not None else None,
        fidelity=found,
        images=len(pruned),
        held_out=held_out,
    )


def with_unrecovered(
    report: Report,
    dense: NDArray[np.float32],
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    labels: Sequence[int] | None,
    task: Task,
) -> Report:
    """The report with the figures without recovery; outputs (images, values) of the same pictures."""
    if not isinstance(task, Answers):
        return msgspec.structs.replace(report, unrecovered=_unrecovered_features(task, dense, before, after))

    def error(hits: Callable[[NDArray[np.float32]], NDArray[np.bool_]]) -> float:
        return 100 * stats.standard_error(hits(after).astype(float) - hits(before))

    found = task.fidelity(dense, before, labels)
    loss_error = stats.standard_error(task.losses(dense, after) - task.losses(dense, before))
    assert found.agreement is not None
    unrecovered = Unrecovered(
        agreement=found.agreement,
        kl=found.kl,
        cosine=found.cosine,
        top1=found.top1,
        agreement_error=error(lambda outputs: task.agrees(dense, outputs)),
        kl_error=None if found.kl is None else loss_error,
        cosine_error=None if found.cosine is None else loss_error,
        top1_error=error(lambda outputs: task.right(outputs, labels)) if labels else None,
    )
    return msgspec.structs.replace(report, unrecovered=unrecovered)


def _unrecovered_features(
    task: Task, dense: NDArray[np.float32], before: NDArray[np.float32], after: NDArray[np.float32]
) -> Unrecovered:
    """Figures of dense features; the error is the root of a mean, so its standard error is taken to first order."""
    found, losses = task.fidelity(dense, before, None), [task.losses(dense, each) for each in (before, after)]
    assert isinstance(found, DenseFidelity)
    slopes = [each / (2 * max(float(each.mean()), 1e-12) ** 0.5) for each in losses]
    return Unrecovered(error=found.error, error_error=stats.standard_error(slopes[1] - slopes[0]), features=found)


def check_parity(
    context: Context,
    pictures: Pictures,
    schedule: Schedule,
    logits: NDArray[np.float32],
    recovered: Recovered | None = None,
) -> NDArray[np.int64]:
    """Compare the engine's logits (images, classes) with PyTorch's on a few images, by tasks.typically_off.

    Returns the indices of these images, best agreement first. Raises ExportError where they differ on most images.
    """
    from edgeprune.vit.fidelity import logits_of_schedule

    count = min(PARITY_IMAGES, len(logits))
    wanted = logits_of_schedule(
        recovered.model if recovered else context.model,
        schedule.method,
        schedule.tokens,
        pictures.pixels[:count],
        schedule.prefix_last,
    )
    off, most = context.task.off(logits[:count], wanted), context.target.runtime.parity
    typical = float(np.median(off))
    if not typical <= most:  # written so that NaN, even of one image, fails
        raise ExportError(f"the engine's outputs differ from PyTorch's by {typical:.2g}, above {most}: {REPORT}")
    return np.argsort(off, kind="stable")


def gate(
    names: tuple[str, str],
    goal: Goal,
    measured: tuple[Measured, Measured],
    logits: NDArray[np.float32],
    exact: NDArray[np.float32],
    labels: Sequence[int] | None,
    task: Task,
) -> str | None:
    """Why a precision is not worth it: slower than a wider one, or it loses more than allowed; None where it is.

    `names` and `measured` are of the precision and of the wider one, as `logits` and `exact` (images, classes). The
    limit is the goal's --max-drop, else MOST_LOST points of top-1 or, without labels, MOST_CHANGED of
    agreement. Dense features may be off by the goal's --max-error or MOST_OFF percent.
    """
    precision, wider = names
    narrow, wide = (each.latency for each in measured)
    gain, _ = stats.ratio(wide.samples_ms, narrow.samples_ms)
    if gain < 1:
        return f"it is slower, {narrow.median_ms:.3g} ms against {wide.median_ms:.3g} ms in {wider}"
    lost, what = points_lost(task, exact, logits, labels)
    if not isinstance(task, Answers):
        most = MOST_OFF if goal.max_error is None else 100 * goal.max_error
        if lost > most + ROUNDING:
            return f"its outputs are {lost:.2f} % off those in {wider} (limit {most:g}) at a speed-up of {gain:.2f}x"
        log.info("%s: %.2fx faster than %s, outputs %.2f %% off", precision, gain, wider, lost)
        return None
    most = goal.max_drop if goal.max_drop is not None else MOST_LOST if labels else MOST_CHANGED
    if lost > most + ROUNDING:
        return f"it loses {lost:.2f} points of {what} against {wider} (limit {most}) at a speed-up of {gain:.2f}x"
    log.info("%s: %.2fx faster than %s, %.2f points of %s lost", precision, gain, wider, lost, what)
    return None


def beyond_bound(
    wider: str,
    goal: Goal,
    task: Task,
    dense: NDArray[np.float32],
    narrow: NDArray[np.float32],
    exact: NDArray[np.float32],
    labels: Sequence[int] | None = None,
) -> str | None:
    """Why pruning and a precision together break a bound on the loss; None where they do not, and for other goals.

    `narrow` and `exact` (images, values) are the outputs of the precision and of the wider one, `dense` those of the
    unpruned model in fp32. Where the wider one misses the bound, too, the precision may cost a little more:
    MOST_COSINE, or a quarter of the bound.
    """
    bound = goal.max_drop if goal.max_drop is not None else None if goal.max_error is None else 100 * goal.max_error
    if bound is not None:
        (lost, what), (before, _) = (points_lost(task, dense, each, labels) for each in (narrow, exact))
        most = bound if before <= bound + ROUNDING else before + MORE * bound
        if lost <= most + ROUNDING:
            return None
        unit = "% of" if goal.max_error is not None else "points of"
        return f"with pruning it loses {lost:.2f} {unit} {what}, above {most:.2f}; it is {before:.2f} in {wider}"
    if goal.min_cosine is None:
        return None
    mean, whole = (1 - float(task.losses(dense, each).mean()) for each in (narrow, exact))
    least = goal.min_cosine if whole >= goal.min_cosine else whole - MOST_COSINE
    if mean >= least:
        return None
    return f"its mean cosine is {mean:.4f}, below {least:.4f}; it is {whole:.4f} in {wider}"


def logits_on(context: Context, pictures: Pictures, file: Path) -> NDArray[np.float32]:
    """Logits of an ONNX file's engine for all pictures, (images, classes). Raises EngineError, OutputError."""

    def make(path: Path) -> None:
        if context.options.cluster is not None and can_spread(context.target):
            engine = context.target.engine(file)
            array = spread_logits(context.target, engine, pictures.stored, pictures.how)
        else:
            with context.target.opener(file)() as session:
                batch, progress = context.options.batch, context.progress
                array = logits_of(session, pictures.pixels, pictures.how, batch, progress, "evaluating images")
        check_finite(array, context.target.setup.precision)
        save_array(array, path)

    parts = (sha256_file(file), context.target.setup, pictures.key, pictures.how)
    logits: NDArray[np.float32] = np.load(context.target.work.step("logits", ".npy", parts, make), allow_pickle=False)
    return logits

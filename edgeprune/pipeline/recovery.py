"""Between refine and evaluate: the pruned model's weights tuned to the unpruned one, kept in the work folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edgeprune.io import read_bytes, write_bytes
from edgeprune.onnx_graph.int8 import Int8Layer
from edgeprune.pipeline.context import Context
from edgeprune.records import Recovery, Schedule
from edgeprune.tasks import BY_NAME

if TYPE_CHECKING:
    from edgeprune.vit.models import Model
    from edgeprune.vit.recovery import Tuned

log = logging.getLogger(__name__)


class Recovered(NamedTuple):
    """The model with tuned weights (its record is still that of the original), and how they came about."""

    model: Model
    record: Recovery


def recover_best(
    context: Context, schedules: Sequence[Schedule], layers: Callable[[Schedule], Sequence[Int8Layer]]
) -> tuple[Schedule, Recovered | None]:
    """The schedule that recovers best, with its weights: successive halving (arXiv 1502.07943).

    All are tuned for an eighth of the epochs; the better half, by the loss on the held-out pictures, continues for
    another eighth, until one is left, which is tuned to the end: at most twice the time of one schedule. `layers`
    gives what will be INT8. Raises as `recover`.
    """
    rivals, share = [_Rival(context, schedule, layers(schedule)) for schedule in schedules], 0
    while len(rivals) > 1:
        share += 1
        losses = {}
        for number, rival in enumerate(rivals, 1):
            losses[rival] = rival.loss_after(share)
            log.info(
                "recovery: schedule %d of %d, with %d tokens at the end: %s %.3g",
                number, len(rivals), rival.schedule.tokens[-1], BY_NAME[context.model.task].loss_name, losses[rival],
            )  # fmt: skip
        rivals.sort(key=lambda rival: losses[rival])
        half = max(1, len(rivals) // 2)
        for rival in rivals[half:]:
            rival.checkpoint.unlink(missing_ok=True)
        rivals = rivals[:half]
    return rivals[0].schedule, recover(context, rivals[0].schedule, rivals[0].int8)


def recover(context: Context, schedule: Schedule, int8: Sequence[Int8Layer] = ()) -> Recovered | None:
    """Tune the weights of the pruned model on the pictures of --recover; an interrupted run continues.

    The same model, schedule and pictures are tuned once for all precisions but INT8, which has `int8` (fake
    quantisation). None, with a warning, for a schedule without a cut. Raises OutputError, ExportError.
    """
    from edgeprune.vit.recovery_files import load_recovered, save_recovered

    if not schedule.cuts:
        log.warning("this schedule removes no tokens, so nothing is recovered: choose a faster goal to use --recover")
        return None
    run = _Rival(context, schedule, int8)

    def make(path: Path) -> None:
        found = run.tuned()
        save_recovered(found.module.model, found.record, path)

    path = context.target.work.step("recovered", ".safetensors", run.parts, make)
    run.checkpoint.unlink(missing_ok=True)
    found = Recovered(*load_recovered(context.model, path))
    tell(found.record)
    return found


class _Rival:
    """A schedule and its recovery; another object for the same schedule continues it."""

    def __init__(self, context: Context, schedule: Schedule, int8: Sequence[Int8Layer]) -> None:
        from edgeprune.vit.recovery import Recipe

        assert context.recovery is not None
        model, pictures, self.recipe = context.model, context.recovery, Recipe()
        self.context, self.schedule, self.int8, self.pictures = context, schedule, tuple(int8), pictures
        self.parts = (
            model.vit, model.task, schedule.method, schedule.tokens, schedule.prefix_last, pictures.key, pictures.how,
            self.recipe.parts, self.int8,
        )  # fmt: skip
        self.checkpoint = context.target.work.file("recovered", ".checkpoint", *self.parts)

    def tuned(self, until: int | None = None) -> Tuned:
        """The module with the best weights after all epochs, or after `until`."""
        from edgeprune.distributed.evaluate import SpreadOutputs
        from edgeprune.vit.fidelity import outputs_of, pruned_module
        from edgeprune.vit.recovery import device, recovered

        context, schedule, pictures = self.context, self.schedule, self.pictures
        spread = context.options.cluster is not None and device().type == "cpu"  # a GPU has other bits
        pruned = pruned_module(context.model, schedule.method, schedule.tokens, schedule.prefix_last)
        return recovered(
            pruned, pictures.pixels, pictures.how, self.recipe, self.checkpoint, context.progress,
            context.model.task, self.int8, SpreadOutputs() if spread else outputs_of, until,
        )  # fmt: skip

    def loss_after(self, share: int) -> float:
        """The lowest loss on the held-out pictures after so many eighths of all epochs."""
        _, _, epochs = self.recipe.lengths(len(self.pictures.files))
        until = share * max(1, epochs // 8)

        def make(path: Path) -> None:
            write_bytes(path, msgspec.json.encode(min(self.tuned(until).record.curve)))

        path = self.context.target.work.step("trial", ".json", (*self.parts, until), make)
        return msgspec.json.decode(read_bytes(path), type=float)


def tell(record: Recovery) -> None:
    """Log what recovery gained on the pictures that it did not train on."""
    name, curve = BY_NAME[record.task].loss_name, record.curve
    if record.epochs:
        log.info(
            "recovery: %s %.3g → %.3g on %d held-out pictures, after %d epochs",
            name, curve[0], curve[record.epochs], record.validation_images, record.epochs,
        )  # fmt: skip
    else:
        log.warning(
            "recovery: no epoch improved on the original weights (%s %.3g), which are kept: pass more pictures",
            name, curve[0],
        )  # fmt: skip

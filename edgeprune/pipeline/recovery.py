"""Between refine and evaluate: the pruned model's weights tuned to the unpruned one, kept in the work folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgeprune.onnx_graph.int8 import Int8Layer
from edgeprune.pipeline.context import Context
from edgeprune.records import Recovery, Schedule
from edgeprune.tasks import BY_NAME

if TYPE_CHECKING:
    from edgeprune.vit.models import Model

log = logging.getLogger(__name__)


class Recovered(NamedTuple):
    """The model with tuned weights (its record is still that of the original), and how they came about."""

    model: Model
    record: Recovery


def recover(context: Context, schedule: Schedule, int8: Sequence[Int8Layer] = ()) -> Recovered | None:
    """Tune the weights of the pruned model on the pictures of --recover; an interrupted run continues.

    The same model, schedule and pictures are tuned once for all precisions but INT8, which has `int8` (fake
    quantisation). None, with a warning, for a schedule without a cut. Raises OutputError, ExportError.
    """
    from edgeprune.distributed.evaluate import SpreadOutputs
    from edgeprune.vit.fidelity import outputs_of, pruned_module
    from edgeprune.vit.recovery import Recipe, recovered
    from edgeprune.vit.recovery_files import load_recovered, save_recovered

    assert context.recovery is not None
    if not schedule.cuts:
        log.warning("this schedule removes no tokens, so nothing is recovered: choose a faster goal to use --recover")
        return None
    model, pictures, recipe = context.model, context.recovery, Recipe()
    parts = (
        model.vit, model.task, schedule.method, schedule.tokens, schedule.prefix_last, pictures.key, pictures.how,
        recipe.parts, tuple(int8),
    )  # fmt: skip

    def make(path: Path) -> None:
        checkpoint = path.with_suffix(".checkpoint")
        outputs = outputs_of if context.options.cluster is None else SpreadOutputs()
        pruned = pruned_module(model, schedule.method, schedule.tokens, schedule.prefix_last)
        found = recovered(
            pruned, pictures.pixels, pictures.how, recipe, checkpoint, context.progress, model.task, int8, outputs
        )
        save_recovered(found.module.model, found.record, path)
        checkpoint.unlink(missing_ok=True)

    found = Recovered(*load_recovered(model, context.target.work.step("recovered", ".safetensors", parts, make)))
    tell(found.record)
    return found


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

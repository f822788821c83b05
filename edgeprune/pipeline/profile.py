"""The staircase of a model on a target: its probes exported, measured, and refined where a schedule needs it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import zoo
from edgeprune.io import load
from edgeprune.latency import profiling
from edgeprune.pipeline.context import Context
from edgeprune.records import Staircase, Vit
from edgeprune.runtimes.target import Target, work_lock
from edgeprune.vit.models import Model, load_model
from edgeprune.vit.reducers import check_method

if TYPE_CHECKING:
    from torch import nn


def measured_staircase(target: Target, model: Model, methods: Sequence[str], exhaustive: bool = False) -> Staircase:
    """The staircase of a model with the cost of these methods' cuts; reused or resumed from the work folder."""
    folder = partial(probes, target, model, methods)
    return profiling.measured_staircase(target, model.vit, methods, folder, exhaustive)


def confirmed(context: Context, staircase: Staircase, methods: Sequence[str], tokens: Iterable[int]) -> Staircase:
    """The staircase with the right ends of the treads that hold `tokens` confirmed: those not known are probed."""
    target, model = context.target, context.model
    return profiling.confirmed_staircase(
        target, staircase, methods, lambda: probes(target, model, methods), context.options.exhaustive, tokens
    )


def probes(target: Target, model: Model, methods: Sequence[str]) -> Path:
    """The folder of a model's probes, exported where they are missing."""
    from edgeprune.vit.probes import export_probes

    folder = profiling.probes_folder(target, model.vit)
    target.progress("exporting probes", 0, 1)
    export_probes(model, methods, target.setup.batch, folder, target.onnx_precision)
    target.progress("exporting probes", 1, 1)
    return folder


def profile(
    target: Target,
    model: str | nn.Module,
    weights: str | None = None,
    trunk: Path | None = None,
    method: str = "none",
    exhaustive: bool = False,
) -> Staircase:
    """The staircase of a model, of exported probes (`trunk`, needs no torch), or of a simulated device.

    One process at a time measures in a work folder. Raises any EdgepruneError.
    """
    check_method(method)
    if trunk is None and target.setup.simulated:
        return profiling.simulated_staircase(target, vit_of(model), exhaustive)
    with work_lock(target.work):
        if trunk is not None:
            return profiling.staircase_of_folder(target, trunk, (method,), exhaustive)
        return measured_staircase(target, load_model(model, weights), (method,), exhaustive)


def vit_of(model: str | nn.Module) -> Vit:
    """The shape of a model; of the embedded one without torch. Raises ModelError, MissingError."""
    if model == zoo.EMBEDDED:
        return load(zoo.RECORD, Vit)
    return load_model(model, "random" if isinstance(model, str) else None).vit

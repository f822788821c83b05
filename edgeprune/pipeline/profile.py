"""The staircase of a model on a target: export what is timed, measure, confirm tread ends that a schedule uses."""

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
from edgeprune.runtimes.target import Target
from edgeprune.vit.models import Model, load_model
from edgeprune.vit.reducers import check_method

if TYPE_CHECKING:
    from torch import nn


def measured_staircase(target: Target, model: Model, methods: Sequence[str], exhaustive: bool = False) -> Staircase:
    """The staircase of a model with the cost of these methods' cuts; reused or resumed from the work folder.

    Raises ExportError, EngineError, OutputError.
    """
    folder = partial(profiling_models, target, model, methods)
    return profiling.measured_staircase(target, model.vit, methods, folder, exhaustive)


def confirmed(context: Context, staircase: Staircase, methods: Sequence[str], tokens: Iterable[int]) -> Staircase:
    """The staircase after measuring the unconfirmed right ends of the treads that contain `tokens`."""
    target, model, exhaustive = context.target, context.model, context.options.exhaustive
    folder = partial(profiling_models, target, model, methods)
    return profiling.measured_staircase(target, model.vit, methods, folder, exhaustive, staircase, tokens)


def profiling_models(target: Target, model: Model, methods: Sequence[str]) -> Path:
    """The folder of the ONNX files that the staircase is measured on; missing ones are exported."""
    from edgeprune.vit.profiling_models import export_profiling_models

    folder = profiling.models_folder(target, model.vit)
    export_profiling_models(
        model, methods, target.setup.batch, folder, target.onnx_precision, target.progress, target.for_tensorrt
    )
    return folder


def profile(
    target: Target,
    model: str | nn.Module,
    weights: str | None = None,
    trunk: Path | None = None,
    method: str = "none",
    exhaustive: bool = False,
    layers: Sequence[int] = (),
) -> Staircase:
    """The staircase of a model, of exported models (`trunk`, needs no torch), or of a simulated device.

    With `layers` the model has their patch features as outputs. Only one process at a time can measure in a work
    folder. Raises any EdgepruneError.
    """
    check_method(method)
    if trunk is None and target.setup.simulated and not layers:
        return profiling.simulated_staircase(target, vit_of(model), exhaustive)
    with target.work.lock():
        if trunk is not None:
            return profiling.staircase_of_folder(target, trunk, (method,), exhaustive)
        return measured_staircase(target, load_model(model, weights, layers=layers), (method,), exhaustive)


def vit_of(model: str | nn.Module) -> Vit:
    """The shape of a model; needs no torch for the embedded one. Raises ModelError, MissingError."""
    if model == zoo.EMBEDDED:
        return load(zoo.RECORD, Vit)
    return load_model(model, "random" if isinstance(model, str) else None).vit

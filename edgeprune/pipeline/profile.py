"""The staircase of a model on a target: export what is timed, measure, confirm tread ends that a schedule uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import zoo
from edgeprune.errors import InputError
from edgeprune.io import load
from edgeprune.latency import profiling
from edgeprune.pipeline.context import Context
from edgeprune.records import Staircase, Vit
from edgeprune.runtimes.target import Target
from edgeprune.vit.models import Model, load_model
from edgeprune.vit.reducers import check_method, check_sorted

if TYPE_CHECKING:
    from torch import nn


def measured_staircase(target: Target, model: Model, methods: Sequence[str], exhaustive: bool = False) -> Staircase:
    """The staircase of a model with the cost of these methods' cuts; reused or resumed from the work folder.

    Raises InputError where a method sorts more tokens than the target can, ExportError, EngineError, OutputError.
    """
    check_sorting(target, model.vit, methods)
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

    folder = profiling.models_folder(target, model.vit, model.task)
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
    image_size: tuple[int, int] | None = None,
    layers: Sequence[int] = (),
    task: str | None = None,
) -> Staircase:
    """The staircase of a model, of exported models (`trunk`, needs no torch), or of a simulated device.

    With `layers` the model has their patch features as outputs; `task` is as in load_model. Only one process at
    a time can measure in a work folder. Raises any EdgepruneError.
    """
    check_method(method)
    if trunk is not None and image_size is not None:
        raise InputError(f"{trunk} has one size of pictures: pass --image-size to edgeprune export --trunk instead")
    if trunk is not None and layers:
        raise InputError(f"{trunk} has its outputs already: pass --layers to edgeprune export --trunk instead")
    if trunk is None and target.setup.simulated and not layers and task != "dense" and method == "none":
        vit = vit_of(model, weights, image_size, task)
        check_sorting(target, vit, (method,))
        return profiling.simulated_staircase(target, vit, exhaustive)
    with target.work.lock():
        if trunk is not None:
            return profiling.staircase_of_folder(target, trunk, (method,), exhaustive)
        loaded = load_model(model, weights, task=task, image_size=image_size, layers=layers)
        return measured_staircase(target, loaded, (method,), exhaustive)


def check_sorting(target: Target, vit: Vit, methods: Sequence[str]) -> None:
    """Raise InputError where cuts by one of the methods sort more tokens than TensorRT can, before long work."""
    for method in methods if target.for_tensorrt else ():
        check_sorted(method, vit)


def vit_of(
    model: str | nn.Module,
    weights: str | None = None,
    image_size: tuple[int, int] | None = None,
    task: str | None = None,
) -> Vit:
    """The shape of a model, which given weights may change; needs no torch for the embedded model.

    Raises ModelError, MissingError.
    """
    if model == zoo.EMBEDDED and weights in (None, "embedded") and image_size is None:
        return load(zoo.RECORD, Vit)
    weights = weights or ("random" if isinstance(model, str) else None)
    return load_model(model, weights, task=task, image_size=image_size).vit

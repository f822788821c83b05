"""The `export` command: a model with a schedule, or unpruned, as an ONNX file with static shapes and metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import InputError
from edgeprune.images import ImageSet, batches, calibration_indices, load_pixels
from edgeprune.io import load
from edgeprune.onnx_graph.calibration import calibrated
from edgeprune.onnx_graph.precision import CONVERSIONS, QUANTISED, onnx_precision
from edgeprune.pipeline.schedule import named
from edgeprune.records import ModelMetadata, Progress, Recovery, Schedule, silent
from edgeprune.tasks import task_of

if TYPE_CHECKING:
    import onnx

    from edgeprune.vit.models import Model


def metadata_of(
    model: Model, schedule: Schedule, class_names: tuple[str, ...] | None, recovery: Recovery | None = None
) -> ModelMetadata:
    """The metadata of an exported file."""
    from edgeprune.vit.models import class_labels

    return ModelMetadata(
        task=model.task,
        vit=model.vit,
        schedule=schedule,
        preprocessing=model.preprocessing,
        labels=class_labels(model, class_names) if model.task == "classify" else (),
        recovery=recovery,
    )


def export_model(
    model: Model,
    schedule: Path | None,
    batch: int,
    out: Path,
    precision: str = "fp32",
    pictures: ImageSet | None = None,
    progress: Progress = silent,
    tensorrt: bool = False,
) -> Path:
    """Write a pruned model or, without a schedule, the unpruned one, with metadata that describes it; returns `out`.

    `pictures` are for the calibration of INT8 and FP8. With `tensorrt` INT8 is in the form that TensorRT reads
    and a cut beyond its limits is an error. Raises InputError, ExportError, OutputError.
    """
    from edgeprune.vit.export import onnx_of_schedule
    from edgeprune.vit.reducers import check_sorted

    vit, how = model.vit, model.preprocessing
    found = Schedule(vit=vit, method="none", policy="search", tokens=(vit.tokens,) * vit.depth)
    if schedule is not None:
        found = load(schedule, Schedule)
        if found.vit.layers != vit.layers:
            made, here = named(found.vit.layers), named(vit.layers)
            raise InputError(f"{schedule} is for {made}, this model has {here}: pass the same --layers to export")
        if found.vit != vit:
            raise InputError(f"{schedule} was made for another model or other weights: make one for this model")
    if tensorrt and found.cuts:
        check_sorted(found.method, vit)
    if precision in QUANTISED and pictures is None:
        raise InputError(f"{precision.upper()} needs pictures for calibration: pass --images DIR|CSV")
    kind = onnx_precision(precision, "trt" if tensorrt else "ort")
    metadata = metadata_of(model, found, pictures.class_names if pictures else None)

    def quantised(graph: onnx.ModelProto) -> onnx.ModelProto:
        assert pictures is not None
        pixels = load_pixels([pictures.paths[i] for i in calibration_indices(len(pictures))], how)
        task = task_of(model.task, model.vit)
        ranges = calibrated(graph, [images for images, _ in batches(pixels, how, batch)], task, progress)
        return QUANTISED[kind](graph, ranges.ranges, ranges.kept)

    convert = quantised if kind in QUANTISED else CONVERSIONS.get(kind)
    onnx_of_schedule(model, found.method, found.tokens, found.prefix_last, batch, out, convert, metadata, tensorrt)
    return out

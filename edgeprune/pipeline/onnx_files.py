"""The ONNX files of a build, each made once: unpruned and pruned, in fp32 and in the requested precision."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx

from edgeprune.images import batches, calibration_indices
from edgeprune.io import code_key, key_of, load, save, sha256_file
from edgeprune.latency.profiling import models_folder
from edgeprune.onnx_graph.calibration import calibrated
from edgeprune.onnx_graph.graph import save_graph, static_or_raise
from edgeprune.onnx_graph.int8 import Int8Layer, int8_layers
from edgeprune.onnx_graph.precision import CONVERSIONS, QUANTISED, Convert
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.profile import profiling_models
from edgeprune.pipeline.recovery import Recovered
from edgeprune.records import Int8Ranges, Schedule

log = logging.getLogger(__name__)


def dense_onnx(context: Context) -> Path:
    """The unpruned model's fp32 ONNX; the one exported for profiling where that is fp32. Raises ExportError."""
    if context.target.onnx_precision != "fp32":
        return _exported(context, "none", context.dense_tokens, False)
    dense = models_folder(context.target, context.model.vit, context.model.task) / "dense.onnx"
    return dense if dense.is_file() else profiling_models(context.target, context.model, ()) / "dense.onnx"


def pruned_onnx(context: Context, schedule: Schedule, recovered: Recovered | None = None) -> Path:
    """The pruned model's fp32 ONNX, with the model's own weights or with recovered ones. Raises ExportError."""
    if not schedule.cuts and not schedule.prefix_last:
        return dense_onnx(context)
    return _exported(context, schedule.method, schedule.tokens, schedule.prefix_last, recovered)


def _exported(
    context: Context, method: str, tokens: tuple[int, ...], prefix_last: bool, recovered: Recovered | None = None
) -> Path:
    model = recovered.model if recovered else context.model
    weights = recovered.record.weights_sha256 if recovered else model.vit.weights_sha256

    def make(path: Path) -> None:
        from edgeprune.vit.export import onnx_of_schedule

        context.progress("exporting ONNX", 0, 1)
        onnx_of_schedule(
            model, method, tokens, prefix_last, context.options.batch, path,
            tensorrt=context.target.for_tensorrt,
        )  # fmt: skip
        context.progress("exporting ONNX", 1, 1)

    target = context.target  # a file that was exported for a CPU may be beyond TensorRT's limits
    parts = (
        model.vit, model.task, weights, method, tokens, prefix_last, context.options.batch, target.for_tensorrt,
    )  # fmt: skip
    return context.target.work.step("model", ".onnx", parts, make)


def nominal_onnx(context: Context, file: Path) -> Path:
    """An fp32 ONNX in the target's precision; INT8 has nominal ranges, which is enough to measure latency."""
    if context.target.onnx_precision == "fp32":
        return file
    return _converted(context, file, CONVERSIONS[context.target.onnx_precision], "nominal")


def precise_onnx(context: Context, file: Path) -> Path:
    """An fp32 ONNX in the target's precision; INT8 has ranges from the calibration pictures.

    Raises InputError where INT8 has no pictures, MissingError without onnxruntime.
    """
    quantise = QUANTISED.get(context.target.onnx_precision)
    if quantise is None:
        return nominal_onnx(context, file)
    found = int8_ranges(context, file)
    return _converted(context, file, lambda model: quantise(model, found.ranges, found.kept), found)


def int8_ranges(context: Context, file: Path) -> Int8Ranges:
    """INT8 ranges of one ONNX file, kept in calib/ under a hash of the file, the pictures and the code."""
    pictures, how = context.needed_pictures(), context.model.preprocessing
    images = calibration_indices(len(pictures.files))
    task = (context.model.task, context.judged_by)
    key = key_of(code_key(), sha256_file(file), pictures.key, how, images.tolist(), task)
    path = context.calib / f"int8-{key}.json"
    if path.exists():
        log.info("INT8 ranges: reusing %s", path)
        return load(path, Int8Ranges)
    normalised = [piece for piece, _ in batches(pictures.pixels[images], how, context.options.batch)]
    found = calibrated(onnx.load(file), normalised, context.task, context.progress)
    save(found, path)
    return found


def layers_in_int8(context: Context, schedule: Schedule) -> tuple[Int8Layer, ...]:
    """The linear layers of the pruned model, where its precision is INT8; else none.

    Errors are those of precise_onnx.
    """
    if context.options.precision != "int8":
        return ()
    file = pruned_onnx(context, schedule)
    return int8_layers(onnx.load(file), int8_ranges(context, file))


def _converted(context: Context, file: Path, convert: Convert, how: object) -> Path:
    def make(path: Path) -> None:
        model = convert(onnx.load(file))
        static_or_raise(model)
        save_graph(model, path)

    parts = (sha256_file(file), context.target.onnx_precision, how)
    return context.target.work.step("precise", ".onnx", parts, make)

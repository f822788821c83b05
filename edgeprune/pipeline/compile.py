"""ONNX to bundle on the machine that will run it: compile, time, check, write. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgeprune.bundles.format import GOLDEN, MANIFEST, ONNX, check_out, default_folder, load_bundle
from edgeprune.errors import InputError
from edgeprune.images import ImageSet, labelled_for, load_images, load_pixels, normalise
from edgeprune.io import load, load_array
from edgeprune.onnx_graph import attention_fusion
from edgeprune.onnx_graph.graph import input_shape, load_graph, metadata_in, onnx_precision_of, sorts_or_raise
from edgeprune.pipeline.context import ROUNDS, check_count, check_size
from edgeprune.pipeline.evaluate import with_fidelity
from edgeprune.pipeline.measure import measured_engines, report_of
from edgeprune.pipeline.write import bundle_from_onnx, noise_batch
from edgeprune.records import Manifest, ModelMetadata, Report, Staircase, Vit
from edgeprune.runtimes.inference import logits_of
from edgeprune.runtimes.target import Target
from edgeprune.tasks import BY_NAME, task_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Inputs:
    """The options of `compile` besides the target, named as on the command line."""

    onnx: Path
    dense: Path | None = None  # the unpruned model's ONNX, to measure the speed-up
    images: Path | None = None
    staircase: Path | None = None  # measured on this target, to predict the latency
    rounds: int = ROUNDS
    out: Path | None = None


def compile_onnx(target: Target, given: Inputs) -> tuple[Path, Manifest]:
    """Build a bundle from an ONNX file that `export` wrote or that is part of a bundle; its folder and manifest.

    Unknown figures are None: the speed-up without `dense`, top-1 without labelled `images`. Raises InputError for an
    ONNX without edgeprune's metadata and for files that do not belong together, ImageError, EngineError, OutputError.
    """
    with target.work.lock():
        return _compiled(target, given)


def _compiled(target: Target, given: Inputs) -> tuple[Path, Manifest]:
    metadata, bundle = described(given.onnx)
    setup, vit, schedule = target.setup, metadata.vit, metadata.schedule
    out = given.out or default_folder(setup, vit, schedule.method)
    if out.resolve() == given.onnx.parent.resolve():
        raise InputError(f"{given.onnx} is in {out}, which would be replaced: choose another --out")
    check_out(out)
    if given.dense is not None:
        check_dense(given.dense, given.onnx, vit)
    staircase = load(given.staircase, Staircase) if given.staircase else None
    if staircase is not None and (staircase.setup != setup or staircase.vit != vit):
        raise InputError(f"{given.staircase} belongs to another model or setup: profile this model on this device")
    if target.for_tensorrt:
        check_for_tensorrt(target, given)
    pictures = load_images(given.images) if given.images is not None else None
    if pictures is not None:
        check_count(BY_NAME[metadata.task], len(pictures))
        check_size(vit, len(pictures))
        if metadata.task == "classify":
            pictures = labelled_for(pictures, vit.name, vit.classes, metadata.labels)
    fusable = attention_fusion.expected(given.onnx, schedule, setup)
    (measured,) = measured_engines(target, [given.onnx], given.dense, given.rounds)
    report = msgspec.structs.replace(report_of(measured, schedule, staircase), fusable_attention=fusable)
    if pictures is not None:
        report = _with_fidelity(target, report, metadata, given, pictures)
    example, expected = _example(metadata, setup.batch, pictures), None
    if bundle is not None:
        example, expected = (load_array(given.onnx.parent / name) for name in GOLDEN)
    return out, bundle_from_onnx(target, out, given.onnx, metadata, report, example, staircase, expected)


def check_dense(dense: Path, onnx: Path, vit: Vit) -> None:
    """Raise InputError for an unpruned ONNX file of another batch, precision or model than the pruned one."""
    whole, pruned, known = load_graph(dense), load_graph(onnx), metadata_in(dense)
    if input_shape(whole) != input_shape(pruned):
        raise InputError(f"{dense} has another input shape than {onnx}: export both with the same --batch")
    held, wanted = onnx_precision_of(whole), onnx_precision_of(pruned)
    if held != wanted:
        raise InputError(f"{dense} holds {held}, {onnx} {wanted}: export both with the same --precision")
    if known is not None and known.vit != vit:
        raise InputError(
            f"{dense} is of {known.vit.name}, not of this {vit.name} with these weights: export it for the same model"
        )


def check_for_tensorrt(target: Target, given: Inputs) -> None:
    """Raise InputError or ExportError for files that were exported for ONNX Runtime and that TensorRT cannot take."""
    for file in filter(None, (given.onnx, given.dense)):
        graph = load_graph(file)
        if onnx_precision_of(graph) == "int8":
            raise InputError(
                f"{file} holds INT8 for ONNX Runtime: export it again with --device {target.device.name}"
            )
        sorts_or_raise(graph)


def described(onnx: Path) -> tuple[ModelMetadata, Manifest | None]:
    """The metadata of an ONNX file, and the manifest of its bundle if it is part of one. Raises InputError."""
    if onnx.name == ONNX and (onnx.parent / MANIFEST).is_file():
        manifest = load_bundle(onnx.parent)
        names = ("task", "vit", "schedule", "preprocessing", "labels", "recovery")
        return ModelMetadata(**{name: getattr(manifest, name) for name in names}), manifest
    metadata = metadata_in(onnx)
    if metadata is None:
        raise InputError(f"{onnx} has no edgeprune metadata: pass a file that edgeprune export or build wrote")
    return metadata, None


def _example(metadata: ModelMetadata, batch: int, pictures: ImageSet | None) -> NDArray[np.float32]:
    """The golden input, (batch, 3, P, P): the first pictures, or seeded noise where there are none."""
    if pictures is None:
        return noise_batch(metadata.vit, batch)
    paths, how = pictures.paths, metadata.preprocessing
    return normalise(load_pixels([paths[i % len(paths)] for i in range(batch)], how), how)


def _with_fidelity(
    target: Target, report: Report, metadata: ModelMetadata, given: Inputs, pictures: ImageSet
) -> Report:
    """The report with top-1 on labelled pictures, and agreement and KL if there is an unpruned engine."""
    pixels = load_pixels(pictures.paths, metadata.preprocessing, target.progress)

    def logits(onnx: Path) -> NDArray[np.float32]:
        with target.opener(onnx)() as session:
            return logits_of(
                session, pixels, metadata.preprocessing, target.setup.batch, target.progress, "evaluating images"
            )

    dense = logits(given.dense) if given.dense is not None else None
    task = task_of(metadata.task, metadata.vit)
    return with_fidelity(report, dense, logits(given.onnx), pictures.labels, None, task)

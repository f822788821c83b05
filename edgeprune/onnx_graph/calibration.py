"""INT8 ranges from pictures: the largest magnitude of each activation, and the layers that INT8 would spoil."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.helper

from edgeprune.errors import MissingError, install
from edgeprune.features import packed
from edgeprune.onnx_graph.graph import linear_layers, save_graph
from edgeprune.onnx_graph.int8 import int8
from edgeprune.onnx_graph.onnx_runtime import outputs_of, session_of
from edgeprune.records import Int8Ranges, Progress, silent
from edgeprune.tasks import Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

WAYS = ("percentile", "entropy")  # methods of onnxruntime.quantization for the range of an activation
PERCENTILE, BINS = 99.999, {"percentile": 2048, "entropy": 128}


def calibrated(
    model: onnx.ModelProto,
    batches: Sequence[NDArray[np.float32]],
    task: Task,
    progress: Progress = silent,
) -> Int8Ranges:
    """INT8 ranges from calibration pictures, by the method with the lowest loss (KL) against the fp32 model.

    `batches` are inputs (batch, 3, P, P). Layers whose quantisation alone loses more than `task` allows are left in
    floating point. Raises MissingError without onnxruntime, EngineError.
    """
    names = sorted({node.input[0] for node in linear_layers(model)})
    ways = _histograms(model, names, batches, progress)
    wanted = _outputs(model, batches)

    def loss(ranges: Mapping[str, float], kept: Sequence[str]) -> float:
        return float(task.losses(wanted, _outputs(int8(model, ranges, kept), batches)).mean())

    layers = [node.name for node in linear_layers(model)]
    best = min(WAYS, key=lambda way: loss(ways[way], ()))
    kept = []
    for done, layer in enumerate(layers):
        progress("INT8: checking layers", done, len(layers))
        if loss(ways[best], [other for other in layers if other != layer]) > task.sensitive:
            kept.append(layer)
    progress("INT8: checking layers", len(layers), len(layers))
    lost = {way: loss(ways[way], kept) for way in WAYS}
    best = min(WAYS, key=lambda way: lost[way])
    return Int8Ranges(way=best, ranges=ways[best], kept=tuple(kept), kl=lost[best])


def _histograms(
    model: onnx.ModelProto, names: Sequence[str], batches: Sequence[NDArray[np.float32]], progress: Progress
) -> dict[str, dict[str, float]]:
    """The range (largest magnitude) of each tensor, by each of the methods in WAYS."""
    collector = _histogram_collector()
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    shown = {value.name for value in watched.graph.output}
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names if n not in shown
    )
    run = _runner(watched)
    collectors = {
        way: collector(way, True, BINS[way], 128, PERCENTILE if way == "percentile" else None, "same") for way in WAYS
    }
    with _silent():
        for done, images in enumerate(batches):
            progress("INT8: collecting ranges, batch", done, len(batches))
            found = dict(zip(names, run(names, images), strict=True))
            for each in collectors.values():
                each.collect({name: [values] for name, values in found.items()})
        results = {way: each.compute_collection_result() for way, each in collectors.items()}
    progress("INT8: collecting ranges, batch", len(batches), len(batches))
    return {
        way: {name: max(abs(float(values[0])), abs(float(values[1])), 1e-6) for name, values in data.items()}
        for way, data in results.items()
    }


def _outputs(model: onnx.ModelProto, batches: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    run = _runner(model)
    names = [value.name for value in model.graph.output]
    return np.concatenate([packed(dict(zip(names, run(names, images), strict=True))) for images in batches])


def _runner(model: onnx.ModelProto) -> Callable[[Sequence[str], NDArray[np.float32]], list[NDArray[np.float32]]]:
    with tempfile.TemporaryDirectory() as folder:
        save_graph(model, path := Path(folder, "model.onnx"))
        session = session_of(path, name="the model to calibrate")
    name = session.get_inputs()[0].name
    return lambda outputs, images: outputs_of(session, list(outputs), {name: images}, "the model to calibrate")


def _histogram_collector() -> Any:
    """onnxruntime's collector of activations. Raises MissingError."""
    try:
        from onnxruntime.quantization.calibrate import HistogramCollector
    except ImportError as error:
        raise MissingError(f"INT8 needs ONNX Runtime ({error}): {install('ort')}") from None
    return HistogramCollector


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress what onnxruntime's quantizer prints; stdout belongs to the command line."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield

"""An fp32 ONNX as fp16 with fp32 islands, or as INT8 with explicit Q/DQ on its linear layers."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.helper

from edgeprune.errors import MissingError
from edgeprune.onnx_graph.graph import infer, save_graph
from edgeprune.records import Int8Ranges, Progress, silent
from edgeprune.stats import kl_divergence

if TYPE_CHECKING:
    from numpy.typing import NDArray

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]

# In fp32 within an fp16 graph: norms can overflow (TRT#2564), and the scores of a cut decide which tokens are kept.
ISLAND_OPS = ("LayerNormalization", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "TopK", "ArgMax", "Log")
# Operators between a score and its origin, and between a one-hot matrix and the gathered result.
SCORE_OPS = {"Add", "Div", "MatMul", "Mul", "Reshape", "Squeeze", "Softmax", "Sub", "Transpose", "Unsqueeze"}
GATHER_OPS = {"Add", "Cast", "Div", "Equal", "MatMul", "Mul", "Transpose"}
WAYS = ("percentile", "entropy")  # methods of onnxruntime.quantization for the range of an activation
PERCENTILE, BINS = 99.999, {"percentile": 2048, "entropy": 128}
NOMINAL = 8.0  # range of an activation when only latency matters, so that no picture is needed
SMALLEST = 16  # rows and columns of a weight matrix; smaller ones are not quantised
SENSITIVE_KL = 0.02  # nats; a layer whose quantisation alone loses more stays in floating point


def fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert to fp16, with fp32 inputs, outputs and islands; softmax of blocks without a cut is fp16 and can fuse.

    Uses onnxruntime's converter. Raises MissingError without onnxruntime.
    """
    convert, blocked = _float16()
    half = onnx.ModelProto()
    half.CopyFrom(model)
    infer(half)  # the converter needs the types of all values
    out: onnx.ModelProto = convert(
        half,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[*blocked, *ISLAND_OPS],
        node_block_list=sorted(islands(model)),
    )
    nodes: dict[str, onnx.NodeProto] = {}
    for node in out.graph.node:
        nodes.setdefault(node.output[0], node)  # the converter adds the same cast once per consumer
    del out.graph.node[:]
    out.graph.node.extend(nodes.values())
    del out.graph.value_info[:]
    return _inferred(out)


def islands(model: onnx.ModelProto) -> set[str]:
    """Names of all nodes of cuts: from scores back to their softmax, and from a one-hot matrix to the result."""
    nodes = model.graph.node
    made = {output: node for node in nodes for output in node.output}
    used: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            used.setdefault(name, []).append(node)
    layers = {node.name for node in linear_layers(model)}
    back = {*SCORE_OPS, *ISLAND_OPS}

    def closure(start: Iterable[onnx.NodeProto], ops: set[str], last: str, forward: bool) -> set[str]:
        """Names of nodes reached from `start` through `ops`, up to and including nodes of type `last`."""
        found: set[str] = set()
        todo = list(start)
        while todo:
            node = todo.pop()
            if node.name in found or node.name in layers or node.op_type not in ops:
                continue
            found.add(node.name)
            if node.op_type != last:
                ahead = [other for name in node.output for other in used.get(name, [])]
                todo += ahead if forward else [made[name] for name in node.input if name in made]
        return found

    choices = [made[n.input[0]] for n in nodes if n.op_type in ("TopK", "ArgMax") and n.input[0] in made]
    matches = [node for node in nodes if node.op_type == "Equal"]
    return closure(choices, back, "Softmax", False) | closure(matches, GATHER_OPS, "Div", True)


def linear_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """MatMul nodes with a weight matrix, in order: the linear layers of the blocks."""
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "MatMul":
            shape = shapes.get(node.input[1], ())
            if len(shape) == 2 and min(shape) >= SMALLEST:
                found.append(node)
    return found


def int8(
    model: onnx.ModelProto, ranges: Mapping[str, float] | None = None, kept: Sequence[str] = ()
) -> onnx.ModelProto:
    """Quantise linear layers to INT8 as TensorRT requires: weights per channel, activations per tensor, symmetric.

    `ranges` gives the largest magnitude of each tensor; without it nominal ranges are used, which is enough to
    measure latency. Layers (node names) in `kept` are not quantised. Uses onnxruntime's quantizer. Raises
    MissingError without onnxruntime.
    """
    parts = _quantization()
    layers = [node for node in linear_layers(model) if node.name not in kept]
    out = onnx.ModelProto()
    out.CopyFrom(model)
    if not layers:
        return out
    names = {node.input[0] for node in layers}
    limits = {name: np.float32(NOMINAL if ranges is None else ranges[name]) for name in names}
    data = {name: parts.TensorData(lowest=-limit, highest=limit) for name, limit in limits.items()}
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "OpTypesToExcludeOutputQuantization": ["MatMul"],
        "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
    }
    kind = parts.QuantType.QInt8
    with _silent():
        quantizer = parts.QDQQuantizer(
            out, True, False, kind, kind, parts.TensorsData(parts.CalibrationMethod.MinMax, data),
            [node.name for node in layers], [], ["MatMul"], options,
        )  # fmt: skip
        quantizer.quantize_model()
    result: onnx.ModelProto = quantizer.model.model
    result.ir_version = model.ir_version
    return _inferred(result)


def calibrated(
    model: onnx.ModelProto, batches: Sequence[NDArray[np.float32]], progress: Progress = silent
) -> Int8Ranges:
    """INT8 ranges from calibration pictures, by the method with the lowest KL to the fp32 model.

    `batches` are inputs (batch, 3, P, P). Layers whose quantisation alone loses more than SENSITIVE_KL are left in
    floating point. Raises MissingError without onnxruntime.
    """
    names = sorted({node.input[0] for node in linear_layers(model)})
    ways = _histograms(model, names, batches, progress)
    wanted = _outputs(model, batches)

    def loss(ranges: Mapping[str, float], kept: Sequence[str]) -> float:
        return kl_divergence(wanted, _outputs(int8(model, ranges, kept), batches))

    layers = [node.name for node in linear_layers(model)]
    best = min(WAYS, key=lambda way: loss(ways[way], ()))
    kept = []
    for done, layer in enumerate(layers):
        progress("INT8: checking layers", done, len(layers))
        if loss(ways[best], [other for other in layers if other != layer]) > SENSITIVE_KL:
            kept.append(layer)
    progress("INT8: checking layers", len(layers), len(layers))
    lost = {way: loss(ways[way], kept) for way in WAYS}
    best = min(WAYS, key=lambda way: lost[way])
    return Int8Ranges(way=best, ranges=ways[best], kept=tuple(kept), kl=lost[best])


def _histograms(
    model: onnx.ModelProto, names: Sequence[str], batches: Sequence[NDArray[np.float32]], progress: Progress
) -> dict[str, dict[str, float]]:
    """The range (largest magnitude) of each tensor, by each of the methods in WAYS."""
    collector = _quantization().HistogramCollector
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
    return np.concatenate([run(names, images)[0] for images in batches])


def _runner(model: onnx.ModelProto) -> Callable[[Sequence[str], NDArray[np.float32]], list[NDArray[np.float32]]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        save_graph(model, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(
            os.path.join(folder, "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
    name = session.get_inputs()[0].name
    return lambda outputs, images: session.run(list(outputs), {name: images})


def _quantization() -> Any:
    """The parts of onnxruntime.quantization that are used here. Raises MissingError."""
    try:
        from types import SimpleNamespace

        from onnxruntime.quantization import CalibrationMethod, QuantType
        from onnxruntime.quantization.calibrate import HistogramCollector, TensorData, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    except ImportError as error:
        raise MissingError(f'INT8 needs ONNX Runtime ({error}): pip install "edgeprune[ort]"') from None
    return SimpleNamespace(
        CalibrationMethod=CalibrationMethod, QuantType=QuantType, HistogramCollector=HistogramCollector,
        TensorData=TensorData, TensorsData=TensorsData, QDQQuantizer=QDQQuantizer,
    )  # fmt: skip


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with sorted nodes, which onnxruntime's tools do not do, and inferred shapes."""
    from onnxruntime.transformers.onnx_model import OnnxModel

    OnnxModel(model).topological_sort()
    infer(model)
    return model


def _float16() -> tuple[Any, list[str]]:
    try:
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    except ImportError as error:
        raise MissingError(f'fp16 needs ONNX Runtime ({error}): pip install "edgeprune[ort]"') from None
    return convert_float_to_float16, list(DEFAULT_OP_BLOCK_LIST)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress what onnxruntime's quantizer prints; stdout belongs to the command line."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


CONVERSIONS: dict[str, Convert] = {"fp16": fp16, "int8": int8}  # from fp32

"""NVIDIA TensorRT-RTX on a machine without a GPU: parses and builds ONNX files. Nothing is faked.

TensorRT-RTX builds ahead of time on a CPU by design (its manual, "CPU-Only AOT and TensorRT-RTX Engines"). Its ONNX
parser and network are those of TensorRT 10 and 11, strongly typed. It chooses and times no kernels of a Jetson: a
build says that operators, types and shapes hold together. Needs tensorrt-rtx-cu12-libs and -bindings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings as trt


class Logger(trt.ILogger):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append((severity.name, message))


def described(tensor: Any) -> tuple[str, str, tuple[int, ...] | None]:
    """Name, type and shape of a tensor; no shape where the network does not hold together."""
    try:
        shape = tuple(tensor.shape)
    except RuntimeError:
        shape = None
    return tensor.name, tensor.dtype.name, shape


def judge(path: Path) -> dict[str, Any]:
    """What the parser and the builder say of one file, and the network that the parser made."""
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    layers = []
    for layer in map(network.get_layer, range(network.num_layers)):
        outputs = [described(layer.get_output(i)) for i in range(layer.num_outputs)]
        layers.append((layer.name, layer.type.name, outputs))
    plan = builder.build_serialized_network(network, builder.create_builder_config()) if parsed else None
    return {
        "parsed": parsed,
        "built": plan is not None,
        "plan_bytes": plan.nbytes if plan is not None else 0,
        "errors": [f"node {error.node()} {error.node_name()}: {error.desc()}" for error in errors],
        "log": [text for severity, text in logger.lines if severity in ("INTERNAL_ERROR", "ERROR", "WARNING")],
        "layers": layers,
        "inputs": [described(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [described(network.get_output(i)) for i in range(network.num_outputs)],
    }

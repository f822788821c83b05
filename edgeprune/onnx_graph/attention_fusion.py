"""Attention that TensorRT runs as one fused kernel: the number expected from the ONNX and that in the engine."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import TensorProto

from edgeprune.onnx_graph.graph import infer, load_graph
from edgeprune.records import Schedule, Setup

log = logging.getLogger(__name__)


def expected(onnx_file: Path, schedule: Schedule, setup: Setup) -> int | None:
    """The number of attention layers in a form and type that TensorRT fuses; None for other runtimes.

    Logs a warning if a block without a cut is not among them. A cut reads the attention weights, so the attention of
    its own block cannot be fused. Fused kernels take fp16, so none is expected in fp32. Source: NVIDIA TensorRT
    developer guide, "Multi-head attention fusion". Raises InputError.
    """
    if setup.runtime != "trt":
        return None
    graph = load_graph(onnx_file)
    infer(graph)
    fusable, uncut = sum(attention_forms(graph, TensorProto.FLOAT16)), schedule.vit.depth - len(schedule.cuts)
    if setup.precision != "fp32" and fusable < uncut:
        log.warning(
            "TensorRT cannot fuse the attention of %d of the %d blocks without a cut (%s): they will be slower",
            uncut - fusable, uncut, schedule.vit.name,
        )  # fmt: skip
    return fusable


def warn_if_lost(fused: int | None, fusable: int | None, precision: str) -> None:
    """Log a warning if an engine has fewer fused attention layers than expected."""
    if fused is None or fusable is None or precision == "fp32":
        return
    if fused < fusable:
        log.warning("TensorRT fused %d of %d attention layers without a cut: see its build.log", fused, fusable)
    else:
        log.info("TensorRT fused %d of %d attention layers", fused, fusable)


class AttentionNodes(NamedTuple):
    """The nodes of one attention, and whether they have the form that TensorRT fuses."""

    scores: onnx.NodeProto  # MatMul
    bias: onnx.NodeProto | None  # Add
    softmax: onnx.NodeProto
    out: onnx.NodeProto | None  # MatMul with the values
    fusable: bool


def attentions(model: onnx.ModelProto) -> list[AttentionNodes]:
    """The attention around each softmax over attention scores, in order.

    TensorRT fuses Mul (scale) -> MatMul -> [Add bias] -> Softmax -> MatMul, without another consumer of any value in
    between. Source: NVIDIA TensorRT developer guide, "Multi-head attention fusion".
    """
    producer = {output: node for node in model.graph.node for output in node.output}
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(value.name for value in model.graph.output)
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    found = []
    for node in model.graph.node:
        if node.op_type != "Softmax":
            continue
        scores, bias = producer.get(node.input[0]), None
        links = [node.input[0], node.output[0]]
        if scores is not None and scores.op_type == "Add":  # log of token sizes
            bias, scores = scores, next((producer[i] for i in scores.input if i in producer), None)
        if scores is None or scores.op_type != "MatMul":
            continue
        links.append(scores.output[0])
        scaled = any(producer.get(i) is not None and producer[i].op_type == "Mul" for i in scores.input)
        out = next((n for n in consumers.get(node.output[0], [])[:1] if n.op_type == "MatMul"), None)
        single_use = all(uses[name] == 1 for name in links)
        found.append(AttentionNodes(scores, bias, node, out, scaled and single_use and out is not None))
    return found


def attention_forms(model: onnx.ModelProto, element_type: int | None = None) -> list[bool]:
    """For each softmax over attention scores, in order: is it in the form that TensorRT fuses?

    With `element_type` only where the scores have it, in a graph with inferred types.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    return [
        found.fusable and element_type in (None, types.get(found.scores.output[0])) for found in attentions(model)
    ]

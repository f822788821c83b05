"""Attention that TensorRT runs as one fused kernel: expected from the ONNX, counted in the engine."""

from __future__ import annotations

import logging
from pathlib import Path

from edgeprune.onnx_graph.graph import attention_forms, load_graph
from edgeprune.records import Schedule, Setup

log = logging.getLogger(__name__)


def expected(onnx: Path, schedule: Schedule, setup: Setup) -> int | None:
    """Attention layers in the form that TensorRT fuses, with a warning where one without a cut is not.

    A cut reads the attention weights, so its own block cannot fuse. Kernels exist for fp16 and INT8 alone.
    None where another runtime runs the file. Source: TensorRT developer guide, "Multi-head attention fusion".
    """
    if setup.runtime != "trt":
        return None
    fusable, whole = sum(attention_forms(load_graph(onnx))), schedule.vit.depth - len(schedule.cuts)
    if setup.precision != "fp32" and fusable < whole:
        log.warning(
            "%d of %d blocks without a cut have attention that TensorRT does not fuse (%s): expect them slower",
            whole - fusable, whole, schedule.vit.name,
        )  # fmt: skip
    return fusable


def warn_if_lost(fused: int | None, fusable: int | None, precision: str) -> None:
    """Warn where an engine fused fewer attention layers than stand in the right form."""
    if fused is None or fusable is None or precision == "fp32":
        return
    if fused < fusable:
        log.warning("TensorRT fused %d of %d attention layers without a cut: see its build.log", fused, fusable)
    else:
        log.info("fused attention: %d of %d", fused, fusable)

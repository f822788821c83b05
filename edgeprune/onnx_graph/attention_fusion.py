"""Attention that TensorRT runs as one fused kernel: the number expected from the ONNX and that in the engine."""

from __future__ import annotations

import logging
from pathlib import Path

from edgeprune.onnx_graph.graph import attention_forms, load_graph
from edgeprune.records import Schedule, Setup

log = logging.getLogger(__name__)


def expected(onnx: Path, schedule: Schedule, setup: Setup) -> int | None:
    """The number of attention layers in a form that TensorRT fuses; None for other runtimes.

    Logs a warning if a block without a cut is not among them. A cut reads the attention weights, so the attention of
    its own block cannot be fused. Fused kernels exist only for fp16 and INT8. Source: NVIDIA TensorRT developer
    guide, "Multi-head attention fusion". Raises InputError.
    """
    if setup.runtime != "trt":
        return None
    fusable, uncut = sum(attention_forms(load_graph(onnx))), schedule.vit.depth - len(schedule.cuts)
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

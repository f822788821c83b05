"""Sessions of ONNX Runtime, with the same options wherever outputs are compared: what is judged is what runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgeprune.errors import EdgepruneError, EngineError, MissingError, install

CPU = "CPUExecutionProvider"
# It turns linear layers into Gemm: two reshapes each, and biases no longer fuse with GELU (docs/benchmarks.md).
SLOW_OPTIMIZERS = ["MatMulAddFusion"]


def onnxruntime() -> Any:
    """The module of that name. Raises MissingError."""
    try:
        import onnxruntime as module
    except ImportError as error:
        raise MissingError(f"ONNX Runtime is missing ({error}): {install('ort')}") from None
    return module


def threads() -> int:
    """Threads of one inference: EDGEPRUNE_THREADS, else all processors that this process may use."""
    asked = os.environ.get("EDGEPRUNE_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def session_of(
    path: Path,
    provider: str = CPU,
    count: int | None = None,
    error: type[EdgepruneError] = EngineError,
    name: str | None = None,
) -> Any:
    """The InferenceSession of an ONNX file, with `count` threads: threads() by default, 0 leaves it to ONNX Runtime.

    Raises MissingError; for a file that cannot be loaded `error`, which calls it `name`, by default its path.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads() if count is None else count
    # Threads that keep spinning after a run would slow down the next candidate of an interleaved round.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(
            os.fspath(path), options, providers=[provider], disabled_optimizers=SLOW_OPTIMIZERS
        )
    except Exception as found:  # onnxruntime raises many types, all derived from Exception alone
        detail = " ".join(str(found).split())[:200] or type(found).__name__
        raise error(f"{name or path}: ONNX Runtime cannot load it ({detail}): export it again") from None

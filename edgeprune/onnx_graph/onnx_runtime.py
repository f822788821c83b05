"""Sessions of ONNX Runtime, with the same options wherever outputs are compared: what is judged is what runs."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
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

    Raises MissingError, also where the libraries of the provider cannot be loaded, for ONNX Runtime would go on with
    the CPU; for a file that cannot be loaded `error`, which calls it `name`, by default its path.
    """
    ort = onnxruntime()
    if provider != CPU:
        preload()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads() if count is None else count
    # Threads that keep spinning after a run would slow down the next candidate of an interleaved round.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(
            os.fspath(path), options, providers=[provider], disabled_optimizers=SLOW_OPTIMIZERS
        )
    except Exception as found:  # onnxruntime raises many types, all derived from Exception alone
        raise error(f"{name or path}: ONNX Runtime cannot load it ({_line(found)}): export it again") from None
    if provider not in session.get_providers():
        raise MissingError(
            f"ONNX Runtime cannot load its {provider}: install CUDA and cuDNN of the versions that it was built for, "
            'for example pip install "onnxruntime-gpu[cuda,cudnn]"'
        )
    return session


@lru_cache(maxsize=1)
def preload() -> None:
    """Load the libraries of CUDA and cuDNN from NVIDIA's wheels, where onnxruntime (1.21 or later) can."""
    find = getattr(onnxruntime(), "preload_dlls", None)
    if find is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            find()


def outputs_of(session: Any, names: Sequence[str] | None, feed: Mapping[str, Any], file: object) -> list[Any]:
    """The outputs of a session by name, all for None. Raises EngineError with what ONNX Runtime says."""
    try:
        found: list[Any] = session.run(names, feed)
    except Exception as error:
        raise EngineError(
            f"{file}: ONNX Runtime failed ({_line(error)}): use a smaller --batch, or close other programs"
        ) from None
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""ONNX Runtime: the embedded default engine (CPU), and CUDA where its provider is present."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.devices import check_is_here, this_machine
from edgeprune.devices.memory import available_bytes
from edgeprune.errors import EngineError, MissingError, install
from edgeprune.features import packed
from edgeprune.io import sha256_file
from edgeprune.onnx_graph.graph import copy_graph
from edgeprune.records import Device, Engine, Progress, Setup, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}


# It turns linear layers into Gemm: two reshapes each, and biases no longer fuse with GELU (docs/benchmarks.md).
SLOW_OPTIMIZERS = ["MatMulAddFusion"]


class OrtRuntime:
    """ONNX Runtime; an engine is the ONNX file itself."""

    suffix, parity = ".onnx", 1e-4

    def __init__(self, device: Device) -> None:
        self.kind = "ort-cuda" if device.tensorrt or device.compute_capability else "ort-cpu"

    def setup(self, device: Device, precision: str, batch: int) -> Setup:
        """The setup here. Raises DeviceError where `device` is not this machine, MissingError."""
        check_is_here(device)
        ort = _onnxruntime()
        if PROVIDERS[self.kind] not in ort.get_available_providers():
            raise MissingError(
                f"onnxruntime here has no {PROVIDERS[self.kind]}: "
                f"pip uninstall onnxruntime, then {install('ort-gpu')}"
            )
        return Setup(
            device=device.name,
            machine=this_machine(),
            runtime=self.kind,
            runtime_version=ort.__version__,
            precision=precision,
            batch=batch,
            threads=threads() if self.kind == "ort-cpu" else None,
            power_mode=_governor(),
        )

    def compile(self, onnx: Path, setup: Setup, out: Path, progress: Progress = silent) -> Engine:
        """Copy the ONNX, which is the engine. Raises InputError, OutputError."""
        copy_graph(onnx, out)
        digest = sha256_file(out)
        return Engine(path=out.name, sha256=digest, onnx_sha256=digest, size_bytes=out.stat().st_size, setup=setup)

    def free_bytes(self) -> int | None:
        """Available memory of this machine, bytes (Linux, /proc/meminfo); None where it cannot be read."""
        return available_bytes()

    def open(self, path: Path, setup: Setup) -> OrtSession:
        """Load an ONNX file. Raises EngineError with the first line of ONNX Runtime's message."""
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if setup.threads:
            options.intra_op_num_threads = setup.threads
        # Threads that keep spinning after a run would slow down the next candidate of an interleaved round.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = ort.InferenceSession(
                os.fspath(path), options, providers=[PROVIDERS[self.kind]], disabled_optimizers=SLOW_OPTIMIZERS
            )
        except Exception as error:  # onnxruntime raises many types, all derived from Exception alone
            raise EngineError(
                f"{path}: ONNX Runtime cannot load it ({_first_line(error)}): export it again"
            ) from None
        return OrtSession(session, path)


class OrtSession:
    """A loaded ONNX; one input, one or more outputs, all static."""

    def __init__(self, session: Any, path: Path) -> None:
        self._session, self._path = session, path
        self._input = session.get_inputs()[0]
        self._outputs = [output.name for output in session.get_outputs()]
        if not all(isinstance(n, int) for n in self._input.shape):
            raise EngineError(f"{path}: input shape {self._input.shape} is not static: export it with edgeprune")
        self.shape: tuple[int, ...] = tuple(self._input.shape)
        rng = np.random.default_rng(0)
        self._fixed = rng.standard_normal(self.shape, dtype=np.float32)

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, values) fp32 outputs of one batch, fp32 of the static shape `shape`. Raises EngineError."""
        if images.shape != self.shape:
            raise EngineError(f"{self._path} takes {self.shape}, got {images.shape}: pass complete batches")
        found = self._session.run(self._outputs, {self._input.name: images})
        return packed(dict(zip(self._outputs, found, strict=True)))

    def time_ms(self) -> float:
        """Wall time of one inference on a fixed random input, after an untimed one, ms."""
        feed = {self._input.name: self._fixed}
        self._session.run(self._outputs, feed)
        start = time.perf_counter_ns()
        self._session.run(self._outputs, feed)
        return (time.perf_counter_ns() - start) / 1e6

    def __enter__(self) -> OrtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session


def threads() -> int:
    """Threads of one inference: EDGEPRUNE_THREADS, else all processors that this process may use."""
    asked = os.environ.get("EDGEPRUNE_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError(f"ONNX Runtime is missing ({error}): {install('ort')}") from None
    return onnxruntime


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        return path.read_text().strip() if platform.system() == "Linux" else None
    except OSError:
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__

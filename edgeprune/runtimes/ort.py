"""ONNX Runtime: the embedded default engine (CPU), and CUDA where its provider is present."""

from __future__ import annotations

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
from edgeprune.onnx_graph.graph import copy_graph
from edgeprune.onnx_graph.onnx_runtime import CPU, onnxruntime, outputs_of, session_of, threads
from edgeprune.records import Device, Progress, Setup, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROVIDERS = {"ort-cpu": CPU, "ort-cuda": "CUDAExecutionProvider"}


class OrtRuntime:
    """ONNX Runtime; an engine is the ONNX file itself."""

    suffix, parity = ".onnx", 1e-4

    def __init__(self, device: Device) -> None:
        self.kind = "ort-cuda" if device.tensorrt or device.compute_capability else "ort-cpu"

    def setup(self, device: Device, precision: str, batch: int) -> Setup:
        """The setup here. Raises DeviceError where `device` is not this machine, MissingError."""
        check_is_here(device)
        ort = onnxruntime()
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

    def compile(self, onnx: Path, setup: Setup, out: Path, progress: Progress = silent) -> None:
        """Copy the ONNX, which is the engine. Raises InputError, OutputError."""
        copy_graph(onnx, out)

    def free_bytes(self) -> int | None:
        """Available memory of this machine, bytes (Linux, /proc/meminfo); None where it cannot be read."""
        return available_bytes()

    def open(self, path: Path, setup: Setup) -> OrtSession:
        """Load an ONNX file. Raises EngineError with what ONNX Runtime says."""
        return OrtSession(session_of(path, PROVIDERS[self.kind], setup.threads or 0), path)


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
        found = outputs_of(self._session, self._outputs, {self._input.name: images}, self._path)
        return packed(dict(zip(self._outputs, found, strict=True)))

    def time_ms(self) -> float:
        """Wall time of one inference on a fixed random input, after an untimed one, ms. Raises EngineError."""
        feed = {self._input.name: self._fixed}
        outputs_of(self._session, self._outputs, feed, self._path)
        start = time.perf_counter_ns()
        outputs_of(self._session, self._outputs, feed, self._path)
        return (time.perf_counter_ns() - start) / 1e6

    def __enter__(self) -> OrtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        return path.read_text().strip() if platform.system() == "Linux" else None
    except OSError:
        return None

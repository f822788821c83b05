"""The socket for engines: a table of runtimes by name, imported on use."""

from __future__ import annotations

import importlib
import logging
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from edgeprune.errors import DeviceError
from edgeprune.records import Device, Engine, Progress, Setup, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

RUNTIMES = {
    "ort": "edgeprune.runtimes.ort:OrtRuntime",
    "trt": "edgeprune.runtimes.trt:TensorRT",
    "simulated": "edgeprune.runtimes.simulated:SimulatedRuntime",
}


class Session(Protocol):
    """A loaded engine; a context manager that frees what it holds."""

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs of one static batch. Raises EngineError on a wrong shape."""
        ...

    def time_ms(self) -> float:
        """One inference on a fixed random input, in ms."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Inspected(Protocol):
    """A session that can tell how its engine runs attention."""

    def fused_attention(self) -> int | None:
        """Attention layers that run as one fused kernel; None where the engine does not tell."""
        ...


@runtime_checkable
class OnDevice(Protocol):
    """A session whose engine lies in memory of the device."""

    def memory_bytes(self) -> int:
        """What the engine needs there: weights, working memory, inputs and outputs."""
        ...


class Runtime(Protocol):
    """One way of running an ONNX file on a device."""

    suffix: str  # of a compiled file; .onnx where the ONNX file itself is what runs
    parity: float  # largest difference of fp32 logits to PyTorch's that is rounding

    def setup(self, device: Device, precision: str, batch: int) -> Setup:
        """What latencies of this runtime here are comparable under. Raises DeviceError, MissingError."""
        ...

    def compile(self, onnx: Path, setup: Setup, out: Path, progress: Progress = silent) -> Engine:
        """Compile `onnx` into the file `out`. Raises EngineError, OutputError."""
        ...

    def open(self, path: Path, setup: Setup) -> Session:
        """Load a compiled file. Raises EngineError."""
        ...

    def free_bytes(self) -> int | None:
        """Memory that sessions can take; None where that does not limit them."""
        ...


def runtime_for(device: Device, simulate: bool = False) -> Runtime:
    """The runtime of a device, or the tail-effect model in its place. Raises DeviceError.

    A GPU that is no board runs on ONNX Runtime where TensorRT is not installed, and a warning says so.
    """
    name = "simulated" if simulate else device.runtime
    if name == "trt" and not device.machine and find_spec("tensorrt") is None:
        log.warning("TensorRT is not installed: device %s runs on ONNX Runtime's CUDA provider", device.name)
        name = "ort"
    if name not in RUNTIMES:
        raise DeviceError(
            f"device {device.name} needs the runtime {name!r}, which this version does not have "
            f"(it has: {', '.join(RUNTIMES)}): plan with --simulate"
        )
    module, _, attribute = RUNTIMES[name].partition(":")
    runtime: Runtime = getattr(importlib.import_module(module), attribute)(device)
    return runtime

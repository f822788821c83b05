"""The interface that every runtime has, and a table of runtimes by name, imported on use."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from edgeprune.errors import DeviceError
from edgeprune.records import Device, GpuState, Progress, Setup, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

RUNTIMES = {
    "ort": "edgeprune.runtimes.ort:OrtRuntime",
    "trt": "edgeprune.runtimes.trt:TensorRT",
    "simulated": "edgeprune.runtimes.simulated:SimulatedRuntime",
}
RUNS_PER_TIMING = 2  # inferences of one time_ms(), the untimed one included


class Session(Protocol):
    """A loaded engine; a context manager that frees what it holds."""

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, values) fp32 outputs of one batch, (B, 3, H, W) fp32. Raises EngineError on a wrong shape.

        Several outputs are one array (features.packed).
        """
        ...

    def time_ms(self) -> float:
        """Latency of one inference on a fixed random input, right after an untimed one, ms; without copies.

        An untimed inference comes first so that caches and clocks are as when the engine runs by itself.
        """
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Inspected(Protocol):
    """A session that knows how its engine runs attention."""

    def fused_attention(self) -> int | None:
        """Attention layers that run as one fused kernel; None where the engine does not say."""
        ...


@runtime_checkable
class Captured(Protocol):
    """A session that may run an inference as one CUDA graph, which saves kernel launches."""

    @property
    def cuda_graph(self) -> bool | None:
        """Does it? None where that is unknown."""
        ...


def cuda_graph_of(session: object) -> bool | None:
    """Does an inference of this session run as one CUDA graph? None where it is not on a GPU, or unknown."""
    return session.cuda_graph if isinstance(session, Captured) else None


@runtime_checkable
class OnDevice(Protocol):
    """A session whose engine is in the memory of a device."""

    def memory_bytes(self) -> int:
        """Bytes that the engine takes there: weights, working memory, inputs and outputs."""
        ...


@runtime_checkable
class CopiesTimed(Protocol):
    """A session whose inputs and outputs are copied to and from the memory of a device."""

    def end_to_end_ms(self) -> float:
        """As time_ms, but wall time with both copies."""
        ...


@runtime_checkable
class TimedTogether(Protocol):
    """A session on another machine: many timings are one request, so that clocks do not fall while nothing runs."""

    def times_ms(self, order: Sequence[Session]) -> list[float]:
        """time_ms() of each of these sessions, which are all on that machine, one after the other."""
        ...


@runtime_checkable
class Observed(Protocol):
    """A runtime whose GPU reports its clock, temperature and throttling."""

    def gpu_state(self) -> GpuState | None:
        """The state now; None where it cannot be read."""
        ...


class Runtime(Protocol):
    """One way of running an ONNX file on a device."""

    suffix: str  # of a compiled file; .onnx where the ONNX file itself is what runs
    parity: float  # largest difference between its fp32 logits and PyTorch's that counts as rounding

    def setup(self, device: Device, precision: str, batch: int) -> Setup:
        """The setup of this runtime on this machine. Raises DeviceError, MissingError."""
        ...

    def compile(self, onnx: Path, setup: Setup, out: Path, progress: Progress = silent) -> None:
        """Compile `onnx` into the file `out`. Raises EngineError, OutputError."""
        ...

    def open(self, path: Path, setup: Setup) -> Session:
        """Load a compiled file. Raises EngineError."""
        ...

    def free_bytes(self) -> int | None:
        """Free bytes of the memory that sessions use; None where memory is not a limit."""
        ...


def runtime_for(device: Device, simulate: bool = False) -> Runtime:
    """The runtime of a device, or with `simulate` the tail-effect model instead. Raises DeviceError.

    A GPU other than a Jetson's runs on ONNX Runtime where TensorRT is not installed, and a warning says so.
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

"""The target of a run: where engines are compiled and timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edgeprune.defaults import WORK
from edgeprune.devices import check_is_here, has_capability, load_device
from edgeprune.errors import DeviceError, InputError
from edgeprune.io import sha256_file
from edgeprune.onnx_graph.precision import onnx_precision
from edgeprune.records import Device, Progress, Setup, silent
from edgeprune.runtimes import Runtime, runtime_for
from edgeprune.runtimes.inference import Open
from edgeprune.runtimes.kernel_times import model_of
from edgeprune.runtimes.quiet import timing
from edgeprune.runtimes.remote.runtime import RemoteRuntime
from edgeprune.runtimes.remote.ssh import Host
from edgeprune.runtimes.steps import WorkFolder

PRECISIONS = ("fp32", "fp16", "int8", "fp8")
FP8_CAPABILITY = (8, 9)  # "Working with Quantized Types": FP8 products from compute capability 8.9 (Ada) on
FP8_TENSORRT = 10  # the ONNX parser of 8.6 reads opset 17; FP8 is in opset 19


@dataclass(frozen=True)
class Target:
    """A device with the runtime and setup to measure under, and the work folder."""

    device: Device
    runtime: Runtime
    setup: Setup
    work: WorkFolder
    progress: Progress = silent
    alone: Callable[[], AbstractContextManager[None]] = nullcontext  # entered while something is timed

    @property
    def onnx_precision(self) -> str:
        """Precision of the ONNX files: fp32 for a simulation, which applies its precision itself."""
        return "fp32" if self.setup.simulated else onnx_precision(self.setup.precision, self.setup.runtime)

    @property
    def for_tensorrt(self) -> bool:
        """Must an ONNX file keep to TensorRT's limits? True for a simulated TensorRT device, too."""
        return self.setup.runtime == "trt" or (self.setup.simulated and self.device.runtime == "trt")

    def at(self, precision: str) -> Target:
        """The same target with another precision. Raises InputError, DeviceError where it has none."""
        check_precision(precision, self.device)
        if self.setup.simulated:
            model_of(self.device, precision)
        setup = msgspec.structs.replace(self.setup, precision=precision)
        check_fp8(setup)
        return replace(self, setup=setup)

    def engine(self, onnx: Path, *weights: str) -> Path:
        """The file that the runtime opens for an ONNX file: the same file, or the engine compiled from it.

        `weights` identifies weights outside the ONNX file, by sha256. Raises EngineError, OutputError.
        """
        if self.runtime.suffix == onnx.suffix:
            return onnx

        def make(path: Path) -> None:
            self.runtime.compile(onnx, self.setup, path, self.progress)

        return self.work.step("engine", self.runtime.suffix, (sha256_file(onnx), weights, self.setup), make)

    def opener(self, onnx: Path, *weights: str) -> Open:
        """Compile an ONNX file now, and return a function that opens its engine. Raises as engine()."""
        engine = self.engine(onnx, *weights)
        return lambda: self.runtime.open(engine, self.setup)


def check_batch(batch: int) -> None:
    """Raise InputError for a batch below 1."""
    if batch < 1:
        raise InputError(f"batch {batch} is not possible: use 1 or more")


def check_precision(precision: str, device: Device | None = None) -> None:
    """Raise InputError for a precision that does not exist, DeviceError for FP8 on a device without it."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    if precision == "fp8" and device is not None:
        if device.runtime != "trt":
            raise DeviceError(f"device {device.name} has no FP8, which needs TensorRT: choose fp32, fp16 or int8")
        _check_capability(device.compute_capability, device.name)


def check_fp8(setup: Setup) -> None:
    """Raise DeviceError where a setup with precision fp8 cannot run it."""
    if setup.precision != "fp8" or setup.simulated:
        return
    version = setup.runtime_version
    if setup.runtime != "trt" or int(version.partition(".")[0]) < FP8_TENSORRT:
        name = f"TensorRT {version}" if setup.runtime == "trt" else "ONNX Runtime"
        raise DeviceError(f"{name} has no FP8: install TensorRT {FP8_TENSORRT} or later, or choose fp16 or int8")
    _check_capability(setup.compute_capability, setup.device)


def _check_capability(capability: str | None, device: str) -> None:
    """Raise DeviceError for a compute capability below FP8_CAPABILITY; an unknown one (None) passes."""
    if not has_capability(capability, FP8_CAPABILITY):
        needed = ".".join(map(str, FP8_CAPABILITY))
        raise DeviceError(
            f"device {device} has no FP8: its compute capability is {capability}, FP8 needs {needed}: choose fp16 or "
            "int8"
        )


def target_for(
    device: str,
    precision: str = "fp32",
    batch: int = 1,
    simulate: bool = False,
    work: Path = WORK,
    progress: Progress = silent,
    host: Host | None = None,
    lock_clocks: bool = False,
) -> Target:
    """The target of a device that is this machine, is simulated, or is reached over ssh on `host`.

    Timings on this machine take turns with those of other processes (quiet.py). `lock_clocks` sets the clocks of
    `host` to their maximum. Raises DeviceError, MissingError, InputError, HostError.
    """
    check_batch(batch)
    found = load_device(device)
    check_precision(precision, found)
    runtime: Runtime
    if host is not None:
        if simulate:
            raise InputError("--simulate needs no host: leave out --host")
        runtime = RemoteRuntime(found, host, lock_clocks)
    else:
        if not simulate:
            check_is_here(found)
        runtime = runtime_for(found, simulate)
    setup = runtime.setup(found, precision, batch)
    check_fp8(setup)
    here = host is None and not simulate
    return Target(found, runtime, setup, WorkFolder(work), progress, timing if here else nullcontext)

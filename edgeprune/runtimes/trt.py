"""TensorRT: compiles ONNX to plans and loads them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from edgeprune.devices import check_is_here, this_machine
from edgeprune.devices.gpu_state import gpu_state
from edgeprune.devices.memory import available_bytes
from edgeprune.devices.power import power_mode
from edgeprune.errors import DeviceError
from edgeprune.io import writable, write_bytes
from edgeprune.records import Device, GpuState, Progress, Setup, TrtOptions, silent
from edgeprune.runtimes.cuda import driver, errors_of, gpu
from edgeprune.runtimes.trt_builder import plan_from_onnx, tensorrt
from edgeprune.runtimes.trt_log import MIB, logger_of
from edgeprune.runtimes.trt_session import TrtSession

log = logging.getLogger(__name__)

WORKSPACE_SHARE = 4  # the workspace is at most this part of all memory: the model and its weights need some, too
WORKSPACE_STEP_MIB = 256


class TensorRT:
    """TensorRT 8.6, 10 and 11."""

    suffix, parity = ".engine", 2e-3

    def __init__(self, device: Device) -> None:
        self.device = device
        self.options = device.trt or TrtOptions()

    def setup(self, device: Device, precision: str, batch: int) -> Setup:
        """The setup here. Raises DeviceError for another machine or TensorRT, MissingError."""
        check_is_here(device)
        version = str(tensorrt().__version__)
        if device.tensorrt and not fits(version, device.tensorrt):
            source = f"JetPack {device.jetpack}" if device.jetpack else "such a version"
            raise DeviceError(
                f"device {device.name} needs TensorRT {device.tensorrt}, this is {version}: install "
                f"{source}, or pass your own .toml device file"
            )
        card, attributes = gpu(), driver().device_attribute
        sm_count = card.get_attribute(attributes.MULTIPROCESSOR_COUNT)
        if device.sm_count not in (None, sm_count):
            log.warning("%s has %s SMs, but this GPU has %d: check --device", device.name, device.sm_count, sm_count)
        return Setup(
            device=device.name,
            machine=this_machine(card.name()),
            runtime="trt",
            runtime_version=version,
            precision=precision,
            batch=batch,
            power_mode=power_mode(device),
            compute_capability="{}.{}".format(*card.compute_capability()),
            gpu=card.name(),
            sm_count=sm_count,
            workspace_mib=workspace_mib(self.options, card.total_memory()),
            options=changed_options(self.options),
        )

    def compile(self, onnx: Path, setup: Setup, out: Path, progress: Progress = silent) -> None:
        """Build a plan; its log is written next to it as .log. Raises EngineError, OutputError."""
        logger = logger_of(tensorrt())
        logger.lines.clear()
        timing = out.parent / f"timing-{slug_of(setup)}.cache"
        workspace = (setup.workspace_mib or self.options.workspace_mib) * MIB
        try:
            with errors_of(str(onnx)):
                plan = plan_from_onnx(onnx, self.options, workspace, self.free_bytes(), timing, logger, progress)
        finally:
            with writable(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                text = "".join(f"{severity}: {line}\n" for severity, line in logger.lines)
                out.with_suffix(".log").write_text(text)
        write_bytes(out, plan)

    def free_bytes(self) -> int:
        """Free memory of the GPU, bytes.

        A Jetson's GPU uses the system's memory, and what CUDA calls free there leaves out what the kernel can
        reclaim (source: CUDA for Tegra, "Estimating Total Allocatable Device Memory"): MemAvailable counts instead.
        """
        shared = gpu().get_attribute(driver().device_attribute.INTEGRATED)
        available = available_bytes() if shared else None
        return int(driver().mem_get_info()[0]) if available is None else available

    def gpu_state(self) -> GpuState | None:
        """Clock, temperature and throttling of the GPU now; None where it cannot be read."""
        return gpu_state()

    def open(self, path: Path, setup: Setup) -> TrtSession:
        """Load a plan. Raises EngineError where it is truncated, or built for another TensorRT or GPU."""
        return TrtSession(path)


def workspace_mib(options: TrtOptions, total_bytes: int) -> int:
    """The limit of the builder's workspace, MiB: the same at every build here, as tactics depend on it."""
    share = total_bytes // WORKSPACE_SHARE // MIB // WORKSPACE_STEP_MIB * WORKSPACE_STEP_MIB
    return min(options.workspace_mib, max(share, WORKSPACE_STEP_MIB))


def slug_of(setup: Setup) -> str:
    """GPU and version of TensorRT in the name of a file: what timings of tactics belong to."""
    parts = f"{setup.gpu} {setup.sm_count} {setup.compute_capability} {setup.runtime_version}"
    return re.sub(r"[^a-z0-9]+", "-", parts.lower()).strip("-")[:120]


def fits(version: str, wanted: str) -> bool:
    """Is a version such as "8.6.1.6" in a range such as ">=8.6,<11" (PEP 440)? Raises DeviceError for a bad range."""
    try:
        return SpecifierSet(wanted).contains(version, prereleases=True)
    except InvalidSpecifier:
        raise DeviceError(f"{wanted!r} is not a range of versions: write it as >=8.6,<11") from None


def changed_options(options: TrtOptions) -> str | None:
    """Builder options other than the defaults, "name=value …"; None where all are defaults."""
    default = TrtOptions()
    changed = [
        f"{f}={getattr(options, f)}" for f in options.__struct_fields__ if getattr(options, f) != getattr(default, f)
    ]
    return " ".join(changed) or None

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
from edgeprune.errors import DeviceError, EngineError
from edgeprune.io import writable, write_bytes
from edgeprune.onnx_graph.graph import weights_of
from edgeprune.records import Device, GpuState, Progress, Setup, TrtOptions, silent
from edgeprune.runtimes.cuda import driver, errors_of, gpu
from edgeprune.runtimes.trt_builder import plan_from_onnx, tensorrt
from edgeprune.runtimes.trt_log import MIB, logger_of
from edgeprune.runtimes.trt_session import TrtSession

log = logging.getLogger(__name__)

WORKSPACE_SHARE = 4  # the workspace is at most this part of all memory: the model and its weights need some, too
WORKSPACE_STEP_MIB = 256
LEAST_FREE = 256 * MIB  # with less, no ViT can be built
# What a build takes besides its workspace, where GPU and CPU share the memory: TensorRT's builder (1.1 to 1.4 GiB in
# logs of 8.6 and 10), and copies of the weights: of the parser, of the builder, in the plan.
BUILDER_BYTES, COPIES_OF_WEIGHTS = 1536 * MIB, 3


class TensorRT:
    """TensorRT 8.6, 10 and 11."""

    suffix, parity = ".engine", 2e-3

    def __init__(self, device: Device) -> None:
        self.device = device
        self.options = device.trt or TrtOptions()
        self.timings: Path | None = None  # folder of the timing cache; None: that of the engine

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
        timing = (self.timings or out.parent) / f"timing-{slug_of(setup)}.cache"
        workspace = (setup.workspace_mib or self.options.workspace_mib) * MIB
        try:
            with errors_of(str(onnx)):
                free = self.free_bytes()
                self._check_memory(onnx, workspace, free)
                plan = plan_from_onnx(onnx, self.options, workspace, free, timing, logger, progress)
        finally:
            with writable(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                text = "".join(f"{severity}: {line}\n" for severity, line in logger.lines)
                out.with_suffix(".log").write_text(text)
        write_bytes(out, plan)

    def _check_memory(self, onnx: Path, workspace: int, free: int) -> None:
        """Raise EngineError where a build would run out of memory, all in bytes."""
        files = (onnx, *weights_of(onnx)) if self.shared else ()
        besides = BUILDER_BYTES + COPIES_OF_WEIGHTS * sum(file.stat().st_size for file in files) if files else 0
        needed = max(workspace, LEAST_FREE) + besides
        if free < needed:
            parts = f" (a workspace of {workspace // MIB}, the rest for TensorRT and the weights)" if besides else ""
            raise EngineError(
                f"only {free // MIB} MiB of GPU memory are free, and the builder may use {needed // MIB} MiB{parts}: "
                "close other programs, or lower workspace_mib under [trt] of the device file"
            )

    @property
    def shared(self) -> bool:
        """Does the GPU use the memory of the CPU, as a Jetson's does?"""
        return bool(gpu().get_attribute(driver().device_attribute.INTEGRATED))

    def free_bytes(self) -> int:
        """Free memory of the GPU, bytes.

        A Jetson's GPU uses the system's memory, and what CUDA calls free there leaves out what the kernel can
        reclaim (source: CUDA for Tegra, "Estimating Total Allocatable Device Memory"): MemAvailable counts instead.
        """
        available = available_bytes() if self.shared else None
        return int(driver().mem_get_info()[0]) if available is None else available

    def gpu_state(self) -> GpuState | None:
        """Clock, temperature and throttling of the GPU now; None where it cannot be read."""
        return gpu_state()

    def open(self, path: Path, setup: Setup) -> TrtSession:
        """Load a plan. Raises EngineError where it is truncated, or built for another TensorRT or GPU."""
        card, sm_count = gpu(), driver().device_attribute.MULTIPROCESSOR_COUNT
        capability = "{}.{}".format(*card.compute_capability())
        here = (card.name(), card.get_attribute(sm_count), capability)
        return TrtSession(path, built_here=here == (setup.gpu, setup.sm_count, setup.compute_capability))


def workspace_mib(options: TrtOptions, total_bytes: int) -> int:
    """The limit of the builder's workspace, MiB: the same at every build here, as tactics depend on it."""
    share = total_bytes // WORKSPACE_SHARE // MIB // WORKSPACE_STEP_MIB * WORKSPACE_STEP_MIB
    return min(options.workspace_mib, max(share, WORKSPACE_STEP_MIB))


def slug_of(setup: Setup) -> str:
    """GPU, version of TensorRT and power mode in the name of a file: what timings of tactics belong to."""
    gpu_here = f"{setup.gpu} {setup.sm_count} {setup.compute_capability}"
    parts = f"{gpu_here} {setup.runtime_version} {setup.power_mode or ''}"
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

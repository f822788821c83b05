"""Devices, one TOML file each, and which of them this machine is."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import shlex
import subprocess
from importlib import resources
from pathlib import Path

import msgspec

from edgeprune.errors import DeviceError, RecordError
from edgeprune.io import read_bytes
from edgeprune.records import Device, TrtOptions

log = logging.getLogger(__name__)

MAX_TOML_BYTES = 64 << 10
DEVICE_TREE = Path("/proc/device-tree/model")
CPUINFO = Path("/proc/cpuinfo")
SIMULATION_FIGURES = ("clock_mhz", "bandwidth_gb_per_s", "launch_us", "l2_bytes_per_clock_per_sm")
NVIDIA_SMI, LIBCUDA = "nvidia-smi", "libcuda.so.1"
UNMASKED = "docker run --security-opt systempaths=unconfined"  # shows /proc/device-tree in a container


def names() -> tuple[str, ...]:
    """The devices that come with edgeprune, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load_device(name: str) -> Device:
    """The device called `name`, or the one in a user's file when `name` ends in .toml.

    Raises DeviceError for an unknown name, RecordError for a file that cannot be read or a field
    (named as `$.field`) that is missing, unknown or out of range.
    """
    if name.endswith(".toml"):
        return parse(read_bytes(Path(name), MAX_TOML_BYTES), name)
    if name not in names():
        raise DeviceError(f"unknown device {name!r}: choose {', '.join(names())}, or pass your own .toml file")
    return parse((resources.files(__name__) / f"{name}.toml").read_bytes(), f"{name}.toml")


def parse(data: bytes, source: str) -> Device:
    """TOML bytes to a checked Device. Raises RecordError naming `source` and the field."""
    try:
        device = msgspec.toml.decode(data, type=Device)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise RecordError(f"{source}: not a valid device file: {detail}: correct it") from None
    if problem := _problem(device):
        raise RecordError(f"{source}: not a valid device file: {problem}: correct it")
    return device


def has_capability(known: str | None, least: tuple[int, int]) -> bool:
    """Is a compute capability such as "8.7" at least `least`? An unknown one (None) counts as that."""
    return known is None or tuple(map(int, known.split("."))) >= least


def _problem(device: Device) -> str | None:
    """The first field with an unusable value, and why; None where all are good."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", device.name):
        return "$.name: use lower-case letters, digits, - and _"
    if device.compute_capability is not None and not re.fullmatch(r"\d{1,3}\.\d", device.compute_capability):
        return "$.compute_capability: major and minor version, for example 8.7"
    figures: dict[str, float | None] = {"sm_count": device.sm_count, "memory_gib": device.memory_gib}
    if (model := device.simulation) is not None:
        if device.sm_count is None:
            return "$.sm_count: a simulation needs it"
        if not model.fma_per_clock_per_sm:
            return "$.simulation.fma_per_clock_per_sm: name at least one precision"
        figures |= {f"simulation.{k}": getattr(model, k) for k in SIMULATION_FIGURES}
        figures |= {f"simulation.fma_per_clock_per_sm.{k}": v for k, v in model.fma_per_clock_per_sm.items()}
    if problem := _trt_problem(device.trt):
        return problem
    for field in ("power_query", "clocks_query"):
        try:
            shlex.split(getattr(device, field) or "")
        except ValueError as error:
            return f"$.{field}: {error}"
    for field, value in figures.items():
        if value is not None and not 0 < value < 1e9:
            return f"$.{field} is not above 0 and below 1e9"
    return None


def _trt_problem(options: TrtOptions | None) -> str | None:
    if options is None:
        return None
    if options.dla_core is not None:
        return "$.trt.dla_core: DLA has no LayerNorm and no product of two activations, so a ViT cannot run there"
    if options.typing not in ("strong", "weak"):
        return "$.trt.typing: strong or weak"
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        return "$.trt.optimization_level: 0 to 5"
    return None if 0 < options.workspace_mib <= 1 << 20 else "$.trt.workspace_mib is not above 0 and below 2**20"


def this_machine(gpu: str | None = None) -> str:
    """The name of this machine on one line: the board's name, else the CPU and the GPU if there is one.

    `gpu` is the name of the GPU that is used, where the caller knows it.
    """
    if board := _first_line(DEVICE_TREE):
        return board
    cpu = platform.processor() or platform.machine() or "unknown processor"
    if CPUINFO.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(errors="replace"), re.MULTILINE)
        cpu = named[1].strip() if named else cpu
    gpu = gpu or nvidia_gpu()
    return f"{cpu}, {gpu}" if gpu else cpu


def nvidia_gpu() -> str | None:
    """Name of the GPU that CUDA uses first, or None where neither `nvidia-smi` nor the driver knows one."""
    lines = (smi("--query-gpu=name --format=csv,noheader") or "").splitlines()
    return lines[0].strip() if lines else _name_from_driver()


def smi(arguments: str) -> str | None:
    """Output of nvidia-smi for the GPU that CUDA uses first; None where it fails.

    CUDA_VISIBLE_DEVICES takes an index or a UUID, as nvidia-smi does; runtimes.cuda makes both count alike.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    return run(f"{NVIDIA_SMI} -i {shlex.quote(first)} {arguments}")


def _name_from_driver() -> str | None:
    """The name that the CUDA driver gives GPU 0, for containers without nvidia-smi; None where there is no driver."""
    try:
        cuda = ctypes.CDLL(LIBCUDA)
    except OSError:
        return None
    name, number = ctypes.create_string_buffer(256), ctypes.c_int()
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(number), 0) or cuda.cuDeviceGetName(name, 256, number)
    return None if failed else name.value.decode(errors="replace")


def run(command: str, timeout_s: float = 20) -> str | None:
    """The output of a command; None where it does not exist, fails, or takes longer than `timeout_s`."""
    try:
        done = subprocess.run(
            shlex.split(command), capture_output=True, text=True, errors="replace", timeout=timeout_s
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_is_here(device: Device) -> None:
    """Raise DeviceError unless engines for `device` can be built and timed on this machine.

    A device with `machine` must find one of those strings in this machine's name, or, where docker hides the name of
    a board, its `gpu` in the name of the GPU. One without needs an NVIDIA GPU if it has a range of TensorRT versions
    (cuda), and nothing otherwise (cpu).
    """
    plan = "plan with --simulate" if device.simulation else "choose --device cpu"
    if not device.build:
        raise DeviceError(f"building for device {device.name} is not supported: {device.reason}: {plan}")
    elsewhere = f"device {device.name} is not this machine"
    if device.machine:
        here = this_machine()
        if any(part in here for part in device.machine):
            return
        hidden = not _first_line(DEVICE_TREE) and platform.machine() == "aarch64"
        if hidden and device.gpu is not None and device.gpu in here:
            log.warning(
                "the board's name cannot be read, but its GPU matches %s: in a container, pass the name with %s",
                device.name, UNMASKED,
            )  # fmt: skip
            return
        container = f" (in a container: {UNMASKED})" if hidden else ""
        raise DeviceError(
            f"{elsewhere} (this is {here}): run there{container}, name it with --host USER@HOST, or {plan}"
        )
    if device.tensorrt is not None and nvidia_gpu() is None:
        here = f"{this_machine()}; {NVIDIA_SMI} finds no NVIDIA GPU"
        raise DeviceError(f"{elsewhere} (this is {here}): run there, name it with --host USER@HOST, or {plan}")


def _first_line(path: Path) -> str:
    """The first line of a small system file without its NUL; empty where the file is absent."""
    try:
        return path.read_bytes().replace(b"\0", b"").decode(errors="replace").strip().partition("\n")[0]
    except OSError:
        return ""

"""Checks of the installation and of this machine: what would make its latencies unreliable."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from edgeprune.devices import load_device, names, power, this_machine
from edgeprune.errors import install
from edgeprune.version import __version__

PACKAGES = {
    "numpy": "base",
    "onnx": "base",
    "pillow": "base",
    "jinja2": "base",
    "packaging": "base",
    "torch": "export",
    "torchvision": "export",
    "timm": "export",
    "onnxscript": "export",
    "onnxruntime": "ort",
    "onnxruntime-gpu": "ort-gpu",
    "tensorrt": "trt",
    "pycuda": "trt",
    "cuda-bindings": "cuda-python",
}
CPU = Path("/sys/devices/system/cpu")
HOT_C = 80.0


class Finding(NamedTuple):
    """One line of the doctor: `status` is ok, info or warning; a warning ends with what to do."""

    name: str
    status: str
    detail: str


def examine() -> list[Finding]:
    """All findings; nothing is changed."""
    return [*_software(), *_machine()]


def _software() -> list[Finding]:
    found = [Finding("edgeprune", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")]
    installed = set()
    for package, extra in PACKAGES.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            how = "" if extra == "base" else f": {install(extra)}"
            found.append(Finding(package, "info", f"not installed{how}"))
            continue
        installed.add(package)
        found.append(Finding(package, "ok", version))
    if {"onnxruntime", "onnxruntime-gpu"} <= installed:
        what = "both are installed and overwrite each other: uninstall one"
        found.append(Finding("onnxruntime", "warning", what))
    return found


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [Finding("machine", "ok", f"{this_machine()}, {cores} processors")]
    governor = _read(CPU / "cpu0/cpufreq/scaling_governor")
    if governor is None:
        found.append(Finding("governor", "info", "cannot be read (virtual machine?): expect drift"))
    elif governor == "performance":
        found.append(Finding("governor", "ok", governor))
    else:
        what = f"{governor}: clocks change with the load, set it to performance before measuring"
        found.append(Finding("governor", "warning", what))
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        busy = load > 0.5 * cores
        what = f"{load:.2f} over the last minute" + (": other work is running, wait for it" if busy else "")
        found.append(Finding("load", "warning" if busy else "ok", what))
    degrees = power.temperature_c()
    if degrees is not None:
        hot = degrees >= HOT_C
        what = f"{degrees:.0f} °C at most" + (": close to throttling, let it cool down" if hot else "")
        found.append(Finding("temperature", "warning" if hot else "ok", what))
    found += _board()
    stolen = _steal_percent()
    if stolen is not None and stolen > 1:
        what = f"{stolen:.1f} % of processor time since boot went to other guests: latencies are noisy, measure twice"
        found.append(Finding("shared cores", "warning", what))
    return found


def _board() -> list[Finding]:
    """JetPack, power mode and clocks, where this machine is a known board."""
    found = []
    if (version := power.jetpack()) is not None:
        old = version == "5"
        what = f"JetPack {version}" + (": too old (Python 3.8, TensorRT 8.5), flash JetPack 6" if old else "")
        found.append(Finding("jetpack", "warning" if old else "ok", what))
    here = this_machine()
    for device in map(load_device, names()):
        if any(part in here for part in device.machine):
            mode = power.power_mode(device)
            found.append(Finding("power mode", "ok" if mode else "info", mode or "unknown: nvpmodel gives none"))
            if power.locked() is False:
                found.append(Finding("clocks", "warning", "change with the load: measure with --lock-clocks"))
            break
    return found


def _steal_percent() -> float | None:
    """Processor time since boot that the hypervisor gave to others, percent; None is unknown. Source: proc(5)."""
    line = (_read(Path("/proc/stat")) or "").partition("\n")[0].split()
    if len(line) < 9 or line[0] != "cpu":
        return None
    ticks = [int(value) for value in line[1:9]]
    return 100 * ticks[7] / max(sum(ticks), 1)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None

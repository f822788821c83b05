"""Memory of this process, and power from the INA3221 and INA238 sensors of a Jetson."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

INA3221, INA238 = Path("/sys/bus/i2c/drivers/ina3221"), Path("/sys/bus/i2c/drivers/ina238")
# Rails that add up to the input power of the module; the first set that is present counts, other rails are fed from
# these. Source: NVIDIA, "Jetson Orin Nano, Orin NX and AGX Orin Series", Software-Based Power Consumption Modeling;
# for Thor, whose INA238 measures the whole input, NVIDIA's answer in forums.developer.nvidia.com/t/366461.
INPUT = "VIN"
TOTALS = ((INPUT,), ("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
PERIOD_S = 0.02
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # Linux kernel, "The /proc Filesystem", clear_refs: the peak restarts at what is resident now


class PeakMemory:
    """Peak resident memory of this process within a `with` block, minus what it had before, as `bytes`.

    Memory freed earlier is returned to the system first; its reuse would not be counted. `bytes` is None where the
    kernel has no /proc/self/clear_refs.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)
        self._before = _status_bytes("VmRSS")
        try:
            CLEAR_REFS.write_text(RESET_PEAK)
        except OSError:
            self._before = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        peak = _status_bytes("VmHWM")
        if peak is not None and self._before is not None:
            self.bytes = max(peak - self._before, 0)


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where it is absent. Source: proc_pid_status(5)."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), None)


def rails_w() -> dict[str, float]:
    """Power by the label of a rail, W; empty where there is no sensor.

    Files of an INA3221: in*_label, in*_input (mV), curr*_input (mA); of an INA238, which has one channel:
    power1_input (µW), and a label where the device tree has one. Source: Linux kernel, "hwmon/ina3221" and
    "hwmon/ina238".
    """
    found = {}
    for power in INA238.glob("*/hwmon/hwmon*/power1_input"):
        label = power.with_name("label")
        try:
            name = label.read_text().strip() if label.exists() else INPUT
            found[name] = int(power.read_text()) / 1e6
        except (OSError, ValueError):
            continue
    for label in INA3221.glob("*/hwmon/hwmon*/in*_label"):
        current = label.with_name(label.name.replace("in", "curr", 1).replace("label", "input"))
        try:
            millivolts = int(label.with_name(label.name.replace("label", "input")).read_text())
            found[label.read_text().strip()] = millivolts * int(current.read_text()) / 1e6
        except (OSError, ValueError):  # reading an unconnected channel is an error
            continue
    return found


def total_w(rails: Mapping[str, float]) -> float | None:
    """Power of the whole module, W, idle power included; None where its rails are not known."""
    for names in TOTALS:
        if set(names) <= set(rails):
            return sum(rails[name] for name in names)
    return None


class Meter:
    """Reads the power every PERIOD_S in a thread during a `with` block."""

    def __init__(self) -> None:
        self._samples_w: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        while not self._done.is_set():
            if (watts := total_w(rails_w())) is not None:
                self._samples_w.append(watts)
            self._done.wait(PERIOD_S)

    def __enter__(self) -> Meter:
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._thread.join()

    @property
    def energy_j(self) -> float | None:
        """Energy of the block, J: mean power times time; None where no sensor could be read."""
        return sum(self._samples_w) / len(self._samples_w) * self.seconds if self._samples_w else None

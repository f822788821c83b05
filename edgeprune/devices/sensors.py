"""What running takes besides time: memory of this process, power from a Jetson's INA3221 sensors."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

INA3221 = Path("/sys/bus/i2c/drivers/ina3221")
# What adds up to all that a module takes in, whichever is there. Source: NVIDIA, "Jetson Orin Nano, Orin NX and AGX
# Orin Series", Software-Based Power Consumption Modeling; the other rails are fed from these.
TOTALS = (("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
PERIOD_S = 0.02
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # Linux kernel, "The /proc Filesystem", clear_refs: the peak starts anew from what is resident now


class PeakMemory:
    """Resident memory of this process at its peak within a `with` block, beyond what it held before, in bytes.

    What earlier sessions freed is given back to the system first, or it would be used again unseen. `bytes` is None
    where /proc does not tell (no Linux, or a kernel without clear_refs).
    """

    def __init__(self) -> None:
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
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
    """A field of /proc/self/status, which gives KiB. Source: proc_pid_status(5)."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), None)


def rails_w() -> dict[str, float]:
    """Watts by the label of a rail, volts times amperes; empty where no sensor answers.

    Files: in*_label, in*_input (mV), curr*_input (mA). Source: Linux kernel, "hwmon/ina3221".
    """
    found = {}
    for label in INA3221.glob("*/hwmon/hwmon*/in*_label"):
        current = label.with_name(label.name.replace("in", "curr", 1).replace("label", "input"))
        try:
            millivolts = int(label.with_name(label.name.replace("label", "input")).read_text())
            found[label.read_text().strip()] = millivolts * int(current.read_text()) / 1e6
        except (OSError, ValueError):  # a channel that is not connected answers with an error
            continue
    return found


def total_w(rails: Mapping[str, float]) -> float | None:
    """Watts that the whole module takes, idle power included; None where its rails are not known."""
    for names in TOTALS:
        if set(names) <= set(rails):
            return sum(rails[name] for name in names)
    return None


class Meter:
    """Reads the power every PERIOD_S in a thread while the block of a `with` runs."""

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
        """Joules taken during the block: mean power times time; None where nothing answered."""
        return sum(self._samples_w) / len(self._samples_w) * self.seconds if self._samples_w else None

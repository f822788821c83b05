"""Power mode, clocks and temperature of a board; its clocks locked during a measurement and always restored."""

from __future__ import annotations

import os
import re
import shlex
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeprune.devices import run, smi
from edgeprune.devices.gpu_state import gpu_clock_hz
from edgeprune.errors import DeviceError
from edgeprune.records import Device

THERMAL = Path("/sys/class/thermal")
NV_RELEASE = Path("/etc/nv_tegra_release")
JETPACK_OF_L4T = {"35": "5", "36": "6", "38": "7", "39": "7"}  # NVIDIA, "Jetson Linux archive"
SUDOERS = "%sudo ALL=(root) NOPASSWD: /usr/bin/jetson_clocks"


def power_mode(device: Device) -> str | None:
    """The power mode of a board, "MAXN, clocks locked"; for another GPU its power limit; None where unknown."""
    if device.power_query:
        text = run(device.power_query) or ""
        found = re.search(r"NV Power Mode:\s*(\S+)", text)
        return found[1] + (", clocks locked" if locked() else "") if found else None
    limit = smi("--query-gpu=power.limit --format=csv,noheader")
    return f"power limit {limit.splitlines()[0].strip()}" if limit else None


def locked() -> bool | None:
    """Are the clocks of a Jetson's GPU fixed? None elsewhere. Unlike jetson_clocks --show, this needs no root."""
    lowest, highest = gpu_clock_hz("min"), gpu_clock_hz("max")
    return None if lowest is None or highest is None else lowest == highest


def temperature_c() -> float | None:
    """The hottest thermal zone, °C; None where there is none."""
    degrees = []
    for path in THERMAL.glob("thermal_zone*/temp"):
        try:
            degrees.append(int(path.read_text()) / 1000)
        except (OSError, ValueError):  # some zones of a Jetson can be read only while their unit is powered
            continue
    return max(degrees, default=None)


def jetpack() -> str | None:
    """The major version of JetPack from the L4T release, for example "6"; None on other machines."""
    try:
        found = re.search(r"# R(\d+)", NV_RELEASE.read_text(errors="replace"))
    except OSError:
        return None
    return JETPACK_OF_L4T.get(found[1], f"of L4T {found[1]}") if found else None


@contextmanager
def locked_clocks(device: Device) -> Iterator[None]:
    """Set clocks to their maximum inside the `with` block and restore them afterwards, also on Ctrl-C or SIGTERM.

    Raises DeviceError where they cannot be set, for example without root.
    """
    with _ends_as_interrupt(), _locked(device):
        yield


@contextmanager
def _ends_as_interrupt() -> Iterator[None]:
    """What ends a process without another word (a cancelled CI job, a lost terminal) raises KeyboardInterrupt."""
    main = threading.current_thread() is threading.main_thread()
    taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if main and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _locked(device: Device) -> Iterator[None]:
    if device.clocks_query:
        program = "jetson_clocks" if os.geteuid() == 0 else "sudo -n jetson_clocks"
        with tempfile.TemporaryDirectory() as folder:
            saved = shlex.quote(f"{folder}/clocks")
            _run_or_raise(f"{program} --store {saved}")
            try:
                _run_or_raise(program)
                yield
            finally:
                _run_or_raise(f"{program} --restore {saved}")
        return
    top = (smi("--query-gpu=clocks.max.sm --format=csv,noheader,nounits") or "").partition("\n")[0].strip()
    if not top.isdigit():  # "[N/A]"
        raise DeviceError(
            f"clocks of {device.name} cannot be locked (nvidia-smi reports no maximum): leave out --lock-clocks"
        )
    try:
        _check(smi(f"--lock-gpu-clocks={top}"), "nvidia-smi --lock-gpu-clocks")
        yield
    finally:
        _check(smi("--reset-gpu-clocks"), "nvidia-smi --reset-gpu-clocks")


def _run_or_raise(command: str) -> None:
    _check(run(command), command, f", put `{SUDOERS}` in /etc/sudoers.d/jetson_clocks there")


def _check(output: str | None, command: str, also: str = "") -> None:
    if output is None:
        raise DeviceError(f"`{command}` failed: run as root (sudo){also}, or leave out --lock-clocks")

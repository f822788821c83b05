"""Clock, temperature and throttling of a GPU: sysfs on a Jetson, nvidia-smi elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgeprune.devices import smi
from edgeprune.records import GpuState

SYS = Path("/sys")
# Sources: NVIDIA, Jetson Linux Developer Guide, "Jetson Orin Nano Series, Jetson Orin NX Series and Jetson AGX Orin
# Series": thermal and over-current throttling. The counters are of the whole module; all of them lower clocks.
# Orin with JetPack 6, with JetPack 5, Thor (whose gpu-nvd-0 is the video engines).
CLOCKS = ("class/devfreq/*.gpu", "class/devfreq/*ga10b*", "class/devfreq/gpu-gpc-*")
OVER_CURRENT = "class/hwmon/hwmon*/oc*_event_cnt"
HEAT = "devices/platform/*-throttle-alert/thermal_trip_event"
FIELDS = ("clocks.sm", "temperature.gpu", "clocks_throttle_reasons.active")
# How long clocks have been lowered so far, by cause, us; older drivers have no such fields. What is active
# says little: it is read before and after a stage, when the GPU is idle.
COUNTERS = {
    "clocks_event_reasons_counters.sw_power_cap": "power cap",
    "clocks_event_reasons_counters.sw_thermal_slowdown": "heat, software",
    "clocks_event_reasons_counters.hw_thermal_slowdown": "heat, hardware",
    "clocks_event_reasons_counters.hw_power_brake_slowdown": "power brake",
}
# Bits of NVML's clocks event reasons (nvml.h). Left out: idle, clocks set by the user, sync boost.
REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat, software",
    0x40: "heat, hardware",
    0x80: "power brake",
}


def gpu_state() -> GpuState | None:
    """The state now; None on a machine without an NVIDIA GPU, or whose GPU tells nothing."""
    return _jetson() or _card()


def gpu_clock_hz(which: str) -> int | None:
    """The clock of a Jetson's GPU: "cur", or the "min" or "max" that it may have now; None on other machines."""
    clocks = [_number(path / f"{which}_freq") for pattern in CLOCKS for path in SYS.glob(pattern)]
    return max((n for n in clocks if n is not None), default=None)


def _jetson() -> GpuState | None:
    hertz = gpu_clock_hz("cur")
    if hertz is None:
        return None
    events = {f"over-current, {path.name.partition('_')[0]}": _number(path) for path in SYS.glob(OVER_CURRENT)}
    events |= {_unit(path.parent.name): _number(path) for path in SYS.glob(HEAT)}
    cooling = {path.parent: path.read_text().strip() for path in SYS.glob("class/thermal/cooling_device*/type")}
    active = [
        _unit(kind)
        for folder, kind in sorted(cooling.items())
        if kind.endswith("-throttle-alert") and _number(folder / "cur_state")
    ]
    return GpuState(
        clock_mhz=hertz / 1e6,
        temperature_c=_temperature_c(SYS.glob("class/thermal/thermal_zone*/type")),
        throttles=tuple(active),
        events={name: count for name, count in events.items() if count is not None},
    )


def _unit(name: str) -> str:
    """gpu-throttle-alert as a reason."""
    return f"heat, {name.partition('-')[0]}"


def _temperature_c(kinds: Iterable[Path]) -> float | None:
    """The zone of the GPU, which can be read only while it is powered, else that of the junction (tj), °C."""
    zones = {path.read_text().strip(): _number(path.with_name("temp")) for path in kinds}
    for name in ("gpu-thermal", "tj-thermal"):
        if (milli := zones.get(name)) is not None:
            return milli / 1000
    return None


def _card() -> GpuState | None:
    found = _asked(*FIELDS, *COUNTERS) or _asked(*FIELDS)
    if found is None:
        return None
    clock, degrees, reasons = (found[field] for field in FIELDS)
    bits = int(reasons, 16) if reasons.startswith("0x") else 0
    lowered = {cause: found.get(field, "") for field, cause in COUNTERS.items()}
    return GpuState(
        clock_mhz=float(clock) if clock.isdigit() else None,
        temperature_c=float(degrees) if degrees.isdigit() else None,
        throttles=tuple(name for bit, name in REASONS.items() if bits & bit),
        events={cause: int(us) // 1000 for cause, us in lowered.items() if us.isdigit()},
    )


def _asked(*fields: str) -> dict[str, str] | None:
    """What nvidia-smi says about these fields; None where it fails, as it does where it does not know one of them."""
    said = (smi(f"--query-gpu={','.join(fields)} --format=csv,noheader,nounits") or "").split(",")
    return dict(zip(fields, map(str.strip, said), strict=True)) if len(said) == len(fields) else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # a zone or a counter that cannot be read now
        return None

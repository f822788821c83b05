"""Clock, temperature and throttling: a sysfs tree as on a Jetson, nvidia-smi as a script."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from edgeprune import devices
from edgeprune.devices import gpu_state, power
from edgeprune.records import Conditions, GpuState


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An Orin that nothing slows down."""
    monkeypatch.setattr(gpu_state, "SYS", tmp_path)
    monkeypatch.setattr(devices, "NVIDIA_SMI", str(tmp_path / "nvidia-smi"))
    files = {
        "class/devfreq/17000000.gpu/cur_freq": "1020000000",
        "class/devfreq/17000000.gpu/min_freq": "306000000",
        "class/devfreq/17000000.gpu/max_freq": "1020000000",
        "class/devfreq/15340000.vic/cur_freq": "2000000000",
        "class/thermal/thermal_zone0/type": "cpu-thermal",
        "class/thermal/thermal_zone0/temp": "71000",
        "class/thermal/thermal_zone1/type": "gpu-thermal",
        "class/thermal/thermal_zone1/temp": "55500",
        "class/thermal/cooling_device0/type": "pwm-fan",
        "class/thermal/cooling_device0/cur_state": "3",
        "class/thermal/cooling_device1/type": "gpu-throttle-alert",
        "class/thermal/cooling_device1/cur_state": "0",
        "class/hwmon/hwmon3/oc1_event_cnt": "0",
        "class/hwmon/hwmon3/oc3_event_cnt": "7",
        "devices/platform/gpu-throttle-alert/thermal_trip_event": "2",
    }
    write(tmp_path, files)
    return tmp_path


def state() -> GpuState:
    found = gpu_state.gpu_state()
    assert found is not None
    return found


def test_a_jetson_tells(jetson: Path) -> None:
    events = {"over-current, oc1": 0, "over-current, oc3": 7, "heat, gpu": 2}
    assert state() == GpuState(clock_mhz=1020.0, temperature_c=55.5, throttles=(), events=events)
    write(jetson, {"class/thermal/cooling_device1/cur_state": "1", "class/thermal/thermal_zone1/temp": "n/a"})
    write(jetson, {"class/thermal/thermal_zone8/type": "tj-thermal", "class/thermal/thermal_zone8/temp": "91000"})
    assert (state().throttles, state().temperature_c) == (("heat, gpu",), 91.0)


@pytest.mark.parametrize(
    ("changed", "reasons"),
    [
        ({}, ()),
        ({"class/hwmon/hwmon3/oc3_event_cnt": "8"}, ("over-current, oc3",)),
        ({"devices/platform/gpu-throttle-alert/thermal_trip_event": "3"}, ("heat, gpu",)),
        ({"class/thermal/cooling_device1/cur_state": "1"}, ("heat, gpu",)),
        ({"class/hwmon/hwmon4/oc1_event_cnt": "n/a"}, ()),
    ],
)
def test_what_lowered_clocks_between_two_states(
    changed: dict[str, str], reasons: tuple[str, ...], jetson: Path
) -> None:
    """Counters show it even where it was over before the stage ended."""
    before = state()
    write(jetson, changed)
    assert Conditions(before=before, after=state()).throttled == reasons


def test_the_clock_of_thor_is_not_that_of_its_video_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_state, "SYS", tmp_path)
    for node, low, now, high in (("gpu-gpc-0", 315, 900, 1575), ("gpu-nvd-0", 1692, 1692, 1692)):
        clocks = {"min": low, "cur": now, "max": high}
        write(tmp_path, {f"class/devfreq/{node}/{kind}_freq": f"{mhz}000000" for kind, mhz in clocks.items()})
    assert state().clock_mhz == 900 and power.locked() is False
    write(tmp_path, {"class/devfreq/gpu-gpc-0/min_freq": "1575000000"})
    assert power.locked() is True


@pytest.mark.parametrize("node", ["17000000.gpu", "17000000.ga10b"])
def test_locked_clocks_are_seen_without_root(node: str, jetson: Path) -> None:
    (jetson / "class/devfreq/17000000.gpu").rename(jetson / "class/devfreq" / node)
    assert power.locked() is False and state().clock_mhz == 1020
    write(jetson, {f"class/devfreq/{node}/min_freq": "1020000000"})
    assert power.locked() is True


COUNTED = ("350000", "1999", "0", "[N/A]")  # us: power cap, heat (software, hardware), power brake


@pytest.mark.parametrize(
    ("said", "reasons"),
    [("0x0000000000000001", ()), ("0x0000000000000044", ("power cap", "heat, hardware")), ("[N/A]", ())],
)
@pytest.mark.parametrize("counts", [True, False])
def test_a_card_tells(
    said: str, reasons: tuple[str, ...], counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older driver refuses a query with fields that it does not know; then nobody knows what happened before."""
    monkeypatch.setattr(gpu_state, "SYS", tmp_path)
    code = (
        "import sys; asked = 'clocks_event_reasons_counters' in sys.argv[3]\n"
        f"if asked and not {counts}: print('Field is not a valid field to query.'); sys.exit(2)\n"
        f"print('1980, 63, {said}', *({COUNTED} if asked else ()), sep=', ')"
    )
    monkeypatch.setattr(devices, "NVIDIA_SMI", shlex.join([sys.executable, "-c", code]))
    events = {"power cap": 350, "heat, software": 1, "heat, hardware": 0} if counts else {}
    assert state() == GpuState(clock_mhz=1980.0, temperature_c=63.0, throttles=reasons, events=events)


def test_nothing_tells_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_state, "SYS", tmp_path)
    monkeypatch.setattr(devices, "NVIDIA_SMI", str(tmp_path / "nvidia-smi"))
    assert gpu_state.gpu_state() is None

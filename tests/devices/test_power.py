"""Power mode, clocks and temperature through the boards' own commands, played by scripts on PATH."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.devices import load_device, power
from edgeprune.errors import DeviceError

NANO, CUDA = load_device("orin-nano"), load_device("cuda")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """commands(name=script, ...) makes these the only commands; all calls go to the file it returns."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")

    def make(**scripts: str) -> Path:
        for name, script in scripts.items():
            path = folder / name.replace("_smi", "-smi")
            path.write_text(f'#!/bin/sh\necho "{path.name} $*" >> {calls}\n{script}\n')
            path.chmod(0o755)
        return calls

    return make


def test_power_mode_of_a_jetson(commands: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    commands(nvpmodel='echo "NV Power Mode: 15W"; echo 0')
    for state, shown in ((None, "15W"), (False, "15W"), (True, "15W, clocks locked")):
        monkeypatch.setattr(power, "locked", lambda state=state: state)
        assert power.power_mode(NANO) == shown


def test_where_nothing_answers(commands: Callable[..., Path]) -> None:
    commands(nvpmodel="exit 1", jetson_clocks="exit 1", nvidia_smi="exit 9")
    assert power.power_mode(NANO) is None and power.power_mode(CUDA) is None and power.locked() is None


def test_power_limit_of_a_card(commands: Callable[..., Path]) -> None:
    commands(nvidia_smi='echo "350.00 W"')
    assert power.power_mode(CUDA) == "power limit 350.00 W"


@pytest.mark.parametrize(("user", "program"), [(0, "jetson_clocks "), (1000, "sudo -n jetson_clocks")])
def test_clocks_are_locked_and_come_back_even_after_an_interrupt(
    user: int, program: str, commands: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    calls = commands(**{program.split()[0]: "exit 0"})
    with pytest.raises(KeyboardInterrupt), power.locked_clocks(NANO):
        assert calls.read_text().splitlines()[-1] == program
        raise KeyboardInterrupt
    store, lock, restore = calls.read_text().splitlines()
    assert store.startswith(f"{program.strip()} --store ") and lock == program
    assert restore == store.replace("--store", "--restore")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_clocks_come_back_after_a_signal_that_ends_the_process(
    number: signal.Signals, commands: Callable[..., Path]
) -> None:
    """A CI job that is cancelled, a terminal that is closed."""
    signal.signal(number, signal.SIG_DFL)
    calls = commands(nvidia_smi='echo "1980"')
    with pytest.raises(KeyboardInterrupt), power.locked_clocks(CUDA):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert calls.read_text().splitlines()[-1] == "nvidia-smi -i 0 --reset-gpu-clocks"
    assert signal.getsignal(number) is signal.SIG_DFL


def test_clocks_of_a_card_are_locked_and_come_back(commands: Callable[..., Path]) -> None:
    calls = commands(nvidia_smi='echo "1980"')
    with power.locked_clocks(CUDA):
        assert calls.read_text().splitlines()[-1] == "nvidia-smi -i 0 --lock-gpu-clocks=1980"
    assert calls.read_text().splitlines()[-1] == "nvidia-smi -i 0 --reset-gpu-clocks"


@pytest.mark.parametrize("said", ["exit 1", "echo '[N/A]'"])
def test_without_the_right_to_lock_it_says_so(said: str, commands: Callable[..., Path]) -> None:
    commands(jetson_clocks="exit 1", sudo="exit 1", nvidia_smi=said)
    for device, reason in ((NANO, r"run as root .*NOPASSWD: /usr/bin/jetson_clocks"), (CUDA, "cannot be locked")):
        with pytest.raises(DeviceError, match=reason), power.locked_clocks(device):
            raise AssertionError("not locked")


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("# R36 (release), REVISION: 4.0, GCID: 1", "6"),
        ("# R35 (release), REVISION: 1.0", "5"),
        ("# R39 (release), REVISION: 2.0", "7"),
        ("# R99 ", "of L4T 99"),
    ],
)
def test_jetpack(line: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "NV_RELEASE", tmp_path / "release")
    assert power.jetpack() is None
    (tmp_path / "release").write_text(line)
    assert power.jetpack() == version


def test_temperature_is_the_hottest_zone_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "THERMAL", tmp_path)
    assert power.temperature_c() is None
    for index, text in enumerate(("45000", "71500", "", "n/a")):
        zone = tmp_path / f"thermal_zone{index}"
        zone.mkdir()
        (zone / "temp").write_text(text)
    assert power.temperature_c() == 71.5

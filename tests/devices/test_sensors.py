"""Memory of a process and power of a board, from a sysfs tree of the test."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sysfs import AGX, NANO, sensors

from edgeprune.devices import sensors as resources


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="/proc/self/clear_refs is Linux's")
def test_peak_memory_is_what_the_block_adds() -> None:
    """64 MiB that are touched and freed count, those held before do not, those freed before do not hide any."""
    held = np.ones(32 << 20, np.uint8)
    for _ in range(2):
        with resources.PeakMemory() as memory:
            del_me = np.ones(64 << 20, np.uint8)
            del del_me
        assert memory.bytes is not None and 63 << 20 <= memory.bytes < 80 << 20  # counted in batches of pages
    assert held.all()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc_trim is glibc's")
def test_memory_that_was_freed_before_hides_nothing() -> None:
    """Blocks below the size that malloc maps, held in the heap by one above them: free, but still resident."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )

    def touched() -> list[int]:
        blocks = [libc.malloc(64 << 10) for _ in range(512)]
        for block in blocks:
            ctypes.memset(block, 1, 64 << 10)
        return blocks

    first, above = touched(), libc.malloc(64 << 10)
    for block in first:
        libc.free(block)
    with resources.PeakMemory() as memory:
        second = touched()
    for block in (*second, above):
        libc.free(block)
    assert memory.bytes is not None and memory.bytes > 24 << 20


def test_peak_memory_is_unknown_where_proc_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    with resources.PeakMemory() as memory:
        pass
    assert memory.bytes is None


@pytest.mark.parametrize(
    ("chips", "watts"), [(NANO, 7.0), (AGX, 15.0), ([{"VDD_X": ("5000", "100")}], None), ([], None)]
)
def test_power_of_a_board(chips: Any, watts: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "INA3221", tmp_path / "ina3221")
    monkeypatch.setattr(resources, "INA238", tmp_path / "ina238")
    sensors(tmp_path / "ina3221", chips)
    assert resources.total_w(resources.rails_w()) == (None if watts is None else pytest.approx(watts))
    with resources.Meter() as meter:
        time.sleep(2 * resources.PERIOD_S)
    assert meter.energy_j == (None if watts is None else pytest.approx(watts * meter.seconds))


@pytest.mark.parametrize("label", [None, "VIN"])
def test_power_of_thor_is_what_its_ina238_measures(
    label: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rails of its INA3221 are fed from the input that the INA238 sees, and do not add to it."""
    monkeypatch.setattr(resources, "INA3221", tmp_path / "ina3221")
    monkeypatch.setattr(resources, "INA238", tmp_path / "ina238")
    sensors(tmp_path / "ina3221", [{"VDD_GPU": ("900", "20000"), "VIN_SYS_5V0": ("5000", "600")}])
    assert resources.total_w(resources.rails_w()) is None
    chip = tmp_path / "ina238" / "2-0044" / "hwmon" / "hwmon4"
    chip.mkdir(parents=True)
    (chip / "power1_input").write_text("54321000\n")
    if label:
        (chip / "label").write_text(f"{label}\n")
    assert resources.total_w(resources.rails_w()) == pytest.approx(54.321)

"""A staircase from the work folder: what is said about it each time that it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.records import SETUP

from edgeprune.devices import load_device
from edgeprune.latency import profiling
from edgeprune.records import Conditions, GpuState, Staircase
from edgeprune.runtimes.steps import WorkFolder
from edgeprune.runtimes.target import Target


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]


def test_lowered_clocks_are_named_until_the_file_is_deleted(
    make_staircase: Callable[..., Staircase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The step is reused by the same command, which measures again only without its file."""
    hot = GpuState(clock_mhz=1020.0, temperature_c=60.0, throttles=("heat",))
    found = make_staircase({n: float(n) for n in (50, 60, 70)}, conditions=(Conditions(before=hot, after=hot),))
    runtime: Any = SimpleNamespace(suffix=".onnx", free_bytes=lambda: None)
    target = Target(load_device("cpu"), runtime, SETUP, WorkFolder(tmp_path))
    measured = []
    monkeypatch.setattr(profiling, "probe", lambda *_, **__: measured.append(1) or (found, {}))
    for delete in (False, True, False):
        caplog.clear()
        profiling.measured_staircase(target, found.vit, (), lambda: tmp_path)
        [file] = tmp_path.glob("staircase-*.json")
        [said] = warnings(caplog)
        assert said.endswith(f"mode, delete {file} and run the same command again")
        if delete:
            file.unlink()
    assert len(measured) == 2
    caplog.clear()
    monkeypatch.setattr(profiling, "unconfirmed", lambda *_: (60,))
    profiling.measured_staircase(target, found.vit, (), lambda: tmp_path, base=found, tokens=(60,))
    assert not [each for each in caplog.records if each.levelname == "WARNING"], (
        "what is hot is in the file of the base"
    )

"""Fixtures of the benches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.toy import toy_bundle

from edgeprune.benchmark.bench import bench_bundles
from edgeprune.benchmark.result import Bench
from edgeprune.cli.rows import bench_row
from edgeprune.devices import sensors as resources


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One thread, bundles by name below the current folder, and no sensors unless a test makes some."""
    monkeypatch.setenv("EDGEPRUNE_THREADS", "1")
    monkeypatch.setattr(resources, "INA3221", tmp_path / "no-sensors")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One bench of the toy bundles a and b, named so."""
    folder = tmp_path_factory.mktemp("stored")
    before = os.getcwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EDGEPRUNE_THREADS", "1")
            return bench_bundles([toy_bundle(Path("a")), toy_bundle(Path("b"))], 20)
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def stored(measured: Bench) -> dict[str, Any]:
    """The same as JSON."""
    return bench_row(measured)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the ends of an interval to be near their place, where many intervals are wanted."""
    monkeypatch.setattr("edgeprune.stats.RESAMPLES", 500)

"""`edgeprune bench`: what it measures of a bundle."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from support.sysfs import NANO, sensors
from support.toy import FLOPS, toy_bundle

from edgeprune.benchmark import bench
from edgeprune.benchmark.bench import bench_bundles
from edgeprune.benchmark.peak import CHAIN
from edgeprune.benchmark.result import Bench
from edgeprune.bundles.open import LocalBundle, open_bundle
from edgeprune.cli.rows import bench_row
from edgeprune.cli.summary import bench_markdown
from edgeprune.devices import load_device
from edgeprune.devices import sensors as resources
from edgeprune.errors import DeviceError, InputError
from edgeprune.runtimes import runtime_for


def test_figures_of_a_bundle_follow_from_its_samples(stored: dict[str, Any]) -> None:
    [probe] = stored["probes"]
    assert len(stored["rows"]) == 2 and len(probe["samples_ms"]) == 20
    for row in stored["rows"]:
        samples, ms = row["samples_ms"], row["latency_ms"]
        assert len(samples) == 20
        assert ms["median"] == np.median(samples)
        assert (ms["p90"], ms["p99"]) == (np.percentile(samples, 90), np.percentile(samples, 99))
        assert row["images_per_s"] == pytest.approx(2 * 1e3 / ms["median"])
        assert row["gflop"] == FLOPS / 1e9
        assert row["gflop_per_s"] == pytest.approx(FLOPS / (ms["median"] * 1e-3) / 1e9)
        assert row["peak_gflop_per_s"] == probe["peak_gflop_per_s"]
        assert row["peak_share"] == pytest.approx(row["gflop_per_s"] / row["peak_gflop_per_s"])
        assert row["energy_per_image_mj"] is None
        assert row["setup"]["runtime_version"] == onnxruntime.__version__, "of here, not of where it was built"
    assert probe["peak_gflop_per_s"] >= 2 * CHAIN * probe["size"] ** 3 / np.median(probe["samples_ms"]) / 1e6 * (
        1 - 1e-9
    )
    first, second = stored["rows"]
    assert first["speedup_to_first"] == 1 and first["speedup_interval"] == [1, 1]
    wanted = np.median(np.array(first["samples_ms"]) / np.array(second["samples_ms"]))
    assert second["speedup_to_first"] == wanted
    low, high = second["speedup_interval"]
    assert low <= wanted <= high


def test_no_rounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use 1 or more"):
        bench_bundles([toy_bundle(tmp_path / "a")], 0)


def test_what_cannot_be_counted_is_null(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [row] = bench_bundles([toy_bundle(tmp_path / "a", "Einsum")], 5).rows
    assert row.gflop is row.gflop_per_s is row.peak_share is None and row.latency.median_ms > 0
    assert "Einsum" in caplog.text


def test_int8_has_no_measured_peak_but_shows_drift(tmp_path: Path) -> None:
    result = bench_bundles([toy_bundle(tmp_path / "a", precision="int8")], 5)
    [row], [peak] = result.rows, result.peaks
    assert row.peak_gflop_per_s is row.peak_share is None and (row.gflop_per_s or 0) > 0
    assert peak.setup.precision == "fp32"


def test_engine_of_another_version_or_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiled engine fits one; a board's name and power mode change its latency alone. ONNX is its own engine."""
    bench_bundles([toy_bundle(tmp_path / "onnx")], 5)
    real = runtime_for(load_device("cpu"))
    here = real.setup(load_device("cpu"), "fp32", 2)
    bound: dict[str, Any] = {"runtime": "trt", "runtime_version": "8.6", "compute_capability": "8.7"}
    for field, wanted in (bound | {"sm_count": 16, "gpu": "Orin"}).items():
        setup = msgspec.structs.asdict(here) | {field: wanted}
        bundle = toy_bundle(tmp_path / field, engine="model.engine", **setup)
        with pytest.raises(DeviceError, match=f"built for {field} {wanted!r}, here it is"):
            open_bundle(bundle)
    caplog.clear()
    for field, wanted in (("machine", "another carrier board"), ("power_mode", "15W")):
        setup = msgspec.structs.asdict(here) | {field: wanted}
        open_bundle(toy_bundle(tmp_path / field, engine="model.engine", **setup))
        assert f"built with {field} '{wanted}', here it is" in caplog.text


class Copied:
    """A session on a device: 1 ms there, 3 ms with both copies."""

    def time_ms(self) -> float:
        return 1.0

    def end_to_end_ms(self) -> float:
        return 3.0

    def __enter__(self) -> Copied:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_end_to_end_has_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime times on a CPU has no copies to leave out; a baseline without them is refused."""
    bundle, stored = toy_bundle(tmp_path / "a"), tmp_path / "base.json"
    assert bench_bundles([bundle], 5, end_to_end=True).end_to_end
    monkeypatch.setattr(LocalBundle, "open_engine", lambda self: Copied())
    for end_to_end, ms in ((False, 1.0), (True, 3.0)):
        found = bench_bundles([bundle], 5, end_to_end=end_to_end)
        assert set(found.rows[0].latency.samples_ms) == {ms}
        stored.write_text(json.dumps(bench_row(found)))
        assert bench_bundles([bundle], 5, baseline=stored, end_to_end=end_to_end).end_to_end is end_to_end
        with pytest.raises(InputError, match=r"measured with(out)? --end-to-end: do the same"):
            bench_bundles([bundle], 5, baseline=stored, end_to_end=not end_to_end)
        assert ("with the copies" in bench_markdown(found, None)) is end_to_end
    simulated = toy_bundle(tmp_path / "s", device="orin-nano", runtime="simulated", precision="fp16")
    with pytest.raises(InputError, match="leave out --end-to-end"):
        bench_bundles([simulated], 5, end_to_end=True)


def test_simulated_and_measured_do_not_mix(tmp_path: Path) -> None:
    simulated = toy_bundle(tmp_path / "s", device="orin-nano", runtime="simulated", precision="fp16")
    with pytest.raises(InputError, match="simulated"):
        bench_bundles([toy_bundle(tmp_path / "a"), simulated], 5)
    [row] = bench_bundles([simulated], 5).rows
    assert row.setup.simulated and len(row.latency.samples_ms) == 1
    assert 0 < (row.peak_share or 0) < 1 and row.peak_memory_mib is row.energy_per_image_mj is None


def test_clocks_are_locked_while_the_setup_is_read_and_bundles_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power mode in the setup says whether clocks are locked, so locking comes first; per device, once."""
    events: list[str] = []

    @contextmanager
    def locked(device: Any) -> Iterator[None]:
        events.append(f"lock {device.name}")
        yield
        events.append("unlock")

    real_open, real_interleave = bench.open_bundle, bench.interleave
    monkeypatch.setattr(bench, "locked_clocks", locked)
    monkeypatch.setattr(bench, "open_bundle", lambda *a: events.append("setup") or real_open(*a))
    monkeypatch.setattr(bench, "interleave", lambda *a, **k: events.append("measure") or real_interleave(*a, **k))
    bundles = [toy_bundle(tmp_path / name) for name in "ab"]
    bench_bundles(bundles, 5, lock_clocks=True)
    assert events == ["lock cpu", "setup", "setup", "measure", "unlock"]
    events.clear()
    bench_bundles(bundles[:1], 5)
    assert events == ["setup", "measure"]


def test_energy_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven watts for at least 2 ms each two images: at least 7 mJ an image, and what the rate says."""
    monkeypatch.setattr(resources, "INA3221", tmp_path / "ina3221")
    monkeypatch.setattr(bench, "ENERGY_S", 0.1)
    sensors(tmp_path / "ina3221", NANO)
    calls = []

    class Slow:
        def time_ms(self) -> float:
            time.sleep(2 * 2e-3)  # an untimed inference and a timed one
            calls.append(1)
            return 2.0

    found = bench._energy_mj(Slow(), batch=2)  # type: ignore[arg-type]
    assert found is not None and found >= 7 * 2e-3 / 2 * 1e3 * 0.99
    [row] = bench_bundles([toy_bundle(tmp_path / "a")], 5).rows
    assert (row.energy_per_image_mj or 0) > 0


def test_markdown_shows_names_as_they_are(measured: Bench) -> None:
    odd = msgspec.structs.replace(measured.rows[0], bundle="a|b\n<img src=x> [l](u) `c` **d**")
    page = bench_markdown(Bench(rows=(odd,), peaks=()), None)
    [line] = [text for text in page.splitlines() if "img" in text]
    assert r"a\|b \<img src=x\> \[l\](u) \`c\` \*\*d\*\*" in line
    assert "mJ/image" not in page and "to baseline" not in page, "columns of which nothing is known"

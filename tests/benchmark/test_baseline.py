"""`edgeprune bench --baseline`: when two benches are comparable, their ratio, and when a bench must fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support.builds import call
from support.toy import scaled, toy_bundle

from edgeprune.benchmark import bench
from edgeprune.benchmark.baseline import Baseline, check_comparable, drift, failure
from edgeprune.benchmark.bench import bench_bundles
from edgeprune.benchmark.peak import largest_useful
from edgeprune.benchmark.result import Bench, BenchRow, Peak, Ratio
from edgeprune.cli.rows import bench_row
from edgeprune.cli.summary import escaped
from edgeprune.errors import InputError, RecordError
from edgeprune.io import load
from edgeprune.records import Setup
from edgeprune.stats import bootstrap_ratio


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("paired", [True, False])
def test_bootstrap_interval_covers_the_truth(paired: bool) -> None:
    """Of 150 intervals some 95 % hold the true ratio; drift that lasts hits rounds that are paired alike."""
    rng, inside, widths = np.random.default_rng(0), 0, []
    for _ in range(150):
        drift_ = np.exp(0.3 * np.repeat(rng.standard_normal(6), 10)) if paired else 1.0
        above, below = (np.exp(0.1 * rng.standard_normal(60)) * drift_ for _ in range(2))
        _, (low, high) = bootstrap_ratio(list(1.2 * above), list(below), paired)
        inside += low <= 1.2 <= high
        widths.append(high - low)
    assert 0.88 <= inside / 150 <= 0.99
    assert np.median(widths) < 0.15


def test_blocks_widen_the_interval_where_load_lasts() -> None:
    """Five neighbours that share their load are not five measurements; shuffled, the same values are."""
    widths = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        lasting = np.exp(0.2 * np.repeat(rng.standard_normal(60), 5))
        series = (lasting, rng.permutation(lasting))
        widths.append([np.diff(bootstrap_ratio(list(x), [1.0], paired=False)[1])[0] for x in series])
    lasts, shuffled = np.mean(widths, axis=0)
    assert lasts > 1.5 * shuffled


def test_bootstrap_needs_equally_many_rounds_only_where_paired() -> None:
    with pytest.raises(ValueError, match="3 and 2 rounds"):
        bootstrap_ratio([1, 2, 3], [1, 2], paired=True)
    assert bootstrap_ratio([4.0], [2.0, 2.0], paired=False) == (2, (2, 2))


@pytest.fixture
def verdict(measured: Bench) -> Callable[..., str | None]:
    """Why a bundle fails whose samples are `now` against a baseline of `then`."""

    def found(now: np.ndarray, then: np.ndarray, percent: float = 5) -> str | None:
        ratio = Ratio(*bootstrap_ratio(list(now), list(then), paired=False))
        row: BenchRow = msgspec.structs.replace(measured.rows[0], to_baseline=ratio)
        return failure(Bench(rows=(row,), peaks=()), percent)

    return found


@pytest.mark.usefixtures("few_resamples")
def test_the_same_never_fails_and_a_fifth_slower_always_does(verdict: Callable[..., str | None]) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        then, again = (np.exp(0.05 * rng.standard_normal(60)) for _ in range(2))
        assert verdict(then, then) is None
        assert verdict(again, then) is None
        assert verdict(0.8 * again, then) is None
        reason = verdict(1.2 * again, then)
        assert reason is not None and "5 %" in reason and "\n" not in reason
        assert verdict(1.2 * again, then, 40) is None


def test_noise_as_large_as_the_change_does_not_fail(verdict: Callable[..., str | None]) -> None:
    rng = np.random.default_rng(1)
    now, then = 1.1 * np.exp(0.5 * rng.standard_normal(20)), np.exp(0.5 * rng.standard_normal(20))
    assert np.median(now) / np.median(then) > 1.05, "the medians alone would fail"
    assert verdict(now, then) is None


def named(result: dict[str, Any]) -> list[tuple[str, str, Setup]]:
    return [(row["bundle"], row["model"], Setup(**row["setup"])) for row in result["rows"]]


@pytest.mark.parametrize("field", [f for f in Setup.__struct_fields__])
def test_baseline_of_another_setup_is_refused_by_field(field: str, stored: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text(json.dumps(stored))
    assert len(check_comparable(path, named(stored)).rows) == 2
    other = json.loads(json.dumps(stored))
    value: Any = {"batch": 3, "threads": 3, "sm_count": 3, "workspace_mib": 3, "noiseless": True}.get(field, "other")
    other["rows"][1]["setup"][field] = value
    path.write_text(json.dumps(other))
    with pytest.raises(InputError) as error:
        check_comparable(path, named(stored))
    here = stored["rows"][1]["setup"][field]
    assert f"b was measured with {field} {value!r}, here it is {here!r}" in str(error.value)


@pytest.mark.parametrize("then", [True, False, None])
@pytest.mark.parametrize("now", [True, False])
def test_baseline_with_and_bench_without_a_cuda_graph_are_not_compared(
    then: bool | None, now: bool, stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions did not say which; nothing is timed in rounds before the refusal."""
    toy_bundle(Path("a"))
    old = json.loads(json.dumps(stored))
    old["rows"][0]["cuda_graph"] = then
    Path("base.json").write_text(json.dumps(old))
    monkeypatch.setattr(bench, "cuda_graph_of", lambda _: now)
    if then in (None, now):
        assert bench_bundles([Path("a")], 5, baseline=Path("base.json")).rows[0].to_baseline is not None
        return
    monkeypatch.setattr(bench, "interleave", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(InputError, match=f"a was measured with cuda_graph {then}, here it is {now}: bench under"):
        bench_bundles([Path("a")], 5, baseline=Path("base.json"))


def test_baseline_of_another_model_or_bundle_is_refused(stored: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text(json.dumps(stored))
    [(_, model, setup), _] = named(stored)
    with pytest.raises(InputError, match=r"no bundle c \(it has: a, b\)"):
        check_comparable(path, [("c", model, setup)])
    with pytest.raises(InputError, match="model 'toy', here it is 'other'"):
        check_comparable(path, [("a", "other", setup)])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda b: b.update(schema=9), "schema 9"),
        (lambda b: b.pop("rows"), "rows"),
        (lambda b: b["rows"][0].update(samples_ms=[]), "samples_ms"),
        (lambda b: b["rows"][0].update(samples_ms=[1.0, 0.0]), "samples_ms"),
        (lambda b: b["rows"][0]["setup"].update(batch="two"), "batch"),
        (lambda b: b["probes"][0].update(size=10**7), "size"),
    ],
    ids=["schema", "no rows", "no samples", "no time", "batch", "size"],
)
def test_file_that_is_no_baseline(
    change: Callable[[Any], Any], complaint: str, stored: dict[str, Any], tmp_path: Path
) -> None:
    broken = json.loads(json.dumps(stored))
    change(broken)
    (tmp_path / "base.json").write_text(json.dumps(broken))
    with pytest.raises(RecordError, match=complaint):
        load(tmp_path / "base.json", Baseline)


@pytest.mark.parametrize("runtime", ["ort-cpu", "simulated"])
def test_baseline_of_an_earlier_version_is_read(runtime: str, stored: dict[str, Any], tmp_path: Path) -> None:
    """Without noiseless in setups, CUDA graphs and matrix products, with an unknown key."""
    old = {"schema": 1, "rows": json.loads(json.dumps(stored["rows"])), "removed": 1}
    for row in old["rows"]:
        row["setup"]["runtime"] = runtime
        del row["setup"]["noiseless"], row["cuda_graph"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    names = [(row["bundle"], row["model"], Setup(**row["setup"])) for row in old["rows"]]
    found = check_comparable(tmp_path / "old.json", names)
    assert found.peaks == () and [row.setup.noiseless for row in found.rows] == [runtime == "simulated"] * 2


def test_drift_of_the_machine_is_reported(measured: Bench) -> None:
    [uncompared] = measured.peaks

    def peak(ratio: float, low: float, high: float) -> Peak:
        changed: Peak = msgspec.structs.replace(uncompared, to_baseline=Ratio(ratio, (low, high)))
        return changed

    assert drift([uncompared]) is None and drift([peak(1.01, 1.005, 1.02)]) is None
    assert drift([peak(1.3, 0.9, 1.6)]) is None, "noise is no drift"
    assert "7 % slower" in (drift([peak(1.07, 1.05, 1.09)]) or "")
    assert "20 % faster" in (drift([peak(1.0, 1.0, 1.0), peak(0.8, 0.7, 0.9)]) or "")


def test_exit_3_after_table_json_and_summary(
    stored: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_bundle(Path("a")), toy_bundle(Path("b"))
    fast = scaled(stored, 1e-3, 1e-3)
    Path("fast.json").write_text(json.dumps(fast))
    options = ("--rounds", "20", "--baseline", "fast.json", "--summary", "s.md", "--out", "out.json")
    code, out, err = call(capsys, "bench", "a", "b", *options, "--fail-slower", "5", "--json")
    assert code == 3
    [line] = out.splitlines()
    result = json.loads(line)
    assert "measured interleaved" in err
    reason = err.splitlines()[-1]
    assert reason == f"failed: {result['failed']}" and "a takes" in reason and "b takes" in reason
    assert "the machine itself is" in err
    assert json.loads(Path("out.json").read_text()) == result
    page = Path("s.md").read_text()
    table = [text for text in page.splitlines() if text.startswith("|")]
    assert len(table) == 4 and len({text.count("|") for text in table}) == 1
    assert f"**{escaped(result['failed'])}**" in page and "Warning: the machine itself" in page
    for row in result["rows"]:
        assert row["baseline_interval"][0] <= row["baseline_ratio"] <= row["baseline_interval"][1]


@pytest.mark.parametrize("size", [512, 1024])
def test_matrix_product_is_as_large_as_the_baselines(
    size: int, stored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of different sizes could not be compared."""
    stored = scaled(stored, 1)
    stored["probes"][0]["size"] = size
    Path("base.json").write_text(json.dumps(stored))
    asked = []

    def search(*given: Any) -> Any:
        asked.append(given[-1])
        return largest_useful(*given[:-1], 256)

    monkeypatch.setattr(bench, "largest_useful", search)
    result = bench_bundles([toy_bundle(Path("a"))], 5, baseline=Path("base.json"))
    assert asked == [size]
    [peak] = bench_row(result)["probes"]
    assert "baseline_ratio" not in peak, "it was run at 256"


def test_no_failure_where_it_is_as_fast(
    stored: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A saved --json line is a baseline, too; without --fail-slower nothing fails."""
    toy_bundle(Path("a")), toy_bundle(Path("b"))
    Path("slow.json").write_text(json.dumps(scaled(stored, 1e3)))
    common = ("bench", "a", "--rounds", "5", "--json")
    code, out, err = call(capsys, *common, "--baseline", "slow.json", "--fail-slower", "5")
    assert code == 0 and json.loads(out)["failed"] is None, err
    Path("saved.json").write_text(json.dumps(scaled(json.loads(out), 1e-3)))
    code, out, _ = call(capsys, *common, "--baseline", "saved.json")
    assert code == 0 and json.loads(out)["rows"][0]["baseline_ratio"] > 5


def test_another_setup_exits_1_before_anything_is_measured(
    stored: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_bundle(Path("a"))
    Path("base.json").write_text(json.dumps(stored))
    monkeypatch.setenv("EDGEPRUNE_THREADS", "2")
    monkeypatch.setattr(bench, "interleave", lambda *_, **__: pytest.fail("measured"))
    code, out, err = call(capsys, "bench", "a", "--baseline", "base.json", "--fail-slower", "5")
    assert code == 1 and not out
    assert err.splitlines() == [
        "error: base.json: a was measured with threads 1, here it is 2: bench under the same setup, "
        "or store a new baseline with --out"
    ]


@pytest.mark.parametrize("argv", [("--fail-slower", "5"), ("--baseline", "b", "--fail-slower", "nan"),
                                  ("--baseline", "b", "--fail-slower", "-1")])  # fmt: skip
def test_bad_usage(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "bench", "a", *argv)[0] == 2

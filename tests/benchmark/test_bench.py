"""`edgeprune bench`: what it measures of a bundle, what a baseline allows, and when it must fail."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.builds import call

from edgeprune.benchmark import bench
from edgeprune.benchmark.baseline import Baseline, check_comparable, drift, failure
from edgeprune.benchmark.bench import bench_bundles
from edgeprune.benchmark.peak import CHAIN, gemm_onnx, largest_useful
from edgeprune.benchmark.result import Bench, BenchRow, Peak, Ratio
from edgeprune.bundles.format import write_bundle
from edgeprune.cli.rows import bench_row
from edgeprune.cli.summary import bench_markdown, escaped
from edgeprune.devices import load_device
from edgeprune.devices import sensors as resources
from edgeprune.errors import DeviceError, InputError, RecordError
from edgeprune.io import load
from edgeprune.latency.timing import WARMUP, WINDOW, warm_up
from edgeprune.onnx_graph.matmuls import flops_of_onnx
from edgeprune.records import Engine, Latency, Preprocessing, Report, Schedule, Setup, Vit
from edgeprune.runtimes import runtime_for
from edgeprune.stats import bootstrap_ratio

SHAPE, CLASSES = (2, 3, 4, 4), 7  # images of the toy, batch first
FLOPS = 2 * 2 * 48 * CLASSES  # two for each multiply-add of (2, 48) · (48, 7)


def toy_onnx(path: Path, operator: str = "MatMul") -> Path:
    """(2, 3, 4, 4) images to (2, 7): one matrix product and one product elementwise, which does not count."""
    weights = {"w": np.ones((48, CLASSES), np.float32), "s": np.array([2, 48]), "half": np.float32(0.5)}
    nodes = [
        helper.make_node("Mul", ["images", "half"], ["x"]),
        helper.make_node("Reshape", ["x", "s"], ["flat"]),
        helper.make_node(
            operator, ["flat", "w"], ["y"], **({"equation": "ij,jk->ik"} if operator == "Einsum" else {})
        ),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("images", SHAPE), ("y", (2, CLASSES)))
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "toy", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def toy_bundle(out: Path, operator: str = "MatMul", **setup: Any) -> Path:
    """A bundle of the toy for this CPU, unless `setup` says otherwise."""
    file = toy_onnx(out.with_suffix(".onnx"), operator)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    fields = {
        "device": "cpu",
        "machine": "another",
        "runtime": "ort-cpu",
        "runtime_version": "0",
        "precision": "fp32",
    }
    vit = Vit(
        name="toy", weights_sha256="0" * 64, family="vit", image_px=4, patch_px=2, depth=2, width=8, heads=2,
        head_dim=4, mlp_width=16, prefix=1, tokens=5, classes=CLASSES, prefix_pooled=True,
    )  # fmt: skip
    how = Preprocessing(
        image_px=4, resize_px=4, interpolation="bicubic", crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    name = setup.pop("engine", "model.onnx")
    engine = Engine(
        path=name, sha256=digest, onnx_sha256=digest, size_bytes=1, setup=Setup(**{**fields, "batch": 2} | setup)
    )
    latency = Latency(samples_ms=(1.0,))
    write_bundle(
        out, vit=vit, files={name: file, "model.onnx": file}, engine=engine,
        schedule=Schedule(vit=vit, method="topk", policy="search", tokens=(5, 3)), staircase=None,
        report=Report(latency=latency, dense_latency=latency, speedup=1.0, speedup_interval=(1.0, 1.0)),
        preprocessing=how, labels=tuple("abcdefg"),
        golden=(np.zeros(SHAPE, np.float32), np.zeros((2, CLASSES), np.float32)),
    )  # fmt: skip
    return out


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One thread, bundles by name below the current folder, and no sensors unless a test makes some."""
    monkeypatch.setenv("EDGEPRUNE_THREADS", "1")
    monkeypatch.setattr(resources, "INA3221", tmp_path / "no-sensors")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def stored(measured: Bench) -> dict[str, Any]:
    """The same as JSON."""
    return bench_row(measured)


def scaled(result: dict[str, Any], factor: float, machine: float = 1.0) -> dict[str, Any]:
    """A bench in which bundles took `factor` times as long, and the matrix products `machine` times."""
    changed: dict[str, Any] = json.loads(json.dumps(result))
    for row in changed["rows"]:
        row["samples_ms"] = [ms * factor for ms in row["samples_ms"]]
    for probe in changed["probes"]:
        probe["samples_ms"] = [ms * machine for ms in probe["samples_ms"]]
    return changed


# --- what is measured ---


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


def test_what_cannot_be_counted_is_null(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [row] = bench_bundles([toy_bundle(tmp_path / "a", "Einsum")], 5).rows
    assert row.gflop is row.gflop_per_s is row.peak_share is None and row.latency.median_ms > 0
    assert "Einsum" in caplog.text


def test_int8_has_no_measured_peak_but_shows_drift(tmp_path: Path) -> None:
    result = bench_bundles([toy_bundle(tmp_path / "a", precision="int8")], 5)
    [row], [peak] = result.rows, result.peaks
    assert row.peak_gflop_per_s is row.peak_share is None and (row.gflop_per_s or 0) > 0
    assert peak.setup.precision == "fp32"


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


# --- the matrix product ---


@pytest.mark.parametrize("fp16", [False, True])
def test_matrix_product_computes_what_it_says(fp16: bool, tmp_path: Path) -> None:
    model = gemm_onnx(64, fp16)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "g.onnx")
    assert flops_of_onnx(tmp_path / "g.onnx") == CHAIN * 2 * 64**3
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {TensorProto.FLOAT16 if fp16 else TensorProto.FLOAT}
    x = np.random.default_rng(1).standard_normal((64, 64), dtype=np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [y] = session.run(None, {session.get_inputs()[0].name: x})
    wanted = x.astype(np.float64)
    for _ in range(CHAIN):
        wanted = wanted @ numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64)
    np.testing.assert_allclose(y, wanted, atol=0.02 * wanted.std() if fp16 else 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_measured_peak_of_a_simulated_board_is_nearly_its_data_sheet(precision: str, tmp_path: Path) -> None:
    device = load_device("orin-nano")
    runtime = runtime_for(device, simulate=True)
    found = largest_useful(runtime, runtime.setup(device, precision, 1), tmp_path)
    assert device.simulation is not None and device.sm_count is not None
    model = device.simulation
    sheet = 2 * model.fma_per_clock_per_sm[precision] * model.clock_mhz * device.sm_count / 1e3
    assert 0.9 < 1e3 * found.gflop / found.searched_ms / sheet <= 1


def test_size_of_the_matrix_product_doubles_while_that_gains(tmp_path: Path) -> None:
    """A machine that loses half a millisecond below 1024, and reaches the same rate from there on."""
    opened: list[int] = []

    class Session:
        def __init__(self, path: Path) -> None:
            self.size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value
            opened.append(self.size)

        def time_ms(self) -> float:
            return 1e-9 * self.size**3 + (0.5 if self.size < 1024 else 0)

        def __enter__(self) -> Session:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    class Runtime:
        suffix = ".onnx"

        def compile(self, source: Path, setup: Setup, out: Path) -> None:
            out.write_bytes(source.read_bytes())

        def open(self, path: Path, setup: Setup) -> Session:
            return Session(path)

    setup = Setup(device="d", machine="m", runtime="r", runtime_version="1", precision="fp32", batch=1)
    assert largest_useful(Runtime(), setup, tmp_path).size == 1024  # type: ignore[arg-type]
    assert opened == [256, 512, 1024, 2048]
    opened.clear()
    assert largest_useful(Runtime(), setup, tmp_path, 512).size == 512 and opened == [512]  # type: ignore[arg-type]


# --- warm-up ---


class Cooling:
    """Latencies that fall to 1 ms."""

    def __init__(self, decay: float) -> None:
        self.calls, self.decay = 0, decay

    def time_ms(self) -> float:
        self.calls += 1
        return 1 + math.exp(-self.calls / self.decay) if self.decay else float(self.calls)


def test_warm_up_lasts_until_latencies_are_stable() -> None:
    fast, slow = Cooling(5), Cooling(50)
    assert warm_up(fast, 1000) and warm_up(slow, 1000)  # type: ignore[arg-type]
    assert 2 * WINDOW <= fast.calls < slow.calls < 1000


def test_warm_up_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    never = Cooling(0)
    assert not warm_up(never, 100)  # type: ignore[arg-type]
    assert never.calls == 100
    monkeypatch.setattr("edgeprune.latency.timing.WARMUP_S", 0.0)
    never.calls = 0
    assert not warm_up(never, 100)  # type: ignore[arg-type]
    assert never.calls == WARMUP


# --- intervals ---


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the ends of an interval to be near their place, where many intervals are wanted."""
    monkeypatch.setattr("edgeprune.stats.RESAMPLES", 500)


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


# --- baselines ---


def named(result: dict[str, Any]) -> list[tuple[str, str, Setup]]:
    return [(row["bundle"], row["model"], Setup(**row["setup"])) for row in result["rows"]]


@pytest.mark.parametrize("field", [f for f in Setup.__struct_fields__])
def test_baseline_of_another_setup_is_refused_by_field(field: str, stored: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text(json.dumps(stored))
    assert len(check_comparable(path, named(stored)).rows) == 2
    other = json.loads(json.dumps(stored))
    value: Any = {"batch": 3, "threads": 3, "noiseless": True}.get(field, "other")
    other["rows"][1]["setup"][field] = value
    path.write_text(json.dumps(other))
    with pytest.raises(InputError) as error:
        check_comparable(path, named(stored))
    here = stored["rows"][1]["setup"][field]
    assert f"b was measured with {field} {value!r}, here it is {here!r}" in str(error.value)


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


# --- bundles that are not of here ---


def test_engine_of_another_version_or_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled engine fits one; ONNX, which is its own engine, fits all (see the fixture's machine and version)."""
    bench_bundles([toy_bundle(tmp_path / "onnx")], 5)
    real = runtime_for(load_device("cpu"))
    here = real.setup(load_device("cpu"), "fp32", 2)
    for field, wanted in (("runtime", "trt"), ("runtime_version", "8.6"), ("machine", "another")):
        setup = msgspec.structs.asdict(here) | {field: wanted}
        bundle = toy_bundle(tmp_path / field, engine="model.engine", **setup)
        with pytest.raises(DeviceError, match=f"built for {field} '{wanted}', here it is"):
            bench_bundles([bundle], 5)


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


# --- energy ---


def sensors(root: Path, chips: list[dict[str, tuple[str, str]]]) -> None:
    """A sysfs tree with INA3221s: label to (mV, mA); "" is a file that cannot be read as a number."""
    for index, rails in enumerate(chips):
        folder = root / f"1-004{index}" / "hwmon" / f"hwmon{index}"
        folder.mkdir(parents=True)
        for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
            (folder / f"in{channel}_label").write_text(f"{label}\n")
            (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
            (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")
        (folder / "in7_label").write_text("sum of shunt voltages\n")  # has no current


NANO = [{"VDD_IN": ("5000", "1400"), "VDD_CPU_GPU_CV": ("5000", "400"), "VDD_SOC": ("5000", "300")}]
AGX = [
    {"VDD_GPU_SOC": ("20000", "500"), "VDD_CPU_CV": ("20000", "100"), "VIN_SYS_5V0": ("5000", "600")},
    {"NC": ("", ""), "VDDQ_VDD2_1V8AO": ("5000", "200")},
]


@pytest.mark.parametrize(
    ("chips", "watts"), [(NANO, 7.0), (AGX, 15.0), ([{"VDD_X": ("5000", "100")}], None), ([], None)]
)
def test_power_of_a_board(chips: Any, watts: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "INA3221", tmp_path / "ina3221")
    sensors(tmp_path / "ina3221", chips)
    assert resources.total_w(resources.rails_w()) == (None if watts is None else pytest.approx(watts))
    with resources.Meter() as meter:
        time.sleep(2 * resources.PERIOD_S)
    assert meter.energy_j == (None if watts is None else pytest.approx(watts * meter.seconds))


def test_energy_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven watts for at least 2 ms each two images: at least 7 mJ an image, and what the rate says."""
    monkeypatch.setattr(resources, "INA3221", tmp_path / "ina3221")
    monkeypatch.setattr(bench, "ENERGY_S", 0.1)
    sensors(tmp_path / "ina3221", NANO)
    calls = []

    class Slow:
        def time_ms(self) -> float:
            time.sleep(2e-3)
            calls.append(1)
            return 2.0

    found = bench._energy_mj(Slow(), batch=2)  # type: ignore[arg-type]
    assert found is not None and found >= 7 * 2e-3 / 2 * 1e3 * 0.99
    [row] = bench_bundles([toy_bundle(tmp_path / "a")], 5).rows
    assert (row.energy_per_image_mj or 0) > 0


# --- Markdown ---


def test_markdown_shows_names_as_they_are(measured: Bench) -> None:
    odd = msgspec.structs.replace(measured.rows[0], bundle="a|b\n<img src=x> [l](u) `c` **d**")
    page = bench_markdown(Bench(rows=(odd,), peaks=()), None)
    [line] = [text for text in page.splitlines() if "img" in text]
    assert r"a\|b \<img src=x\> \[l\](u) \`c\` \*\*d\*\*" in line
    assert "mJ/image" not in page and "to baseline" not in page, "columns of which nothing is known"

"""Everything of benchmarks/gpu_run.py that needs no GPU: on ONNX Runtime, and on a fake TensorRT."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import gpu_run
import numpy as np
import onnx
import pytest
from gpu_steps import checks, depth, green_context, latencies
from gpu_steps.kit import FP16_SCALES, STORE, chosen, onnx_in, overlap, read_json
from gpu_steps.report import NOT_RUN, markdown
from gpu_steps.run import ATTEMPTS, EngineSpec, OutOfTime, Run, Skipped, builds_at_once, carried_out
from support.fake_trt import Fake
from support.loopback import SSHD
from support.paths import ROOT

from edgeprune.errors import DeviceError, EngineError

METHODS = ("fold",)


@pytest.fixture(scope="module")
def kit(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with one method at batch 1 for parity, and one of four blocks for latency."""
    import msgspec
    from gpu_steps.prepare import prepare_latency, prepare_parity

    folder, model = tmp_path_factory.mktemp("kit"), tiny("cls", depth=4)
    prepare_parity(folder, tiny("cls"), methods=METHODS, batches=(1,), count=4)
    prepare_latency(
        folder,
        replace(model, vit=msgspec.structs.replace(model.vit, name="random")),
        methods=METHODS,
        batches=(1,),
        percents=(50,),
    )
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


def called(capsys: pytest.CaptureFixture[str], number: int, kit: Path, out: Path, *options: str) -> Any:
    """The content of the file of a step; its summary on stdout must be one object and agree with it."""
    quick = ("--device", "cpu", "--samples", "3", "--rounds", "5", "--stairs", "10", "--jobs", "1")
    code = gpu_run.main(["--step", str(number), "--kit", str(kit), "--out", str(out), *quick, *options])
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0, shown
    found = read_json(Path(shown["file"]))
    assert (shown["step"], shown["left"], shown["failed"]) == (number, found["left"], found["failed"])
    assert found["complete"] and not found["failed"], found
    return found


def test_ranges_are_those_of_the_first_batch(
    kit: Path, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration takes most of the time of --prepare; the exporter numbers nodes and values by batch."""
    import msgspec
    from gpu_steps import prepare

    from edgeprune.io import load, save
    from edgeprune.onnx_graph.graph import linear_layers
    from edgeprune.records import Int8Ranges

    for name in (STORE, "fold-whole-b1.onnx"):
        shutil.copy(kit / "cls" / name, tmp_path)
    model = onnx.load(kit / "cls/fold-whole-b1.onnx", load_external_data=False)
    known = load(kit / "cls/fold-whole-b1.int8.json", Int8Ranges)
    entering, names = zip(*((node.input[0], node.name) for node in linear_layers(model)), strict=True)
    save(msgspec.structs.replace(known, kept=names[1:2]), tmp_path / "fold-whole-b1.int8.json")
    for node in model.graph.node:
        node.name += "_4"
        node.input[:] = [f"{name}_4" if name in known.ranges else name for name in node.input]
        node.output[:] = [f"{name}_4" if name in known.ranges else name for name in node.output]
    onnx.save(model, tmp_path / "fold-whole-b4.onnx")
    monkeypatch.delattr(prepare, "calibrated")
    prepare._ranges(tmp_path, "fold-whole-b4", "fold-whole-b1", tiny("cls"), np.zeros((1, 16, 16, 3), np.uint8))
    found = load(tmp_path / "fold-whole-b4.int8.json", Int8Ranges)
    assert found.kept == (f"{names[1]}_4",)
    assert found.ranges == {f"{name}_4": known.ranges[name] for name in entering}


def test_parity(kit: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fp32 equals PyTorch's logits with and without prefix_last; lower precisions differ a little, but not more."""
    found = called(capsys, 2, kit, out)
    parts = found["parts"]
    rows = {f"{row['name']} {key.split()[1]}": row for key, part in parts.items() for row in part.get("rows", ())}
    assert len(rows) == 4 * 3 and {"cls fp8 b1", "cls fp8 ranking"} == {*found["skipped"]}
    for name, row in rows.items():
        assert row["finite"] and row["median_difference"] < (1e-5 if "fp32" in name else 0.5), (name, row)
        assert (row["median_difference"] > 1e-5) == ("fp32" not in name)
    assert parts["cls fp32 ranking"]["overlap"] == {"fold": 1.0}


def test_staircase_and_simulation(kit: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [part] = called(capsys, 5, kit, out, "--jobs", "2")["parts"].values()
    assert len(part["samples_ms"]) >= 3 and all(len(ms) == 10 for ms in part["samples_ms"].values())
    [found] = called(capsys, 6, kit, out)["parts"].values()
    assert found["counts"] == len(part["samples_ms"]) and found["measured_over_simulated"] > 0


def test_methods(kit: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = called(capsys, 7, kit, out)["parts"]
    assert {(row["method"], row["percent"]) for row in parts["random b1 methods"]["rows"]} == {("fold", 50)}
    assert {row["method"] for row in parts["random b1 cuts"]["rows"]} == {"fold"}
    found = parts["random b1 precisions"]
    rows = {(row["graph"], row["precision"]): row["over_fp16"] for row in found["precisions"]}
    assert {*rows} == {(g, p) for g in ("dense-b1", "fold-r50-b1") for p in ("fp16", "int8", FP16_SCALES)}
    assert rows["dense-b1", "fp16"] == 1 and "fp8" in found["lacking"] and not found["errors"]
    assert (kit / "random" / STORE).stat().st_size == read_json(kit / "random/weights.json")["bytes"]


def test_two_blocks(kit: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One linear function of the latency of two blocks predicts all counts, more of them than a build checks."""
    [part] = called(capsys, 9, kit, out)["parts"].values()
    pair, predicted = ([row[key] for row in part["rows"]] for key in ("pair_ms", "predicted_ms"))
    assert len(pair) == depth.PLACES and np.ptp(predicted - np.polyval(np.polyfit(pair, predicted, 1), pair)) < 1e-6
    assert part["check_off"] >= 0 and part["build_s"] == {"trunk": None, "pair": None}  # nothing to compile


def test_int8_in_two_forms(kit: Path, tmp_path: Path) -> None:
    """With fp16 scales no cast stands between DQ and a product; outputs are the same up to rounding."""
    import onnxruntime

    found = {}
    for kind in ("int8-fp16", FP16_SCALES):
        path = onnx_in(kit / "cls", "fold-whole-b1", kind, tmp_path)
        model = onnx.load(path)
        taken = {name: node.op_type for node in model.graph.node for name in node.input}
        users = [taken[node.output[0]] for node in model.graph.node if node.op_type == "DequantizeLinear"]
        assert {*users} == {"Cast" if kind == "int8-fp16" else "MatMul"} and len(users) > 10
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found[kind] = session.run(None, {"images": checks.pictures_of(kit / "cls")[0][:1]})[0]
    np.testing.assert_allclose(found["int8-fp16"], found[FP16_SCALES], atol=0.05)


def test_commands(kit: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = called(capsys, 8, kit, out)
    assert found["parts"]["cls verify"]["ok"]
    if SSHD:
        first, second = (run["rows"][0] if "rows" in run else run for run in found["parts"]["cls ship"])
        assert "switched" in str(first) and "current" in str(second)
    else:
        assert "sshd" in found["skipped"]["cls ship"]


def test_what_needs_a_gpu_is_named(kit: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tests" in called(capsys, 1, kit, out)["skipped"]
    for number in (3, 4):
        found = called(capsys, number, kit, out)
        assert not found["parts"] and all("needs TensorRT" in why for why in found["skipped"].values())


def test_on_a_fake_tensorrt(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention and ways of timing; it has no CUDA graph and no profiler."""
    fake = Fake("8.6.0").install(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    parts = called(capsys, 3, kit, tmp_path, "--device", "cuda")["parts"]
    assert parts["cls none fp16 inspector"]["attention"] == ["_gemm_mha_v2"]
    assert parts["cls none fp16 inspector"]["expected"] == 3
    fake.calls.clear()
    [part] = called(capsys, 4, kit, tmp_path, "--device", "cuda")["parts"].values()
    ways = {f"plain {start} {clock}" for start in ("idle", "queued") for clock in ("event", "wall")}
    assert ways | {"time_ms()", "end_to_end_ms()"} == {*part["ms"]}
    joined = ",".join(fake.calls)
    assert "wait,wait,event,launch,event,wait" in joined, "idle: the stream is empty when the event is recorded"
    assert "launch,event,launch,event,wait" in joined, "queued: it is not"


def test_a_jetson_compiles_one_engine_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake().install(monkeypatch)
    target = Run(tmp_path, tmp_path, tmp_path).target("fp32", 1)
    for gib, jobs in ((64, 8), (9, 2), (1, 1)):  # each takes a workspace of 2 GiB and as much again
        fake.free_bytes = gib << 30
        assert builds_at_once(target, 8) == jobs
    fake.free_bytes, fake.integrated = 64 << 30, True
    assert builds_at_once(target, 8) == 1


def test_seconds_to_build_profit_from_no_earlier_build(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake().install(monkeypatch)
    run, spec = Run(kit, tmp_path, tmp_path / "work"), EngineSpec(kit / "random", "dense-b1", "fp32", 1)
    for _ in range(2):
        assert depth.seconds_to_build(run, spec) is not None
    assert [config.cache.data for config in fake.configs] == [b"", b""]


def test_timings_taken_side_by_side_are_thrown_away(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes are played by this one, which has the fake TensorRT."""
    fake = Fake().install(monkeypatch)
    fake.free_bytes = 64 << 30
    run, spec = Run(kit, tmp_path, tmp_path / "work"), EngineSpec(kit / "random", "dense-b1", "fp32", 1)
    monkeypatch.setattr("gpu_steps.run.ProcessPoolExecutor", lambda *_: contextlib.nullcontext(builtins))
    assert run.build([spec]) == {} and fake.configs
    assert [*run.work.glob("*.engine")] and not [*run.work.glob("timing-*")]


def test_a_builder_that_is_killed_is_an_error_of_its_part(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def map(*_: Any) -> Any:
            raise BrokenProcessPool

    monkeypatch.setattr("gpu_steps.run.ProcessPoolExecutor", lambda *_: contextlib.nullcontext(Broken))
    found = carried_out(run, 1, "x", {"a": lambda: run.build([])})
    assert "memory ran out" in found["failed"]["a"] and "--jobs 1" in found["failed"]["a"]


# --- tests/gpu itself ---


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
def test_gpu_tests_on_a_stand_in(version: str, kit: Path, tmp_path: Path) -> None:
    """What a GPU machine runs first, as it runs it there, and one engine of every precision."""
    environment = os.environ | {
        "EDGEPRUNE_GPU_KIT": str(kit), "EDGEPRUNE_GPU_WORK": str(tmp_path), "EDGEPRUNE_GPU_STAND_IN": version,
    }  # fmt: skip
    tests = ROOT / "tests/gpu"
    names = "an_engine_runs or every_name or (test_engine and fold and whole and 1)"
    command = [sys.executable, "-m", "pytest", "-c", str(tests / "pytest.ini"), str(tests), "-k", names]
    report = tmp_path / "report.xml"
    done = subprocess.run([*command, "--junitxml", str(report)], env=environment, capture_output=True, text=True)
    ends = checks.outcomes(report)
    assert done.returncode == 0, done.stdout
    passed = {name for name, end in ends.items() if end == "passed"}
    engines = {f"test_engine[fold-whole-1-{precision}]" for precision in ("fp32", "fp16", "int8")}
    assert passed >= engines | {"test_an_engine_runs"}
    assert "a stand-in has no CUDA" in ends["test_every_name_exists_here"]
    assert (f"TensorRT {version} has no FP8" in ends["test_engine[fold-whole-1-fp8]"]) is version.startswith("8.")


@pytest.mark.parametrize("installed", ["pycuda", "cuda_python", ""])
def test_gpu_tests_take_either_driver(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_from_file_location("gpu_tests", ROOT / "tests/gpu/test_gpu.py")
    assert spec is not None and spec.loader is not None
    tests = module_from_spec(spec)
    spec.loader.exec_module(tests)
    fake = Fake("10.3.0").install(monkeypatch)
    monkeypatch.setitem(
        sys.modules, "edgeprune.runtimes.cuda_python", fake.driver if installed == "cuda_python" else None
    )
    if installed != "pycuda":
        monkeypatch.setitem(sys.modules, "pycuda", None)
        monkeypatch.delitem(sys.modules, "pycuda.driver")
    if installed:
        tests.need_gpu()
    else:
        with pytest.raises(pytest.skip.Exception, match="pycuda is missing"):
            tests.need_gpu()


# --- what a call that ended early leaves ---


class Part:
    """A part that counts its calls and ends as told."""

    def __init__(self, *ends: BaseException | None) -> None:
        self.ends, self.calls = list(ends), 0

    def __call__(self) -> Any:
        self.calls += 1
        if self.ends and (end := self.ends.pop(0)) is not None:
            raise end
        return {"calls": self.calls}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, tmp_path / "out", tmp_path / "work", "cpu")


def test_finished_parts_are_not_done_again(run: Run) -> None:
    late, good, bad = Part(OutOfTime()), Part(), Part(EngineError("no\nluck: try again"))
    parts = {"good": good, "bad": bad, "late": late, "no": Part(Skipped("needs more"))}
    first = carried_out(run, 1, "x", parts)
    assert (first["left"], first["failed"], first["skipped"]) == (
        ["late"],
        {"bad": "no luck: try again"},
        {"no": "needs more"},
    )
    assert not first["complete"]
    second = carried_out(run, 1, "x", parts)
    assert second["complete"] and set(second["parts"]) == {*parts} and not second["failed"] and not second["skipped"]
    assert (good.calls, bad.calls, late.calls) == (1, 2, 2)


def test_a_part_that_kills_the_process_is_given_up(run: Run) -> None:
    """The time limit of a call kills it without a word; the parts after it still run in the end."""
    for _ in range(ATTEMPTS):
        with pytest.raises(KeyboardInterrupt):
            carried_out(run, 1, "x", {"deadly": Part(KeyboardInterrupt()), "after": Part()})
    found = carried_out(run, 1, "x", {"deadly": Part(KeyboardInterrupt()), "after": Part()})
    assert found["complete"] and "attempts" in found["failed"]["deadly"] and "after" in found["parts"]


def test_a_part_that_lacks_engines_is_kept_and_made_again(run: Run) -> None:
    lacking, whole = {"errors": {"a-b1": "out of memory"}, "rows": [1]}, {"errors": {}, "rows": [1, 2]}
    results = [lacking, whole]
    first = carried_out(run, 1, "x", {"a": lambda: results.pop(0)})
    assert first["parts"]["a"] == lacking and first["failed"] == {"a": "1 engines could not be built: out of memory"}
    second = carried_out(run, 1, "x", {"a": lambda: results.pop(0)})
    assert second["parts"]["a"] == whole and not second["failed"]
    rows = {"rows": [{"name": "a", "error": "no"}, {"name": "b"}]}
    assert carried_out(run, 2, "x", {"a": lambda: rows})["failed"] == {"a": "1 engines could not be built: no"}


def test_any_error_is_that_of_its_part_alone(run: Run) -> None:
    """A format that NVIDIA's tools changed, for example."""
    good = Part()
    found = carried_out(run, 1, "x", {"bad": Part(ValueError("no\nnumber")), "good": good})
    assert found["failed"] == {"bad": "ValueError: no number"} and good.calls == 1 and found["complete"]


def test_a_lost_context_ends_the_process_and_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that follows would fail, too; the part that lost it is given up after two processes."""
    monkeypatch.setattr("gpu_steps.run.context_is_lost", lambda run: True)
    for _ in range(ATTEMPTS):
        bad, good = Part(EngineError("illegal address")), Part()
        with pytest.raises(
            EngineError, match="bad: illegal address; the GPU's context is lost: call this step again"
        ):
            carried_out(run, 1, "x", {"bad": bad, "good": good})
        assert (bad.calls, good.calls) == (1, 0)
    found = carried_out(run, 1, "x", {"bad": bad, "good": good})
    assert good.calls == 1 and "2 attempts" in found["failed"]["bad"]


def test_an_attempt_that_made_engines_does_not_count(run: Run) -> None:
    run.work.mkdir(exist_ok=True)
    for number in range(ATTEMPTS + 2):
        with pytest.raises(KeyboardInterrupt):
            carried_out(run, 1, "x", {"slow": Part(KeyboardInterrupt())})
        (run.work / f"{number}.engine").write_bytes(b"")
    assert carried_out(run, 1, "x", {"slow": Part()})["parts"] == {"slow": {"calls": 1}}


def test_only_some_parts(run: Run) -> None:
    found = carried_out(replace(run, only="a*"), 1, "x", {"a1": Part(), "b1": Part()})
    assert {*found["parts"]} == {"a1"} and found["left"] == ["b1"]


def test_what_is_timed_is_compiled_alone_and_with_kept_timings(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While other builds use the GPU, TensorRT does not find the fastest tactics."""
    fake = Fake().install(monkeypatch)
    fake.free_bytes = 64 << 30
    monkeypatch.delattr("gpu_steps.run.ProcessPoolExecutor")
    run, spec = Run(kit, tmp_path, tmp_path / "work"), EngineSpec(kit / "random", "dense-b1", "fp32", 1)
    assert run.build([spec], timed=True) == {} and [*run.work.glob("timing-*")]


def test_a_limit_of_sms_that_other_processes_do_not_have_is_refused(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--kit", str(kit), "--out", str(tmp_path), "--device", "cpu", "--sm-limit", "8")
    assert gpu_run.main(["--step", "8", *options]) == 1
    assert "step 8 starts other processes" in capsys.readouterr().out


def test_no_part_begins_after_the_time(run: Run, tmp_path: Path) -> None:
    part = Part()
    found = carried_out(Run(tmp_path, run.out, run.work, "cpu", until=0), 1, "x", {"a": part})
    assert found["left"] == ["a"] and not found["complete"] and part.calls == 0


# --- figures ---


def test_edges_are_matched_within_two_tokens() -> None:
    assert latencies.near_share([64, 128], [66, 131]) == 0.5
    assert latencies.near_share([], [1]) is None
    assert latencies.rank_correlation([1, 2, 3, 4], [10, 20, 20, 30]) == pytest.approx(0.9486833)
    assert latencies.rank_correlation([1, 2], [3, 3]) is None


def test_tokens_at_equal_latency() -> None:
    points = {100: 1.0, 70: 0.8, 50: 0.6}
    assert latencies.tokens_at(points, 0.7) == pytest.approx(60)
    assert latencies.tokens_at(points, 0.5) is None, "outside of what was measured"
    assert latencies.tokens_at({100: 1.0, 70: 1.1}, 1.05) is None, "a cut that makes it slower"


def test_overlap_counts_what_a_cut_chooses() -> None:
    wanted = np.array([[4, 2, 3, 1]])
    assert overlap(np.array([[2.0, 4.0, 1.0, 3.0]]), wanted, 2) == 1
    assert overlap(np.array([[2, 1, 4, 3]]), wanted, 2) == 0.5
    assert [chosen(m, 197, 150, 1) for m in ("fold", "topk", "evit", "pomt", "tome")] == [150, 149, 148, 148, 47]


def test_kernels_of_a_profile() -> None:
    """The CSV of Nsight Compute 2025.3, shortened to the columns that are read."""
    text = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    text += '"0","fmha_v2_flash","gpu__time_duration.sum","us","1,200.5"\n'
    text += '"1","gemm","gpu__time_duration.sum","ns","900"\n"2","gemm","gpu__time_duration.sum","ns","100"\n'
    assert checks.kernels_in(text) == [
        {"name": "fmha_v2_flash", "launches": 1, "total_us": 1200.5},
        {"name": "gemm", "launches": 2, "total_us": 1.0},
    ]
    assert checks.is_attention("fmha_v2_flash") and not checks.is_attention("gemm")


@pytest.mark.parametrize("driver", ["absent", "old"])
def test_a_driver_without_green_contexts(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Fake("8.6.0").install(monkeypatch)

    class Old:
        def __getattr__(self, name: str) -> Any:
            if name.startswith("cuDeviceGetDev"):
                raise AttributeError(f"undefined symbol: {name}")
            return lambda *_: 0

    def loaded(name: str) -> Any:
        if driver == "absent":
            raise OSError(f"{name}: cannot open shared object file")
        return Old()

    monkeypatch.setattr(green_context.ctypes, "CDLL", loaded)
    with pytest.raises(DeviceError, match=r"cannot limit a process to 8 SMs .*leave out --sm-limit"):
        green_context.limit(8)
    assert green_context.limit(None) is None


# --- the report; after the steps above have left their files ---


def test_report(kit: Path, out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number in (2, 5, 6, 7, 9):
        called(capsys, number, kit, out)
    assert gpu_run.main(["--report", str(out)]) == 0
    *page, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"report": str(out)}
    text = "\n".join(page)
    for number in (2, 5, 6, 7, 9):
        assert f"### Step {number}: {gpu_run.STEPS[number][0]}" in text
    assert "| fold-prefix-b1 |" in text and "Tokens in percent at" in text
    assert "| dense-b1 | int8-fp16-scales |" in text and "from two blocks, ms" in text
    assert markdown(tmp_path) == NOT_RUN

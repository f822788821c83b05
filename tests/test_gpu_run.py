"""Everything of benchmarks/gpu_run.py that needs no GPU: on ONNX Runtime, and on a fake TensorRT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_run
import numpy as np
import pytest
from gpu_steps import checks, green_context, latencies
from gpu_steps.kit import STORE, chosen, overlap, read_json
from gpu_steps.report import NOT_RUN, markdown
from gpu_steps.run import ATTEMPTS, OutOfTime, Run, Skipped, carried_out
from support.fake_trt import Fake
from support.loopback import SSHD

from edgeprune.errors import DeviceError, EngineError

METHODS = ("fold",)


@pytest.fixture(scope="module")
def kit(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with one method at batch 1, for parity and for latency."""
    from dataclasses import replace

    import msgspec
    from gpu_steps.prepare import prepare_latency, prepare_parity

    folder, model = tmp_path_factory.mktemp("kit"), tiny("cls")
    prepare_parity(folder, model, methods=METHODS, batches=(1,), count=4)
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


def test_parity(kit: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fp32 equals PyTorch's logits with and without prefix_last; lower precisions differ a little, but not more."""
    parts = called(capsys, 2, kit, out)["parts"]
    rows = {f"{row['name']} {key.split()[1]}": row for key, part in parts.items() for row in part.get("rows", ())}
    assert len(rows) == 4 * 3
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
    assert (kit / "random" / STORE).stat().st_size == read_json(kit / "random/weights.json")["bytes"]


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
    for number in (2, 5, 6, 7):
        called(capsys, number, kit, out)
    assert gpu_run.main(["--report", str(out)]) == 0
    *page, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"report": str(out)}
    text = "\n".join(page)
    for number in (2, 5, 6, 7):
        assert f"### Step {number}: {gpu_run.STEPS[number][0]}" in text
    assert "| fold-prefix-b1 |" in text and "Tokens in percent at" in text
    assert markdown(tmp_path) == NOT_RUN

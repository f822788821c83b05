"""`--precision auto`: which precision is kept, why the others are not, and a whole simulated build."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.builds import Shallow, few_digits, row_of

from edgeprune.errors import DeviceError, HostError, ScheduleError
from edgeprune.pipeline import auto
from edgeprune.records import Latency, PrecisionResult
from edgeprune.runtimes.target import PRECISIONS
from edgeprune.scheduling.goals import Goal


def result(precision: str, ms: float | None, kl: float = 0.0, accepted: bool = True) -> PrecisionResult:
    """What auto knows of one precision."""
    latency = None if ms is None else Latency(samples_ms=(ms, ms * 1.01, ms))
    return PrecisionResult(precision=precision, latency=latency, kl=kl, accepted=accepted)


def test_judged_against_the_next_wider_accepted_and_fp32() -> None:
    both = [result("fp32", 2), result("fp16", 1)]
    assert auto.wider_of("fp32", []) == ()
    assert auto.wider_of("fp16", both[:1]) == ("fp32",)
    assert auto.wider_of("int8", both) == ("fp16", "fp32")
    assert auto.wider_of("int8", [both[0], result("fp16", 3, accepted=False)]) == ("fp32",)
    assert auto.wider_of("fp8", [*both, result("int8", 0.9)]) == ("fp16", "fp32"), "INT8 is as narrow"


def test_fastest_accepted_is_kept() -> None:
    """INT8 is the fastest but lost too much; FP8 was never built."""
    found = [result("fp32", 2), result("fp16", 1), result("int8", 0.8, accepted=False), result("fp8", None, 0, False)]
    assert auto.best_of(found, Goal(), {}) == "fp16"
    assert auto.best_of([*found[:2], result("int8", 0.8)], Goal(speedup=1.5), {}) == "int8"
    assert auto.best_of([found[0], result("fp16", 3)], Goal(max_drop=1), {}) == "fp32", (
        "accepted, yet with a worse schedule"
    )
    reasons = [r.reason for r in auto.explained(found, "fp16", Goal())]
    assert reasons == ["fp16 is faster", None, None, None]


def test_budget_is_met_with_the_least_loss() -> None:
    """All are as fast as the budget says; what is faster by nature prunes less."""
    found = [result("fp32", 5.2, kl=0.0), result("fp16", 4.9, kl=0.3), result("int8", 4.99, kl=0.1)]
    losses = {"fp32": 0.0, "fp16": 0.3, "int8": 0.1}
    assert auto.best_of(found, Goal(budget_ms=5), losses) == "int8"
    assert auto.best_of(found, Goal(budget_ms=4), losses) == "fp16", "none keeps to it"
    assert auto.explained(found, "int8", Goal(budget_ms=5))[1].reason == "int8 is better for the budget"


def test_losses_are_compared_on_the_same_pictures() -> None:
    """INT8 leaves out the calibration pictures, here a hard one, so its own mean looks better than that of fp16."""

    def candidate(losses: dict[int, float]) -> Any:
        return SimpleNamespace(evaluated=SimpleNamespace(losses=losses))

    built = {"fp16": candidate({1: 0.1, 2: 0.2, 3: 0.9}), "int8": candidate({1: 0.2, 2: 0.3})}
    losses = auto.common_losses(built)
    assert losses == pytest.approx({"fp16": 0.15, "int8": 0.25})
    found = [result("fp16", 4.9, kl=0.4), result("int8", 4.8, kl=0.25)]
    assert auto.best_of(found, Goal(budget_ms=5), losses) == "fp16"


def test_what_keeps_a_precision_from_being_built_is_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing type or an impossible goal does; a lost connection, or fp32 without an engine, ends the build."""
    from edgeprune.pipeline.context import Options

    failing: dict[str, Exception] = {}

    def build_at(first: Any, precision: str, results: Any) -> Any:
        if precision in failing:
            raise failing[precision]
        raise ScheduleError(f"{precision} cannot be that fast: ask for less")

    monkeypatch.setattr(auto, "_build_at", build_at)
    options = Options(device="orin-nano", simulate=True, precision="auto", work=tmp_path / "work")
    failing["fp8"] = DeviceError("no FP8")
    with pytest.raises(ScheduleError, match="int8 cannot be that fast"):
        auto.build_fastest(options)
    for precision, error in (("fp32", DeviceError("no fp32")), ("fp16", HostError("connection lost"))):
        failing = {precision: error}
        with pytest.raises(type(error), match=str(error)):
            auto.build_fastest(options)


def test_simulated_build(
    shallow: Shallow, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device with FP8 every precision is built; the row is of the fastest, and says what the others were."""
    monkeypatch.chdir(tmp_path)
    images = few_digits(tmp_path / "digits", 8)
    row = row_of(
        capsys, "build", "--device", "h100", "--simulate", "--precision", "auto", "--method", "topk",
        "--policy", "paper", "--images", images, "--search-images", 4, "--neighbours", 0, "--model", shallow.model,
        "--block", 1, "--work", shallow.work(tmp_path / "work"),
    )  # fmt: skip
    tried = {entry["precision"]: entry for entry in row["precisions"]}
    assert tuple(tried) == PRECISIONS
    kept = tried[row["precision"]]
    assert kept["accepted"] and kept["reason"] is None
    assert kept["latency_ms"]["median"] == row["latency_ms"]["median"], "simulated, so every session is alike"
    assert kept["latency_ms"]["median"] == min(e["latency_ms"]["median"] for e in tried.values() if e["accepted"])
    for name, entry in tried.items():
        assert set(entry) == {
            "precision",
            "latency_ms",
            "top1",
            "agreement",
            "kl",
            "cosine",
            "error",
            "accepted",
            "reason",
        }
        assert name == row["precision"] or entry["reason"]
        assert entry["accepted"] or "slower" in entry["reason"]
    assert Path(row["bundle"]).name == f"topk-{row['precision']}-b1-simulated"
    assert [path.name for path in Path(row["bundle"]).parent.iterdir()] == [Path(row["bundle"]).name]

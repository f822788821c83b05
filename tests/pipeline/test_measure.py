"""Engines timed with the unpruned model, kept as a step, and what follows for the goal and the report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from support.computed import context_of
from support.records import NOISELESS, SETUP

from edgeprune.devices import load_device
from edgeprune.errors import EngineError
from edgeprune.latency.staircase import predict_ms
from edgeprune.latency.timing import WARMUP
from edgeprune.pipeline import evaluate as evaluating
from edgeprune.pipeline import measure
from edgeprune.pipeline.evaluate import evaluate
from edgeprune.pipeline.measure import (
    MISS,
    Measured,
    MeasuredSchedule,
    corrected_goal,
    measured_engines,
    measured_schedules,
    meets,
    report_of,
    warn_if_missed,
)
from edgeprune.records import DenseFidelity, EmbedFidelity, Latency, Report, Setup, Staircase, Vit
from edgeprune.runtimes.steps import WorkFolder
from edgeprune.runtimes.target import Target
from edgeprune.scheduling.goals import Goal, finished

ROUNDS = 4
MakeVit = Callable[..., Vit]
MakeStaircase = Callable[..., Staircase]


class Engines:
    """A runtime whose ONNX files hold the latency of their engine, ms; each timing is 1 % slower than the last."""

    suffix = ".onnx"

    def __init__(self) -> None:
        self.opened: list[str] = []

    def free_bytes(self) -> int | None:
        return None

    def open(self, path: Path, setup: Setup) -> Any:
        self.opened.append(path.name)
        times = (float(path.read_text()) * 1.01**n for n in range(1000))

        class Session(SimpleNamespace):
            def __enter__(self) -> Session:
                return self

            def __exit__(self, *error: object) -> None:
                pass

        return Session(time_ms=lambda: next(times))


def files_of(folder: Path, **latencies: float) -> list[Path]:
    """An ONNX file for each engine."""
    files = []
    for name, ms in latencies.items():
        (folder / f"{name}.onnx").write_text(str(ms))
        files.append(folder / f"{name}.onnx")
    return files


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def target(engines: Engines, tmp_path: Path) -> Target:
    runtime: Any = engines
    return Target(load_device("cpu"), runtime, SETUP, WorkFolder(tmp_path / "work"))


# --- engines ---


def test_with_the_unpruned_engine_there_is_a_speedup(target: Target, engines: Engines, tmp_path: Path) -> None:
    slow, fast, dense = files_of(tmp_path, slow=8.0, fast=2.5, dense=10.0)
    found = measured_engines(target, [slow, fast], dense, ROUNDS)
    assert sorted(engines.opened) == ["dense.onnx", "fast.onnx", "slow.onnx"]
    assert [round(m.speedup or 0, 6) for m in found] == [1.25, 4.0]
    for measured, ms in zip(found, (8.0, 2.5), strict=True):
        assert measured.latency.warmup == WARMUP and len(measured.latency.samples_ms) == ROUNDS
        before = np.log(measured.latency.samples_ms[0] / ms) / np.log(1.01)  # each timing takes 1 % longer
        assert before == pytest.approx(round(before)) and before >= WARMUP, "the warm-up comes first"
        assert measured.dense is not None and len(measured.dense.samples_ms) == ROUNDS
        assert measured.speedup_interval == pytest.approx((measured.speedup, measured.speedup)), "drift cancels"


def test_without_the_unpruned_engine_there_is_none(target: Target, engines: Engines, tmp_path: Path) -> None:
    (alone,) = files_of(tmp_path, alone=8.0)
    (found,) = measured_engines(target, [alone], None, ROUNDS)
    assert engines.opened == ["alone.onnx"] and len(found.latency.samples_ms) == ROUNDS
    assert (found.dense, found.speedup, found.speedup_interval) == (None, None, None)


def test_what_was_timed_is_reused(target: Target, engines: Engines, tmp_path: Path) -> None:
    """As long as the content of the files, the rounds and the setup are the same."""
    one, dense = files_of(tmp_path, one=8.0, dense=10.0)
    found = measured_engines(target, [one], dense, ROUNDS)
    engines.opened.clear()
    assert measured_engines(target, [one], dense, ROUNDS) == found
    (copy,) = files_of(tmp_path, copy=8.0)
    assert measured_engines(target, [copy], dense, ROUNDS) == found and engines.opened == []
    together = measured_engines(target, [one, dense], None, ROUNDS)
    assert [m.latency for m in together] == [found[0].latency, found[0].dense] and engines.opened == []
    assert together[0].speedup is None
    assert len(measured_engines(target, [one], dense, ROUNDS + 1)[0].latency.samples_ms) == ROUNDS + 1
    engines.opened.clear()
    measured_engines(target, [one], dense, ROUNDS, session="another")
    assert engines.opened == ["one.onnx", "dense.onnx"]
    files_of(tmp_path, one=4.0)
    (faster,) = measured_engines(target, [one], dense, ROUNDS)
    assert faster.speedup == pytest.approx(2.5)
    device = load_device("cpu")
    other = Target(device, target.runtime, msgspec.structs.replace(SETUP, machine="another"), target.work)
    engines.opened.clear()
    measured_engines(other, [one], dense, ROUNDS)
    assert engines.opened == ["one.onnx", "dense.onnx"]


def test_engines_that_do_not_fit_into_memory_take_turns(
    target: Target, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, dense = files_of(tmp_path, one=8.0, two=4.0, dense=10.0)
    monkeypatch.setattr(measure, "weights_of", lambda file: ())
    monkeypatch.setattr(engines, "free_bytes", lambda: int(2.5 * 1.5 * len("10.0") / 0.7))  # two of the largest fit
    measured_engines(target, [one, two], dense, ROUNDS)
    assert engines.opened.count("one.onnx") == 1 and engines.opened.count("dense.onnx") == 1 + ROUNDS


def test_weights_outside_the_graph_count(
    target: Target, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small graph with its weights in another file beside a larger one that holds its own, as in fp32 and INT8."""
    apart, whole = files_of(tmp_path, apart=8.0, whole=10.0)
    weights = tmp_path / "apart.weights"
    weights.write_bytes(bytes(97))
    monkeypatch.setattr(measure, "weights_of", lambda file: (weights,) if file == apart else ())
    monkeypatch.setattr(engines, "free_bytes", lambda: 1000)
    assert measure.room_for([(target, apart), (target, whole)]).guess == 1.5 * (97 + len("8.0"))


def test_without_noise_one_round_is_enough(target: Target, tmp_path: Path) -> None:
    one, dense = files_of(tmp_path, one=8.0, dense=10.0)
    noiseless = Target(target.device, target.runtime, NOISELESS, target.work)
    (found,) = measured_engines(noiseless, [one], dense, ROUNDS)
    assert len(found.latency.samples_ms) == 1 and found.speedup == pytest.approx(1.25)


def test_a_timing_that_failed_is_not_kept(
    target: Target, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, dense = files_of(tmp_path, one=8.0, dense=10.0)

    def broken(path: Path, setup: Setup) -> Any:
        raise EngineError(f"{path}: broken")

    with monkeypatch.context() as patch:
        patch.setattr(engines, "open", broken)
        with pytest.raises(EngineError, match="broken"):
            measured_engines(target, [one], dense, ROUNDS)
    assert measured_engines(target, [one], dense, ROUNDS)[0].speedup == pytest.approx(1.25)


# --- schedules ---


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the user is warned of."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_schedules_are_timed_together_and_predictions_follow_drift(
    make_vit: MakeVit, make_staircase: MakeStaircase, engines: Engines, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The unpruned model takes 10 % longer than when the staircase was measured: so will the pruned ones."""
    vit = make_vit()
    staircase = make_staircase({98: 5.0, 197: 9.0}, vit=vit)
    context = context_of(vit, tmp_path / "work", engines, rounds=3)
    folded = finished(staircase, "fold", "search", (98,) * 12)
    topk = finished(staircase, "topk", "search", (197,) * 6 + (98,) * 6)
    exported, off = [], [1.0]
    predicted = {s.method: predict_ms(staircase, s.tokens, s.method) for s in (folded, topk)}

    def pruned_onnx(own: Any, schedule: Any) -> Path:
        exported.append((own.method, schedule.method))
        return files_of(tmp_path, **{schedule.method: predicted[schedule.method] * 1.1 * off[-1]})[0]

    monkeypatch.setattr(measure, "pruned_onnx", pruned_onnx)
    monkeypatch.setattr(measure, "dense_onnx", lambda _: files_of(tmp_path, dense=11.0)[0])
    found = measured_schedules(context, staircase, [folded, topk])
    assert exported == [("fold", "fold"), ("topk", "topk")], "each by its own method"
    assert [m.schedule for m in found] == [folded, topk] and [m.fidelity for m in found] == [None, None]
    drift = found[0].measured.dense.median_ms / 10  # type: ignore[union-attr]
    assert drift > 1.1
    for measured in found:
        assert measured.predicted_ms == pytest.approx(predicted[measured.schedule.method] * drift)
        assert measured.measured.latency.median_ms == pytest.approx(measured.predicted_ms)
        assert measured.speedup == pytest.approx(10 / predicted[measured.schedule.method])
    assert not warnings(caplog), "drift is no error of the prediction"
    for factor, told in ((0.9, "10 % below"), (1.2, "20 % above")):
        off.append(factor)
        measured_schedules(context, staircase, [folded, topk])
        assert told in warnings(caplog)[-1]


def test_figures_are_not_those_that_selected_the_schedule(
    make_vit: MakeVit,
    make_staircase: MakeStaircase,
    engines: Engines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same engines with the same unpruned one, in as many rounds, are timed again; the second time is kept."""
    staircase = make_staircase({98: 5.0, 197: 9.0}, vit=make_vit())
    context = context_of(staircase.vit, tmp_path / "work", engines, rounds=3)
    schedule = finished(staircase, "fold", "search", (98,) * 12)
    pruned, dense = files_of(tmp_path, pruned=5.0, dense=10.0)
    for module in (measure, evaluating):
        monkeypatch.setattr(module, "pruned_onnx", lambda *_: pruned)
        monkeypatch.setattr(module, "dense_onnx", lambda _: dense)
    monkeypatch.setattr(evaluating.attention_fusion, "expected", lambda *_: None)
    measured_schedules(context, staircase, [schedule])
    for opened in (["pruned.onnx", "dense.onnx"], []):
        engines.opened.clear()
        assert evaluate(context, staircase, schedule).report.speedup == pytest.approx(2.0)
        assert engines.opened == opened


# --- reports ---


def measured_as(speedup: float, ms: float = 5.0, spread: float = 0.02) -> Measured:
    """An engine that takes `ms`, and the unpruned one that takes `speedup` times as long."""
    latency = Latency(samples_ms=((1 - spread) * ms, ms, ms, ms, (1 + spread) * ms))
    interval = ((1 - spread) * speedup, (1 + spread) * speedup)
    return Measured(latency, Latency(samples_ms=(ms * speedup,)), speedup, interval)


def test_report_of_an_engine_with_the_unpruned_one(make_staircase: MakeStaircase) -> None:
    staircase = make_staircase({98: 5.0, 197: 9.0})
    schedule = finished(staircase, "fold", "search", (98,) * 12)
    measured = measured_as(2.2, 5.0)
    report = report_of(measured, schedule, staircase)
    assert (report.latency, report.dense_latency) == (measured.latency, measured.dense)
    assert (report.speedup, report.speedup_interval) == (measured.speedup, measured.speedup_interval)
    assert report.probes == staircase.probes == 2
    assert schedule.predicted_ms is not None
    assert report.predicted_ms == pytest.approx(schedule.predicted_ms * 11 / 10), (
        "the unpruned one took 11 ms, not 10"
    )
    assert (report.kl, report.agreement, report.top1, report.images, report.held_out) == (None, None, None, 0, None)


def test_report_of_an_engine_alone(make_staircase: MakeStaircase) -> None:
    staircase = make_staircase({98: 5.0, 197: 9.0})
    schedule = finished(staircase, "fold", "search", (98,) * 12)
    alone = Measured(Latency(samples_ms=(5.0,)))
    report = report_of(alone, schedule, staircase)
    assert (report.dense_latency, report.speedup, report.speedup_interval) == (None, None, None)
    assert report.predicted_ms == schedule.predicted_ms
    unknown = report_of(alone, schedule, None)
    assert (unknown.predicted_ms, unknown.probes, unknown.latency) == (None, 0, alone.latency)


# --- goals ---


def found_as(speedup: float, predicted: float, ms: float = 5.0) -> MeasuredSchedule:
    """A schedule that was measured and predicted to be so many times as fast."""
    measured, schedule = measured_as(speedup, ms), SimpleNamespace()
    return MeasuredSchedule(schedule, ms * speedup / predicted, measured)  # type: ignore[arg-type]


def test_a_missed_goal_is_corrected_by_the_error_of_the_prediction() -> None:
    """Not by the distance from the goal: this schedule was predicted to exceed it."""
    corrected = corrected_goal(Goal(speedup=2.0), found_as(1.8, 2.1), 9.0)
    assert corrected is not None and corrected.speedup == pytest.approx(2.0 * 2.1 / 1.8)
    found = found_as(1.8, 2.1, 10 / 1.8)  # the unpruned model takes 10 ms now, and 8 in the staircase
    corrected = corrected_goal(Goal(budget_ms=5.0), found, 8.0)
    assert corrected is not None and corrected.budget_ms == pytest.approx(5.0 * (8 / 2.1) / (10 / 1.8))


def test_a_goal_exceeded_is_relaxed() -> None:
    corrected = corrected_goal(Goal(speedup=2.0), found_as(2.5, 2.0), 9.0)
    assert corrected is not None and corrected.speedup == pytest.approx(1.6)
    corrected = corrected_goal(Goal(budget_ms=5.0), found_as(2.5, 2.0, 4.0), 10.0)
    assert corrected is not None and corrected.budget_ms == pytest.approx(6.25)
    assert corrected_goal(Goal(speedup=1.0), found_as(5.0, 1.0), 9.0) == Goal(speedup=1.0), "never below 1"
    exact = corrected_goal(Goal(speedup=2.0), found_as(2.5, 2.5), 9.0)
    assert exact is not None and exact.speedup == pytest.approx(2.0), "the model knew that it would be exceeded"


def test_a_goal_that_is_met_is_not_corrected() -> None:
    found = found_as(1.8, 2.0)
    assert corrected_goal(Goal(speedup=1.8 * (1 + MISS / 2)), found, 9.0) is None
    assert corrected_goal(Goal(budget_ms=5.0), found, 9.0) is None
    for goal in (Goal(alpha=0.5), Goal(max_drop=1.0), Goal()):
        assert corrected_goal(goal, found, 9.0) is None, "it limits no latency"


@pytest.mark.parametrize(
    ("speedup", "high", "met"), [(1.5, 1.5, True), (1.49, 1.51, True), (1.49, 1.495, False), (1.46, 1.6, False)]
)
def test_a_goal_is_met_unless_measurement_or_margin_say_otherwise(
    speedup: float, high: float, met: bool, caplog: pytest.LogCaptureFixture, make_staircase: MakeStaircase
) -> None:
    low = Latency(samples_ms=(10 / high, *(10 / speedup for _ in range(3)), 10 / 1.4))
    found = Measured(low, Latency(samples_ms=(10.0,)), speedup, (1.4, high))
    staircase = make_staircase({98: 5.0, 197: 9.0})
    report = report_of(found, finished(staircase, "fold", "search", (98,) * 12), staircase)
    for goal in (Goal(speedup=1.5), Goal(budget_ms=10 / 1.5)):
        assert meets(goal, found) == meets(goal, report) == met
        schedule = MeasuredSchedule(report, 10 / speedup, found)  # type: ignore[arg-type]
        assert (corrected_goal(goal, schedule, 10.0) is None) == met
        caplog.clear()
        warn_if_missed(goal, report)
        assert len(warnings(caplog)) == (not met)
    assert meets(Goal(alpha=0.5), found)


@pytest.mark.parametrize(
    ("cosine", "held_out", "told"),
    [(0.96, True, None), (0.94, True, "held-out"), (0.94, False, "evaluation")],
)
def test_a_bound_on_the_cosine_is_checked_on_the_final_pictures(
    cosine: float, held_out: bool, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    report = Report(
        latency=Latency(samples_ms=(1.0,)), fidelity=EmbedFidelity(cosine=cosine), images=100, held_out=held_out
    )
    warn_if_missed(Goal(min_cosine=0.95), report)
    warn_if_missed(Goal(max_drop=1.0), report)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (told is not None)
    if told:
        assert f"not met on the 100 {told} pictures" in caplog.text
        assert "it is 0.9400" in caplog.text


@pytest.mark.parametrize(
    "figures",
    [{"top1": 57.0, "dense_top1": 58.5, "agreement": 90.0}, {"agreement": 98.5}, {"agreement": 98.5, "top1": 57.0}],
    ids=str,
)
def test_a_missed_drop_is_told(figures: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Of top-1 where both figures are known, else of agreement."""
    report = Report(latency=Latency(samples_ms=(1.0,)), images=100, held_out=True, **figures)
    warn_if_missed(Goal(max_drop=1.5), report)
    assert not caplog.records
    warn_if_missed(Goal(max_drop=1.4), report)
    assert "top-1 lost) is not met on the 100 held-out pictures: it is 1.5000; allow a higher one" in caplog.text


@pytest.mark.parametrize(("error", "levels"), [(0.05, []), (0.0501, ["WARNING"])])
def test_a_missed_bound_on_the_error_is_told(
    error: float, levels: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    report = Report(latency=Latency(samples_ms=(1.0,)), fidelity=DenseFidelity(error=error), images=9, held_out=True)
    warn_if_missed(Goal(max_error=0.05), report)
    assert [record.levelname for record in caplog.records] == levels
    assert not levels or "it is 0.0501; allow a higher one" in caplog.text

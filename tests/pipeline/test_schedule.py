"""A schedule from a staircase file, without measuring; what the file leaves open is told."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec
import pytest
from support.computed import Machine

from edgeprune import zoo
from edgeprune.errors import InputError, ScheduleError
from edgeprune.io import load, save
from edgeprune.latency.probing import confirmed_edges, unconfirmed
from edgeprune.pipeline.context import Options
from edgeprune.pipeline.schedule import schedule_from_file, schedule_from_staircase
from edgeprune.records import CutCost, Staircase, Vit
from edgeprune.scheduling.goals import Goal


@pytest.fixture(scope="module")
def machine() -> Machine:
    """The embedded model on a device whose treads end at 50, 85, 121, 157 and 197 tokens."""
    return Machine(load(zoo.RECORD, Vit))


def options(tmp_path: Path, speedup: float) -> Options:
    """The paper's policy: it needs no pictures for a speed-up."""
    return Options(policy="paper", goal=Goal(speedup=speedup), work=tmp_path / "work")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the module logged."""
    return [r.getMessage() for r in caplog.records if r.name == "edgeprune.pipeline.schedule"]


def priced(staircase: Staircase) -> Staircase:
    """The staircase with the cost of a cut."""
    costs = (CutCost(tokens_in=197, tokens_out=118, cost_ms=0.0),)
    return msgspec.structs.replace(staircase, cuts={Options().method: costs})


def test_a_staircase_without_the_cost_of_cuts_is_told(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule_from_staircase(priced(machine.truth), options(tmp_path, 1.2))
    assert not said(caplog)
    schedule_from_staircase(machine.truth, options(tmp_path, 1.2))
    assert "profile --method fold" in said(caplog)[0]


def test_counts_that_are_not_confirmed_are_told(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Probing has found 144, where the tread ends at 157; all other edges are exact."""
    staircase = priced(machine.staircase())
    caplog.set_level(logging.INFO, "edgeprune.pipeline.schedule")
    schedule = schedule_from_staircase(staircase, options(tmp_path, 1.05))
    assert {*schedule.tokens} == {144, 197} and unconfirmed(staircase, schedule.tokens) == (144,)
    (told,) = said(caplog)
    assert "144 tokens" in told and "197" not in told and "build" in told
    caplog.clear()
    schedule = schedule_from_staircase(staircase, options(tmp_path, 1.2))
    assert {*schedule.tokens} <= {*confirmed_edges(staircase)}
    assert not said(caplog)


def test_from_a_file_with_the_unpruned_latency(machine: Machine, tmp_path: Path) -> None:
    staircase = machine.truth
    save(staircase, tmp_path / "staircase.json")
    schedule, measured = schedule_from_file(tmp_path / "staircase.json", options(tmp_path, 1.2))
    assert measured == staircase and staircase.dense.median_ms == 11
    assert schedule == schedule_from_staircase(staircase, options(tmp_path, 1.2))
    assert schedule.predicted_ms is not None and schedule.predicted_ms <= 11 / 1.2


def test_no_runtime_is_needed(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and the embedded pictures and PyTorch are all that evaluating takes."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert schedule_from_staircase(machine.truth, options(tmp_path, 1.2)).cuts


def test_other_weights_of_the_same_shape_are_taken(machine: Machine, tmp_path: Path) -> None:
    """Latency does not depend on weights; the schedule is of those that are loaded."""
    other: Staircase = msgspec.structs.replace(
        machine.truth, vit=msgspec.structs.replace(machine.vit, weights_sha256="0" * 64)
    )
    assert schedule_from_staircase(other, options(tmp_path, 1.2)).vit == machine.vit


def test_another_models_staircase_is_refused(machine: Machine, tmp_path: Path) -> None:
    wide = msgspec.structs.replace(machine.truth, vit=msgspec.structs.replace(machine.vit, width=999))
    save(wide, tmp_path / "wide.json")
    with pytest.raises(InputError, match=r"wide\.json is of .*profile"):
        schedule_from_file(tmp_path / "wide.json", options(tmp_path, 1.2))
    with pytest.raises(ScheduleError, match="relax"):
        schedule_from_staircase(machine.truth, options(tmp_path, 9.0))

"""Nothing else runs on a machine while something is timed there, and nothing waits for ever."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
from support.processes import die, fork

from edgeprune.runtimes import quiet
from edgeprune.runtimes.quiet import evaluating, timing


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def started(work: object) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    thread.join(0.2)
    return thread


def test_evaluations_share_and_timing_is_alone() -> None:
    order: list[str] = []

    def evaluate() -> None:
        with evaluating():
            order.append("evaluated")

    def time_it() -> None:
        with timing():
            order.append("timed")

    with evaluating():
        assert not started(evaluate).is_alive(), "two evaluations at once"
        timer = started(time_it)
        later = started(evaluate)
        assert timer.is_alive() and later.is_alive(), "an evaluation that comes later does not overtake"
    timer.join(10)
    later.join(10)
    assert order == ["evaluated", "timed", "evaluated"]
    with timing():
        late = started(evaluate)
        assert late.is_alive()
    late.join(10)
    assert not late.is_alive()


def test_two_timings_take_turns_and_an_interrupt_ends_one(caplog: pytest.LogCaptureFixture) -> None:
    def time_it() -> None:
        with timing():
            pass

    caplog.set_level("INFO", "edgeprune")
    with pytest.raises(KeyboardInterrupt), timing():
        late = started(time_it)
        assert late.is_alive() and "waiting for another edgeprune" in caplog.text
        raise KeyboardInterrupt
    late.join(10)
    assert not late.is_alive() and not started(time_it).is_alive()


def test_where_no_lock_can_be_made_it_is_timed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quiet._warn.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    for _ in range(2):
        with timing():
            pass
    assert [record.getMessage()[:40] for record in caplog.records] == ["runs on this machine cannot take turns ("]


def hold_and_die(folder: str) -> None:
    tempfile.tempdir = folder
    with timing():
        die()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    process = fork(hold_and_die, str(tmp_path))
    process.join()
    assert process.exitcode == -9
    assert not started(lambda: timing().__enter__()).is_alive()

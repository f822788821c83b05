"""Nothing is evaluated on a machine while something is timed there, and neither waits for ever."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
from support.processes import die, fork

from edgeprune.distributed.quiet import evaluating, timing


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


def hold_and_die(folder: str) -> None:
    tempfile.tempdir = folder
    with timing():
        die()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    process = fork(hold_and_die, str(tmp_path))
    process.join()
    assert process.exitcode == -9
    assert not started(lambda: timing().__enter__()).is_alive()

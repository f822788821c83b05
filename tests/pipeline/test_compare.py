"""Methods compared on the edges that `build` would use; schedules in published shapes stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.computed import ComputedScores, Machine, context_of

from edgeprune.errors import InputError
from edgeprune.latency.probing import confirmed_edges
from edgeprune.latency.staircase import treads
from edgeprune.pipeline import compare as comparing
from edgeprune.pipeline import refine as refining
from edgeprune.pipeline.compare import Comparison, Entry, _Methods, compare, narrowest
from edgeprune.pipeline.context import Options
from edgeprune.pipeline.measure import MISS
from edgeprune.pipeline.refine import refine
from edgeprune.records import Schedule, Vit
from edgeprune.scheduling.goals import Goal, finished
from edgeprune.scheduling.published import published_shapes
from edgeprune.scheduling.search import Tokens

METHODS = ("none", "fold", "pomt", "tome")
MakeVit = Callable[..., Vit]


@pytest.fixture
def run(make_vit: MakeVit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Machine, Any]]:
    """run(factor, targets, methods) is the machine and the comparison of engines that take `factor` times longer."""

    def made(
        factor: Callable[[Tokens], float] = lambda _: 1.0, targets: tuple[float, ...] = (1.5,), methods: Any = METHODS
    ) -> tuple[Machine, Comparison]:
        machine = Machine(make_vit(), factor)
        for module in (comparing, refining):
            monkeypatch.setattr(module, "confirmed", machine.confirmed)
            monkeypatch.setattr(module, "measured_schedules", machine.measured_schedules)
        monkeypatch.setattr(comparing, "ScheduleScores", ComputedScores)
        monkeypatch.setattr(comparing, "measured_staircase", lambda *_: machine.staircase())
        monkeypatch.setattr(_Methods, "reported", lambda self, _, entries: list(entries))  # needs engines that infer
        compared = _Methods.of(context_of(machine.vit, tmp_path), methods)
        before = dict(vars(compared))
        comparison = compared.compared(targets)
        assert vars(compared) == before, "no state: staircase and entries are arguments and return values"
        return machine, comparison

    return made


def of(comparison: Comparison, method: str, policy: str) -> Schedule:
    (found,) = (e.schedule for e in comparison.entries if (e.method, e.policy) == (method, policy))
    return found


@pytest.mark.parametrize("off", [0.9, 1.0, 1.1])
def test_compare_and_build_use_the_same_confirmed_edges(off: float, run: Any, tmp_path: Path) -> None:
    machine, comparison = run(lambda _: off, methods=("fold",))
    first = Machine(machine.vit).staircase()
    searched = of(comparison, "fold", "search")
    assert not {*searched.tokens} <= {*treads(first)}, "one of its edges is found by confirmation alone"
    assert {*searched.tokens} <= {*confirmed_edges(comparison.staircase)}
    build_machine = Machine(machine.vit, machine.factor)
    context = context_of(machine.vit, tmp_path / "build", goal=Goal(speedup=1.5), neighbours=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "confirmed", build_machine.confirmed)
        patch.setattr(refining, "measured_schedules", build_machine.measured_schedules)
        built = refine(context, build_machine.staircase(), ComputedScores(context))
    assert searched == built.schedule, "the same tokens, predicted on the same staircase"
    assert comparison.staircase == built.staircase


def test_every_searched_schedule_that_is_timed_lies_on_confirmed_edges(run: Any) -> None:
    machine, comparison = run(lambda tokens: 0.9 if tokens[3] > 121 else 1.1, targets=(1.3, 1.6))
    open_counts = 0
    *sessions, last = machine.sessions  # the last one has what was tried for the same entry before
    assert {*last} <= {tokens for session in sessions for tokens in session}
    for staircase, session in zip(machine.on[:-1], sessions, strict=True):
        assert len(session) == len(comparison.entries)
        for entry, tokens in zip(comparison.entries, session, strict=True):
            if entry.policy == "search":
                assert {*tokens} <= {*confirmed_edges(staircase)}, entry.method
            open_counts += entry.policy == "published" and bool({*tokens} - {*confirmed_edges(staircase)})
    assert open_counts, "published shapes are not moved to edges"
    assert 1 < len(sessions) <= comparing.SESSIONS


def test_published_shapes_stay_published_shapes(run: Any) -> None:
    machine, comparison = run()
    for method in ("pomt", "tome"):
        schedule = of(comparison, method, "published")
        assert schedule.tokens in {*published_shapes(machine.vit, method, True)}
        assert schedule == finished(comparison.staircase, method, "published", schedule.tokens, True)
        assert 1.5 * (1 - MISS) <= machine.measured(schedule).speedup < 1.7
    assert not [e for e in comparison.entries if e.policy == "published" and e.method in ("fold", "none")]


def test_each_method_meets_its_target_by_measurement(run: Any) -> None:
    machine, comparison = run(lambda tokens: 0.9 if tokens[2] > 121 else 1.12, targets=(1.3, 1.5))
    for entry in comparison.entries:
        if entry.method != "none":
            assert machine.measured(entry.schedule).speedup >= entry.target * (1 - MISS), entry
            assert entry.schedule.staircase_sha256 == comparison.entries[0].schedule.staircase_sha256
    assert len(comparison.entries) == 1 + 3 * 2 + 2 * 2, "none once; two targets, two methods with a published shape"


def test_tries_are_compared_in_one_session(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first session pruned engines are slow, so a goal is set that goes too far; the last session shows it."""
    timed = Machine.measured_schedules

    def noisy(machine: Machine, *args: Any) -> Any:
        machine.factor = lambda _: 1.0 if machine.sessions[1:] else 1.1
        return timed(machine, *args)

    monkeypatch.setattr(Machine, "measured_schedules", noisy)
    machine, comparison = run(methods=("fold",))
    *sessions, last = machine.sessions
    assert {*last} == {tokens for session in sessions for tokens in session} and len(last) > 1
    assert 1.5 * (1 - MISS) <= machine.measured(of(comparison, "fold", "search")).speedup < 1.55


def test_what_is_out_of_reach_is_named(run: Any) -> None:
    _, comparison = run(targets=(1.3, 9.0), methods=("pomt",))
    assert [(m, p, t) for m, p, t, _ in comparison.missing] == [("pomt", "search", 9.0), ("pomt", "published", 9.0)]
    assert all("relax" in reason for *_, reason in comparison.missing)
    assert {e.target for e in comparison.entries} == {1.3}


def test_the_narrowest_that_meets_the_target_is_kept(make_vit: MakeVit) -> None:
    schedule = Schedule(vit=make_vit(), method="fold", policy="search", tokens=(197,) * 12)
    entries = [Entry("fold", "search", 1.5, schedule, Goal(speedup=s)) for s in (1.5, 1.6, 1.7)]
    assert narrowest(list(zip((1.4, 1.9, 1.5 * (1 - MISS / 2)), entries, strict=True))) == entries[2]
    assert narrowest(list(zip((1.4, 1.9, 1.6), entries, strict=True))) == entries[2]
    assert narrowest(list(zip((1.4, 1.2, 1.45), entries, strict=True))) == entries[2]
    assert narrowest([(1.4, entries[0])]) == entries[0]


def test_figures_are_of_a_session_of_their_own(
    make_vit: MakeVit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the last one that corrected the schedules."""

    def measured(context: Any, staircase: Any, schedules: Any, session: str = "") -> None:
        raise InputError(f"session {session!r}")

    monkeypatch.setattr(comparing, "measured_schedules", measured)
    pictures: Any = SimpleNamespace(key="")
    compared = _Methods.of(replace(context_of(make_vit(), tmp_path), pictures=pictures), ("fold",))
    staircase = Machine(make_vit()).truth
    for step, session in ((compared.corrected, "''"), (compared.reported, "'final'")):
        with pytest.raises(InputError, match=f"^session {session}$"):
            step(staircase, [])


@pytest.mark.parametrize(
    ("methods", "targets", "told"),
    [
        ((), (1.5,), "--methods"),
        (("fold", "fold"), (1.5,), "--methods"),
        (("fold",), (), "--speedup"),
        (("fold",), (0.9,), "speedup = 0.9"),
        (("fold",), (float("nan"),), "speedup = nan"),
        (("folding",), (1.5,), "unknown method"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    methods: tuple[str, ...], targets: tuple[float, ...], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told):
        compare(Options(work=tmp_path / "work"), methods, targets)
    assert not (tmp_path / "work").exists()

"""Latency of sessions, timed in interleaved rounds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

import numpy as np

from edgeprune.records import Latency, Progress, silent
from edgeprune.runtimes import RUNS_PER_TIMING, OnDevice, Session, TimedTogether, cuda_graph_of
from edgeprune.runtimes.inference import Open

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
WARMUP = 3  # timings of every session before the first that counts: kernels and weights are loaded in them
WARMUP_MS = 300.0  # of inferences before the first round: clocks rise with the load, in tens of milliseconds
WINDOW = 10  # timings per median; two successive medians show whether the latency is stable
STABLE = 0.02  # relative difference of two such medians below which it is
WARMUP_S = 10.0  # of such a warm-up, at most
AT_ONCE = 64  # timings in one request to another machine


class Room(NamedTuple):
    """Memory for sessions that are open at once, bytes; `guess` is taken for a session that does not know its own."""

    total: float = math.inf
    guess: int = 0


UNLIMITED = Room()


def interleave(
    candidates: Mapping[K, Open],
    rounds: int,
    samples: dict[K, list[float]] | None = None,
    after_round: Callable[[dict[K, list[float]]], None] = lambda _: None,
    progress: Progress = silent,
    room: Room = UNLIMITED,
    what: str = "measuring, round",
    warmup_ms: float = WARMUP_MS,
    stable: bool = False,
    graphs: dict[K, bool | None] | None = None,
) -> dict[K, list[float]]:
    """Time every candidate once in each round, so that drift of the machine hits all alike.

    The order within a round is shuffled (seeded); each timed inference follows an untimed one of the same candidate
    (see Session.time_ms). Candidates that already have `rounds` values in `samples` are left out, so an interrupted
    measurement continues where it stopped. Candidates that do not fit into `room` together with those before them
    are opened again for each of their timings. Before the first round candidates run for `warmup_ms`; with `stable`,
    each until its latency is stable (see warm_up). On another machine several rounds are one request. `what`
    describes the measurement in the progress. `graphs` gets whether a candidate runs as one CUDA graph; a warning is
    logged where some do and others do not. Returns samples in ms by the key of each candidate. Raises EngineError.
    """
    samples = {} if samples is None else samples
    for name in candidates:
        samples.setdefault(name, [])
    with ExitStack() as stack:
        todo = [name for name in candidates if len(samples[name]) < rounds]
        sessions = _opened(candidates, todo, room, stack, progress)
        found = {name: cuda_graph_of(session) for name, session in sessions.items()}
        _warn_of_mixed(list(found.values()))
        if graphs is not None:
            graphs.update(found)
        _warm(sessions, warmup_ms, stable)
        done = rounds - max((rounds - len(samples[n]) for n in todo), default=0)
        together = len(sessions) == len(todo) and all(isinstance(s, TimedTogether) for s in sessions.values())
        step = max(AT_ONCE // max(len(todo), 1), 1) if together else 1
        for first in range(done, rounds, step):
            progress(what, first, rounds)
            order: list[K] = []
            for index in range(first, min(first + step, rounds)):
                turn = [name for name in todo if len(samples[name]) <= index]
                order += [turn[i] for i in np.random.default_rng(index).permutation(len(turn))]
            for name, ms in zip(order, _timed(order, sessions, candidates, warmup_ms), strict=True):
                samples[name].append(ms)
            after_round(samples)
        progress(what, rounds, rounds)
    return samples


def _opened(
    candidates: Mapping[K, Open], todo: Sequence[K], room: Room, stack: ExitStack, progress: Progress
) -> dict[K, Session]:
    """Sessions that stay open: as many as fit into the room, and one more is opened to know what it takes."""
    sessions: dict[K, Session] = {}
    taken = 0
    for loaded, name in enumerate(todo):
        progress("loading engines", loaded, len(todo))
        opened = candidates[name]()
        session = opened.__enter__()
        taken += session.memory_bytes() if isinstance(session, OnDevice) else room.guess
        if taken > room.total:
            opened.__exit__(None, None, None)
            log.info("keeping %d of %d engines loaded: memory is too small for all", len(sessions), len(todo))
            break
        sessions[name] = session
        stack.push(opened)
    return sessions


def _warn_of_mixed(graphs: Sequence[bool | None]) -> None:
    if (without := graphs.count(False)) and True in graphs:
        log.warning(
            "%d of %d engines run without a CUDA graph, so they may be slower: do not compare them with the others; "
            "update the GPU's driver or free memory, and measure again", without, len(graphs),
        )  # fmt: skip


def _warm(sessions: Mapping[K, Session], least_ms: float, stable: bool) -> None:
    """Run every session WARMUP times or until it is stable, then all in turn until `least_ms` have been run."""
    for name, session in sessions.items():
        if stable and not warm_up(session, WARMUP_MS, WARMUP_S):
            log.warning("%s: latency is not yet stable after the warm-up; expect wider intervals", name)
    # one request, where they are on another machine: its clocks rise once, not once for every session
    ran_ms = RUNS_PER_TIMING * sum(times_ms([session for session in sessions.values() for _ in range(WARMUP)]))
    while sessions and ran_ms < least_ms:
        ran_ms += RUNS_PER_TIMING * sum(times_ms(list(sessions.values())))


def warm_up(session: Session, least_ms: float = WARMUP_MS, most_s: float = WARMUP_S) -> bool:
    """Run a session until the median of the last WINDOW timings is within STABLE of that of the WINDOW before.

    It runs for at least `least_ms`, because clocks can be steady before they rise, and at most for `most_s`. Returns
    whether the latency has become stable.
    """
    times: list[float] = []
    until = time.monotonic() + most_s
    while not times or time.monotonic() < until:
        times += times_ms([session] * WINDOW)
        if len(times) >= 2 * WINDOW and RUNS_PER_TIMING * sum(times) >= least_ms:
            before, now = np.median(times[-2 * WINDOW : -WINDOW]), np.median(times[-WINDOW:])
            if abs(now - before) <= STABLE * before:
                return True
    return False


def times_ms(order: Sequence[Session]) -> list[float]:
    """time_ms() of sessions one after the other, ms; in one request where they are on another machine."""
    if order and isinstance(order[0], TimedTogether):
        return order[0].times_ms(order)
    return [session.time_ms() for session in order]


def _timed(
    order: Sequence[K], sessions: Mapping[K, Session], candidates: Mapping[K, Open], warmup_ms: float
) -> list[float]:
    if all(name in sessions for name in order):
        return times_ms([sessions[name] for name in order])
    found = []
    for name in order:
        if name in sessions:
            found += times_ms([sessions[name]])
            continue
        with candidates[name]() as fresh:
            _warm({name: fresh}, warmup_ms, stable=False)
            found += times_ms([fresh])
    return found


def latency_of(session: Session, count: int) -> Latency:
    """`count` timings of one session by itself, after it has run WARMUP times and for WARMUP_MS."""
    _warm({"": session}, WARMUP_MS, stable=False)
    samples = tuple(times_ms([session] * count))
    return Latency(samples_ms=samples, warmup=WARMUP, cuda_graph=cuda_graph_of(session))

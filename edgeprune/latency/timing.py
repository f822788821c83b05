"""Latency of sessions, timed in interleaved rounds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from typing import TypeVar

import numpy as np

from edgeprune.records import Latency, Progress, silent
from edgeprune.runtimes import Session
from edgeprune.runtimes.inference import Open

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
WARMUP = 3
WINDOW = 10  # inferences per median; two successive medians show whether the latency is stable
STABLE = 0.02  # relative difference of two such medians below which it is
WARMUP_S = 10.0  # at most


def interleave(
    candidates: Mapping[K, Open],
    rounds: int,
    samples: dict[K, list[float]] | None = None,
    after_round: Callable[[dict[K, list[float]]], None] = lambda _: None,
    progress: Progress = silent,
    keep_open: bool = True,
    what: str = "measuring, round",
    warmup: int = WARMUP,
) -> dict[K, list[float]]:
    """Time every candidate once in each round, so that drift of the machine hits all alike.

    The order within a round is shuffled (seeded); each timed inference follows an untimed one of the
    same candidate, so that caches hold what they hold when it runs by itself. Candidates that already
    have `rounds` values in `samples` are left out, so an interrupted measurement continues where it stopped.
    `keep_open=False` opens a candidate again for each of its timings, where memory is too small for all.
    `warmup` is the largest number of inferences before the first round (see warm_up); `what` describes the
    measurement in the progress. Returns samples in ms by the key of each candidate. Raises EngineError.
    """
    samples = {} if samples is None else samples
    for name in candidates:
        samples.setdefault(name, [])
    with ExitStack() as stack:
        sessions: dict[K, Session] = {}
        todo = [name for name in candidates if len(samples[name]) < rounds]
        if keep_open:
            for loaded, name in enumerate(todo):
                progress("loading engines", loaded, len(todo))
                sessions[name] = stack.enter_context(candidates[name]())
                if not warm_up(sessions[name], warmup) and warmup > WARMUP:
                    log.warning("%s: latency is not yet stable after the warm-up; expect wider intervals", name)
        done = rounds - max((rounds - len(samples[n]) for n in todo), default=0)
        for index in range(done, rounds):
            progress(what, index, rounds)
            turn = [name for name in todo if len(samples[name]) <= index]
            order = np.random.default_rng(index).permutation(len(turn))
            for name in (turn[i] for i in order):
                samples[name].append(_timed(sessions.get(name), candidates[name]))
            after_round(samples)
        progress(what, rounds, rounds)
    return samples


def warm_up(session: Session, most: int) -> bool:
    """Run inferences until the median of the last WINDOW is within STABLE of that of the WINDOW before.

    Ends at the latest after `most` of them, or after WARMUP_S. Returns whether the latency has become stable.
    """
    times: list[float] = []
    until = time.monotonic() + WARMUP_S
    while len(times) < most and (time.monotonic() < until or len(times) < WARMUP):
        times.append(session.time_ms())
        if len(times) >= 2 * WINDOW:
            before, now = np.median(times[-2 * WINDOW : -WINDOW]), np.median(times[-WINDOW:])
            if abs(now - before) <= STABLE * before:
                return True
    return False


def _timed(session: Session | None, open_: Open) -> float:
    if session is not None:
        session.time_ms()
        return session.time_ms()
    with open_() as fresh:
        for _ in range(WARMUP):
            fresh.time_ms()
        return fresh.time_ms()


def latency_of(session: Session, count: int, warmup: int) -> Latency:
    """`count` timed inferences of one session by itself, after `warmup` untimed ones."""
    for _ in range(warmup):
        session.time_ms()
    return Latency(samples_ms=tuple(session.time_ms() for _ in range(count)), warmup=warmup)

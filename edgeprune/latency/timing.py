"""Clock and labels: interleaved latency of sessions, top-1, agreement and KL of their outputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edgeprune.records import Latency, Progress, silent
from edgeprune.runtimes import Session
from edgeprune.runtimes.inference import Open

if TYPE_CHECKING:
    pass


log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
Samples = dict[str, list[float]]
WARMUP = 3
WINDOW = 10  # inferences whose medians are compared to see whether a candidate has settled
SETTLED = 0.02  # relative difference of two such medians that is none
WARMUP_S = 10.0


def interleave(
    candidates: Mapping[K, Open],
    rounds: int,
    samples: dict[K, list[float]] | None = None,
    after_round: Callable[[dict[K, list[float]]], None] = lambda _: None,
    progress: Progress = silent,
    keep_open: bool = True,
    what: str = "measuring",
    warmup: int = WARMUP,
) -> dict[K, list[float]]:
    """Time every candidate once in each round, so that drift of the machine hits all alike.

    The order within a round is shuffled (seeded); each timed inference follows an untimed one of the
    same candidate, so that its weights are where they are when it runs alone. Candidates that already
    have `rounds` values in `samples` are left out: an interrupted measurement goes on where it stopped.
    `keep_open=False` opens a candidate anew for each of its timings, for want of memory.
    `warmup` is the most inferences before the first round (see warm_up).
    Returns samples in ms by the key of each candidate.
    """
    samples = {} if samples is None else samples
    for name in candidates:
        samples.setdefault(name, [])
    with ExitStack() as stack:
        sessions: dict[K, Session] = {}
        todo = [name for name in candidates if len(samples[name]) < rounds]
        if keep_open:
            for name in todo:
                sessions[name] = stack.enter_context(candidates[name]())
                if not warm_up(sessions[name], warmup) and warmup > WARMUP:
                    log.warning("%s has not settled in its warm-up: its latency still moves", name)
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
    """Untimed inferences until the median of the last WINDOW is within SETTLED of that of the WINDOW before.

    Ends after `most` of them, or WARMUP_S, at the latest. Returns whether it has settled.
    """
    times: list[float] = []
    until = time.monotonic() + WARMUP_S
    while len(times) < most and (time.monotonic() < until or len(times) < WARMUP):
        times.append(session.time_ms())
        if len(times) >= 2 * WINDOW:
            before, now = np.median(times[-2 * WINDOW : -WINDOW]), np.median(times[-WINDOW:])
            if abs(now - before) <= SETTLED * before:
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
    """`count` timed inferences of a session that runs alone, after `warmup` untimed ones."""
    for _ in range(warmup):
        session.time_ms()
    return Latency(samples_ms=tuple(session.time_ms() for _ in range(count)), warmup=warmup)

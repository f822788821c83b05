"""Clock and labels: interleaved latency of sessions, top-1, agreement and KL of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.images import batches
from edgeprune.records import Preprocessing, Progress, median_interval, silent
from edgeprune.runtimes import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

Open = Callable[[], Session]
Samples = dict[str, list[float]]
WARMUP = 3


def interleave(
    candidates: Mapping[str, Open],
    rounds: int,
    samples: Samples | None = None,
    after_round: Callable[[Samples], None] = lambda _: None,
    progress: Progress = silent,
    keep_open: bool = True,
    what: str = "measuring",
) -> Samples:
    """Time every candidate once in each round, so that drift of the machine hits all alike.

    The order within a round is shuffled (seeded); each timed inference follows an untimed one of the
    same candidate, so that its weights are where they are when it runs alone. Candidates that already
    have `rounds` values in `samples` are left out: an interrupted measurement goes on where it stopped.
    `keep_open=False` opens a candidate anew for each of its timings, for want of memory.
    Returns samples in ms by name.
    """
    samples = {} if samples is None else samples
    for name in candidates:
        samples.setdefault(name, [])
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        todo = [name for name in candidates if len(samples[name]) < rounds]
        if keep_open:
            for name in todo:
                sessions[name] = stack.enter_context(candidates[name]())
                for _ in range(WARMUP):
                    sessions[name].time_ms()
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


def _timed(session: Session | None, open_: Open) -> float:
    if session is not None:
        session.time_ms()
        return session.time_ms()
    with open_() as fresh:
        for _ in range(WARMUP):
            fresh.time_ms()
        return fresh.time_ms()


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Ratio of two interleaved series and its 95 % interval: per round, so that drift cancels."""
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return float(np.median(pairs)), median_interval(pairs)


def logits_of(
    session: Session,
    pixels: NDArray[np.uint8],
    how: Preprocessing,
    batch: int,
    progress: Progress = silent,
    what: str = "evaluating",
) -> NDArray[np.float32]:
    """(images, classes) outputs of a session over all pictures. Raises EngineError."""
    rows = []
    done = 0
    for images, real in batches(pixels, how, batch):
        rows.append(session.infer(images)[:real])
        done += real
        if done % 16 < batch:
            progress(what, done, len(pixels))
    return np.concatenate(rows)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row-wise, in fp64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def kl_divergence(dense: NDArray[np.float32], pruned: NDArray[np.float32]) -> float:
    """Mean over images of KL(unpruned || pruned) of the class distributions, nats."""
    p, q = log_softmax(dense), log_softmax(pruned)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def agreement(dense: NDArray[np.float32], pruned: NDArray[np.float32]) -> float:
    """Share of images on which both put the same class first, percent."""
    return float((dense.argmax(1) == pruned.argmax(1)).mean() * 100)


def top1(logits: NDArray[np.float32], labels: Sequence[int]) -> float:
    """Share of images whose label is put first, percent."""
    return float((logits.argmax(1) == np.asarray(labels)).mean() * 100)

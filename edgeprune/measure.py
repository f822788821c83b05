"""Clock and labels: interleaved latency of sessions, top-1, agreement and KL of their outputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edgeprune.images import batches
from edgeprune.records import Latency, Preprocessing, Progress, median_interval, silent
from edgeprune.runtimes import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

Open = Callable[[], Session]
K = TypeVar("K", bound=Hashable)
Samples = dict[str, list[float]]
WARMUP = 3
WINDOW = 10  # inferences whose medians are compared to see whether a candidate has settled
SETTLED = 0.02  # relative difference of two such medians that is none
WARMUP_S = 10.0
RESAMPLES = 2000
DRAWN_AT_ONCE = 1 << 20  # values, which bounds memory


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


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Ratio of two interleaved series and its 95 % interval: per round, so that drift cancels."""
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return float(np.median(pairs)), median_interval(pairs)


def bootstrap_ratio(
    numerator: Sequence[float], denominator: Sequence[float], paired: bool
) -> tuple[float, tuple[float, float]]:
    """Ratio of two series of latencies and its 95 % bootstrap interval (percentile method, seeded).

    `paired`: of the same rounds; the ratio is the median of their ratios, and rounds are drawn. Otherwise of two
    sessions; it is the ratio of medians, and each session is drawn from for itself. What is drawn are runs of cbrt(n)
    neighbours, because the load of a machine lasts longer than a round. Sources: Efron and Tibshirani, "An
    Introduction to the Bootstrap"; Politis and Romano 1992 on circular blocks; Hall, Horowitz and Jing 1995 on their
    length. It knows nothing of what differs between two sessions, such as another temperature.
    """
    above, below = np.asarray(numerator), np.asarray(denominator)
    if paired:
        if len(above) != len(below):
            raise ValueError(f"{len(above)} and {len(below)} rounds")
        rounds = above / below
        value, drawn = np.median(rounds), _medians_drawn(rounds, 0)
    else:
        value, drawn = np.median(above) / np.median(below), _medians_drawn(above, 0) / _medians_drawn(below, 1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(value), (float(low), float(high))


def _medians_drawn(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Medians of RESAMPLES series drawn from one in circular blocks, (RESAMPLES,)."""
    n = len(values)
    block = round(n ** (1 / 3))
    rng, medians = np.random.default_rng(seed), np.empty(RESAMPLES)
    for part in np.array_split(medians, -(-RESAMPLES * n // DRAWN_AT_ONCE)):
        starts = rng.integers(n, size=(len(part), -(-n // block), 1))
        drawn = ((starts + np.arange(block)) % n).reshape(len(part), -1)[:, :n]
        part[:] = np.median(values[drawn], axis=1)
    return medians


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


def differences(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest |difference| of each image's outputs, (images,)."""
    off = np.atleast_2d(np.abs(found - wanted))
    most: NDArray[np.float32] = off.reshape(len(off), -1).max(axis=1)
    return most


def typical_difference(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Median over images of their largest |difference|; NaN where an image has one.

    Each runtime rounds in its own way, so that of two tokens with equal scores either may be kept: a single image may
    differ. An engine that computes something else differs on most.
    """
    return float(np.median(differences(found, wanted)))


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

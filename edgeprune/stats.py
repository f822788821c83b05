"""Statistics of latencies, and differences between the outputs of two models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
DRAWN_AT_ONCE = 1 << 20  # values resampled at a time, which limits memory

ROUNDING = 1e-9  # of a difference of two percentages


def median_interval(values: Sequence[float], z: float = 1.96) -> tuple[float, float]:
    """Interval of the median (95 % at z = 1.96) from the binomial sign test, ranks by normal approximation."""
    ordered = sorted(values)
    n = len(ordered)
    reach = z / 2 * n**0.5  # z * sqrt(n / 4)
    low = max(int(np.floor((n - 1) / 2 - reach)), 0)
    return ordered[low], ordered[n - 1 - low]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Ratio of two interleaved series (median of the ratios per round: drift cancels) and its 95 % interval."""
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return float(np.median(pairs)), median_interval(pairs)


def bootstrap_ratio(
    numerator: Sequence[float], denominator: Sequence[float], paired: bool
) -> tuple[float, tuple[float, float]]:
    """Ratio of two series of latencies and its 95 % bootstrap interval (percentile method, seeded).

    `paired` series are of the same rounds: the ratio is the median of the ratios per round, and rounds are resampled.
    Other series are of two sessions: the ratio is that of the medians, and each session is resampled separately.
    Blocks of cbrt(n) consecutive values are resampled, because the load of a machine lasts longer than one round.
    Sources: Efron and Tibshirani, "An Introduction to the Bootstrap"; Politis and Romano 1992 on circular blocks;
    Hall, Horowitz and Jing 1995 on their length. The interval does not cover systematic differences between two
    sessions, such as another temperature. Raises ValueError for paired series of different lengths.
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
    """Medians of RESAMPLES resampled series in circular blocks, (RESAMPLES,)."""
    n = len(values)
    block = round(n ** (1 / 3))
    rng, medians = np.random.default_rng(seed), np.empty(RESAMPLES)
    for part in np.array_split(medians, -(-RESAMPLES * n // DRAWN_AT_ONCE)):
        starts = rng.integers(n, size=(len(part), -(-n // block), 1))
        drawn = ((starts + np.arange(block)) % n).reshape(len(part), -1)[:, :n]
        part[:] = np.median(values[drawn], axis=1)
    return medians


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row-wise log-softmax of (images, classes), in fp64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def differences(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest |difference| of each image's outputs, (images,)."""
    off = np.atleast_2d(np.abs(found - wanted))
    most: NDArray[np.float32] = off.reshape(len(off), -1).max(axis=1)
    return most


def kl_per_image(dense: NDArray[np.float32], pruned: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(unpruned || pruned) of the class distributions for each image, nats."""
    p, q = log_softmax(dense), log_softmax(pruned)
    each: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return each


def standard_error(differences: NDArray[np.float64]) -> float:
    """Standard error of the mean of paired differences; 0 for fewer than two."""
    count = len(differences)
    return float(differences.std(ddof=1) / count**0.5) if count > 1 else 0.0


def signed_rank(differences: NDArray[np.float64]) -> float:
    """Wilcoxon's signed-rank statistic as a z value: how clearly paired differences are above zero.

    Zeros are left out, ties share their mean rank, and the variance is corrected for ties (Wilcoxon 1945; Lehmann,
    "Nonparametrics", sec. 3.2). Differences of timings are symmetric, where this test needs about half the samples
    of the sign test.
    """
    differences = differences[differences != 0]
    n = len(differences)
    if n == 0:
        return 0.0
    _, place, ties = np.unique(np.abs(differences), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
    above = ranks[differences > 0].sum()
    variance = n * (n + 1) * (2 * n + 1) / 24 - (ties**3 - ties).sum() / 48
    return float((above - n * (n + 1) / 4) / variance**0.5)

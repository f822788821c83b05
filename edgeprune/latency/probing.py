"""Which token counts to probe, and how often, until no choice of schedule can change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.staircase import SampleKey, Samples, exceeds, staircase_from_samples, treads, trunk
from edgeprune.latency.timing import interleave
from edgeprune.records import Point, Progress, Setup, Staircase, Vit, silent
from edgeprune.runtimes.inference import Open

log = logging.getLogger(__name__)

GRID = 12  # gaps of the coarse grid, about
SMALLEST_SHARE = 0.1  # the lowest count probed, as a share of the unpruned count
FEW = 9  # rounds at a time: the fewest in which the signed-rank test can tell a step
SHARE = 0.16  # of the samples of exhaustive probing, at most
SHARE_CONFIRMED = 0.2  # the same with the edges of a chosen schedule
TOLERANCE = 0.005  # utility that is worth no probe
AT_ONCE = 4  # questions that are asked in the same rounds, where there is noise
ALPHAS = np.linspace(0.1, 0.9, 9)
CURVES = ((0.1, 1.0), (0.2, 1.5), (0.37, 2.5), (1.0, 1.0))  # t, s of 1 - exp(-(n / t N)^s)

Floats = NDArray[np.float64]


class UtilityPrior(NamedTuple):
    """Utilities by which a count may be chosen: U = alpha (1 - L / L_max) + (1 - alpha) A / A_max, one per row."""

    alpha: Floats  # (K, 1)
    accuracy: Floats  # (K, tokens + 1) of A / A_max by token count, rising

    def utility(self, tokens: Sequence[int], share: Floats) -> Floats:
        """(K, P) utilities of P counts at P latencies, these as shares of the unpruned one's."""
        values: Floats = self.alpha * (1 - share) + (1 - self.alpha) * self.accuracy[:, tokens]
        return values


def utility_prior(vit: Vit, alphas: Sequence[float], accuracies: Sequence[Callable[[int], float]]) -> UtilityPrior:
    """Every alpha with every A(n)."""
    curves = np.array([[a(n) for n in range(vit.tokens + 1)] for a in accuracies])
    curves /= curves.max(axis=1, keepdims=True)
    return UtilityPrior(np.repeat(alphas, len(curves))[:, None], np.tile(curves, (len(alphas), 1)))


def any_utility(vit: Vit) -> UtilityPrior:
    """What is assumed of A(n) before a picture is seen: 1 - exp(-(n / t N)^s), from robust to nearly linear.

    With random tokens kept the embedded model measures as t = 0.1, s = 1 and ViT-Tiny as t = 0.37, s = 2.5. With
    every alpha the winners are spread over the whole range, wherever a step is worth its tokens.
    """

    def curve(t: float, s: float) -> Callable[[int], float]:
        return lambda n: -np.expm1(-((n / (t * vit.tokens)) ** s))

    return utility_prior(vit, list(ALPHAS), [curve(t, s) for t, s in CURVES])


def coarse_counts(vit: Vit) -> list[int]:
    """The lowest count, the unpruned one, and between them multiples of the power of two next to a twelfth of it."""
    counts = all_counts(vit)
    grid = 2 ** round(np.log2(max(vit.tokens / GRID, 1)))
    return [n for n in counts if n % grid == 0 or n in (counts[0], vit.tokens)]


def all_counts(vit: Vit) -> list[int]:
    """Every count that a schedule can use, within the probed range."""
    lowest = max(vit.prefix + 2, round(SMALLEST_SHARE * vit.tokens))
    return list(range(min(lowest, vit.tokens), vit.tokens + 1))


def probe(
    vit: Vit,
    setup: Setup,
    open_trunk: Callable[[int], Open],
    others: Mapping[SampleKey, Open],
    rounds: int,
    exhaustive: bool = False,
    samples: Samples | None = None,
    save: Callable[[Samples], None] = lambda _: None,
    progress: Progress = silent,
    keep_open: bool = True,
    prior: UtilityPrior | None = None,
    used: Collection[int] = (),
) -> tuple[Staircase, Samples]:
    """Measure a staircase: coarse first, then stage by stage what can still change a choice.

    `others` holds FIXED and DENSE, and for the cost of cuts blocks, last blocks and cuts; all are timed in the same
    rounds. Each stage takes FEW rounds
    of a few counts, the unpruned one among them (`questions` says which), until no request is left or SHARE of
    the samples of exhaustive probing is spent. `prior` is what counts are chosen by, if it is known. With
    `used` only the edges of these counts are sought. A count is timed again until it has `rounds` samples, or beside
    a new one; one round is enough where `setup` is noiseless. `samples` of an interrupted run are taken up.
    Returns the staircase and all samples (ms).
    """
    samples = {} if samples is None else samples
    prior = prior or any_utility(vit)
    everything = all_counts(vit)
    limit = int((SHARE_CONFIRMED if used else SHARE) * rounds * len(everything))
    few = rounds if exhaustive else min(FEW, rounds)
    stage = max((key.stage for key in samples), default=0)
    counts = [key.tokens[0] for key in samples if key.kind == "trunk" and key.stage == stage]
    counts = counts or (everything if exhaustive else coarse_counts(vit))
    while True:
        before = joined({key: v for key, v in samples.items() if key.stage < stage})
        wanted = {trunk(n): open_trunk(n) for n in counts}
        wanted |= {key: opens for key, opens in others.items() if len(before.get(key, ())) < rounds}
        candidates = {key._replace(stage=stage): opens for key, opens in wanted.items()}
        interleave(candidates, few, samples, save, progress, keep_open, f"{len(counts)} token counts")
        whole = joined(samples)
        staircase = staircase_from_samples(vit, setup, whole)
        asked = edges_of(staircase, used) if used else probe_requests(staircase, prior, rounds)
        room = (limit - staircase.probes) // few
        counts = [] if exhaustive else _together(vit, asked, room, setup.noiseless)
        if asked and not counts:
            log.info("probe budget used; %d gaps unresolved (--exhaustive measures every count)", len(asked))
        if not counts and any(len(whole[key]) < rounds for key in others):
            counts = [vit.tokens]
        if not counts:
            return staircase, samples
        stage += 1


def joined(samples: Samples) -> Samples:
    """All samples of each candidate, those of later stages scaled to the first by what they share with it.

    Within a stage drift hits all alike; between stages it shows in the candidates timed again (median of their
    ratios), the unpruned trunk among them.
    """
    whole: Samples = {}
    for stage in sorted({key.stage for key in samples}):
        part = {key._replace(stage=0): v for key, v in samples.items() if v and key.stage == stage}
        ratios = [np.median(v) / np.median(whole[key]) for key, v in part.items() if key in whole]
        factor = float(np.median(ratios)) if ratios else 1.0
        for key, values in part.items():
            whole.setdefault(key, []).extend(ms / factor for ms in values)
    return whole


class ProbeRequest(NamedTuple):
    """Counts to be timed in the same rounds, and the utility that the answer may be worth."""

    worth: float
    counts: tuple[int, ...]


def _together(vit: Vit, asked: Sequence[ProbeRequest], room: int, noiseless: bool) -> list[int]:
    """Counts of the next stage, at most `room`: the questions worth most, and the unpruned count against drift."""
    chosen: set[int] = set()
    for request in sorted(asked, reverse=True)[: 1 if noiseless else AT_ONCE]:
        more = chosen | {*request.counts} | (set() if noiseless else {vit.tokens})
        if len(more) <= room:
            chosen = more
    return sorted(chosen)


def probe_requests(staircase: Staircase, prior: UtilityPrior, rounds: int) -> list[ProbeRequest]:
    """What could still change a choice, for any of the utilities.

    Latency never falls with tokens, so a count within a gap (a, b) is at best b - 1 tokens at the latency of a.
    Where that beats the best known by more than TOLERANCE, or a is the best itself and its edge not yet found,
    the gap is split; no step is sought between counts that noise does not tell apart, but those are timed again
    where a step would matter. So are two counts whose intervals leave open which is better.
    """
    points, ends = staircase.points, set(treads(staircase))
    tokens = [p.tokens for p in points]
    top = points[-1].latency.median_ms
    share = np.array([p.latency.median_ms for p in points]) / top
    utility = prior.utility(tokens, share)
    utility[:, [n not in ends for n in tokens]] = -np.inf
    best = utility.max(axis=1)
    winner = len(tokens) - 1 - utility[:, ::-1].argmax(axis=1)  # a tie goes to more tokens
    asked = []
    for index, (a, b) in enumerate(pairwise(points)):
        gain = prior.utility([b.tokens - 1], share[index : index + 1])[:, 0] - best
        matters = (gain > TOLERANCE) | (winner == index)
        if not matters.any():
            continue
        worth = float(gain[matters].max())
        if not exceeds(b.latency, a.latency, staircase.setup.noiseless):
            asked.append(ProbeRequest(worth, _short(rounds, a, b)))
        elif b.tokens - a.tokens > 1:
            asked.append(_halved(worth, a.tokens, b.tokens, staircase.setup))
    low, high = np.array([p.latency.interval_ms for p in points]).T / top
    rows = np.arange(len(winner))
    gains = prior.utility(tokens, low) - prior.utility(tokens, high)[rows, winner][:, None]
    for index, point in enumerate(points):
        row = int(gains[:, index].argmax())
        rival = points[winner[row]]
        if point is not rival and gains[row, index] > TOLERANCE:
            asked.append(ProbeRequest(float(gains[row, index]), _short(rounds, point, rival)))
    return [request for request in asked if request.counts]


def _short(rounds: int, *points: Point) -> tuple[int, ...]:
    """Those of the counts that can still be timed again."""
    return tuple(p.tokens for p in points if len(p.latency.samples_ms) < rounds)


def _halved(worth: float, low: int, high: int, setup: Setup) -> ProbeRequest:
    """A gap to be split; its ends are timed beside the new count, or drift since then would look like a step."""
    middle = split(low, high, setup.batch)
    return ProbeRequest(worth, (middle,) if setup.noiseless else (middle, low, high))


def edges_of(staircase: Staircase, used: Collection[int]) -> list[ProbeRequest]:
    """Where the treads of used counts end: the gaps to their right, the narrowest first."""
    tokens = [p.tokens for p in staircase.points]
    asked = []
    for end in unconfirmed(staircase, used):
        after = tokens[tokens.index(end) + 1]
        asked.append(_halved(1 / (after - end), end, after, staircase.setup))
    return asked


def edge(staircase: Staircase, tokens: int) -> int:
    """The end of the tread that holds a count: the most tokens for its latency, as far as probed."""
    return min(n for n in treads(staircase) if n >= tokens)


def confirmed_edges(staircase: Staircase) -> tuple[int, ...]:
    """Ends of treads that are exact: one token more was probed and belongs to the next tread."""
    counts = {p.tokens for p in staircase.points}
    return tuple(n for n in treads(staircase) if n + 1 in counts or n == staircase.vit.tokens)


def unconfirmed(staircase: Staircase, tokens: Iterable[int]) -> tuple[int, ...]:
    """Ends of the treads that hold these counts, of which it is not known whether one token more is slower."""
    return tuple(sorted({edge(staircase, n) for n in tokens} - {*confirmed_edges(staircase)}))


def on_confirmed_edges(staircase: Staircase, tokens: Sequence[int]) -> tuple[int, ...]:
    """A schedule with every count at its tread's end; where that is not exact, at the next exact one below.

    (Above, where there is none below.) Never slower beyond noise, and never with fewer tokens than it need have.
    """
    exact = confirmed_edges(staircase)
    ends = (edge(staircase, n) for n in tokens)
    return tuple(max((e for e in exact if e <= end), default=exact[0]) for end in ends)


def split(low: int, high: int, batch: int) -> int:
    """A count strictly between two, near the middle, at which a tile of a GPU would end if there is one.

    Tiles are powers of two and rows are batch · tokens. Where `low` is rounder than all between, a step is
    likely right behind it. That only orders the probes: what is an edge, measurement says.
    """

    def roundness(n: int) -> int:
        return (n * batch) & -(n * batch)

    quarter, middle = (high - low) // 4, (low + high) / 2
    inner = range(low + max(quarter, 1), high - max(quarter, 1) + 1)
    best = max(inner, key=lambda n: (roundness(n), -abs(n - middle)))
    return low + 1 if roundness(low) > roundness(best) else best

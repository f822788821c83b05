"""Which token counts to measure, and how often, until more probes could not change the choice of a schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.staircase import SampleKey, Samples, exceeds, staircase_from_samples, treads, trunk
from edgeprune.latency.timing import UNLIMITED, WARMUP_MS, Room, interleave
from edgeprune.records import Conditions, GpuState, Point, Progress, Setup, Staircase, Vit, silent
from edgeprune.runtimes.inference import Open

log = logging.getLogger(__name__)

GRID = 12  # number of gaps in the coarse grid, approximately
SMALLEST_SHARE = 0.1  # the lowest token count to measure, as a share of the unpruned count
FEW = 9  # rounds per stage: the fewest in which the signed-rank test can detect a step
SHARE = 0.16  # probe budget, as a share of the probes of exhaustive profiling
SHARE_CONFIRMED = 0.2  # the same, once the tread ends of a chosen schedule are confirmed too
TOLERANCE = 0.005  # gain in utility below which no more probes are made
AT_ONCE = 4  # requests measured in the same rounds, where latencies are noisy
ALPHAS = np.linspace(0.1, 0.9, 9)
CURVES = ((0.1, 1.0), (0.2, 1.5), (0.37, 2.5), (1.0, 1.0))  # t, s of 1 - exp(-(n / t N)^s)

Floats = NDArray[np.float64]


class UtilityPrior(NamedTuple):
    """Utilities for which a count may be chosen: U = alpha (1 - L / L_max) + (1 - alpha) A / A_max, one per row."""

    alpha: Floats  # (K, 1)
    accuracy: Floats  # (K, tokens + 1) of A / A_max by token count, rising

    def utility(self, tokens: Sequence[int], share: Floats) -> Floats:
        """(K, P) utilities of P token counts, whose latencies are given as shares of the unpruned latency."""
        values: Floats = self.alpha * (1 - share) + (1 - self.alpha) * self.accuracy[:, tokens]
        return values


def utility_prior(vit: Vit, alphas: Sequence[float], accuracies: Sequence[Callable[[int], float]]) -> UtilityPrior:
    """Every combination of the alphas with the curves A(n)."""
    curves = np.array([[a(n) for n in range(vit.tokens + 1)] for a in accuracies])
    curves /= curves.max(axis=1, keepdims=True)
    return UtilityPrior(np.repeat(alphas, len(curves))[:, None], np.tile(curves, (len(alphas), 1)))


def any_utility(vit: Vit) -> UtilityPrior:
    """Assumptions on A(n) before any picture is evaluated: 1 - exp(-(n / t N)^s), from robust to nearly linear.

    When random tokens are kept, the embedded model fits t = 0.1, s = 1, and ViT-Tiny t = 0.37, s = 2.5. Over all
    alphas the best counts spread over the whole range.
    """

    def curve(t: float, s: float) -> Callable[[int], float]:
        return lambda n: -np.expm1(-((n / (t * vit.tokens)) ** s))

    return utility_prior(vit, list(ALPHAS), [curve(t, s) for t, s in CURVES])


def coarse_counts(vit: Vit) -> list[int]:
    """The lowest count, the unpruned one, and the multiples between them of the power of two nearest to N / GRID."""
    counts = all_counts(vit)
    grid = 2 ** round(np.log2(max(vit.tokens / GRID, 1)))
    return [n for n in counts if n % grid == 0 or n in (counts[0], vit.tokens)]


def all_counts(vit: Vit) -> list[int]:
    """Every count in the measured range that a schedule can use."""
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
    room: Room = UNLIMITED,
    used: Collection[int] = (),
    conditions: list[Conditions] | None = None,
    gpu_state: Callable[[], GpuState | None] = lambda: None,
    trunk_ms: Callable[[float], float] | None = None,
) -> tuple[Staircase, Samples]:
    """Measure a staircase: a coarse grid first, then in stages the counts that can still change a choice.

    `open_trunk(n)` gives the trunk at n tokens. `others` holds FIXED and DENSE, and the blocks, last blocks and cuts
    from which the cost of cuts is computed; all are timed in the same rounds. Each stage times a few counts, always
    with the unpruned one, for FEW rounds (`probe_requests` selects them), until no request is left or the probe
    budget is used. With `used`, only the ends of the treads that contain these counts are located. A count is timed
    again until it has `rounds` samples, or together with a new neighbour; one round is enough where `setup` is
    noiseless. `samples` of an interrupted run are continued, and `save` gets all samples after each round.
    `conditions` gets what `gpu_state` says before and after each stage, where it says anything. Where `open_trunk`
    opens only a part of the trunk, `trunk_ms` gives the latency of the trunk from that of the part. Returns the
    staircase and all samples (ms) as measured. Raises EngineError, OutputError.
    """
    samples, conditions = {} if samples is None else samples, [] if conditions is None else conditions
    prior = any_utility(vit)
    everything = all_counts(vit)
    limit = int((1 if exhaustive else SHARE_CONFIRMED if used else SHARE) * rounds * len(everything))
    few = rounds if exhaustive else min(FEW, rounds)
    what = f"{'confirming tread ends' if used else 'measuring the staircase'}, probe"
    stage = max((key.stage for key in samples), default=0)
    counts = [key.tokens[0] for key in samples if key.kind == "trunk" and key.stage == stage]
    counts = counts or (everything if exhaustive else coarse_counts(vit))
    while True:
        before = joined({key: v for key, v in samples.items() if key.stage < stage})
        wanted: dict[SampleKey, Open] = {}
        for done, n in enumerate(counts):
            progress("preparing token counts", done, len(counts))
            wanted[trunk(n)] = open_trunk(n)
        wanted |= {key: opens for key, opens in others.items() if len(before.get(key, ())) < rounds}
        candidates = {key._replace(stage=stage): opens for key, opens in wanted.items()}
        taken = sum(len(v) for key, v in samples.items() if key.kind == "trunk" and key.stage < stage)
        shown = _in_probes(progress, what, taken, len(counts), limit)
        state = gpu_state()
        warmup_ms = 0.0 if setup.noiseless else WARMUP_MS
        interleave(candidates, few, samples, save, shown, room, what, warmup_ms)
        if state is not None and (after := gpu_state()) is not None:
            conditions.append(Conditions(before=state, after=after))
            save(samples)
        whole = of_trunk(joined(samples), trunk_ms)
        staircase = staircase_from_samples(vit, setup, whole, conditions)
        requests = edge_requests(staircase, used) if used else probe_requests(staircase, prior, rounds)
        left = (limit - staircase.probes) // few
        # The ends that a schedule uses are found one by one: side by side the budget ends before any of them.
        most = 1 if setup.noiseless or used else AT_ONCE
        counts = [] if exhaustive else next_counts(vit, requests, left, most, setup.noiseless)
        if requests and not counts and not exhaustive:
            log.info("probe budget used; gaps unresolved: %d (--exhaustive measures every count)", len(requests))
        if not counts and any(len(whole[key]) < rounds for key in others):
            counts = [vit.tokens]
        if not counts:
            return staircase, samples
        stage += 1


def _in_probes(progress: Progress, what: str, taken: int, counts: int, limit: int) -> Progress:
    """A progress that turns the rounds of one stage into probes of the whole staircase, `limit` of them at most."""

    def shown(text: str, done: int, total: int) -> None:
        if text == what:
            done, total = taken + done * counts, max(limit, taken + total * counts)
        progress(text, done, total)

    return shown


def of_trunk(samples: Samples, trunk_ms: Callable[[float], float] | None) -> Samples:
    """Samples in which those of a part of the trunk have become those of the trunk."""
    if trunk_ms is None:
        return samples
    return {key: [trunk_ms(ms) for ms in found] if key.kind == "trunk" else found for key, found in samples.items()}


def joined(samples: Samples) -> Samples:
    """All samples of each candidate (ms), those of later stages scaled to the first stage.

    Within a stage drift of the machine affects all candidates alike. Between stages it is estimated from the
    candidates that were timed again, always including the unpruned trunk: the median of their ratios.
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
    """Token counts to time in the same rounds, and how much utility that can gain at most."""

    worth: float
    counts: tuple[int, ...]


def next_counts(vit: Vit, requests: Sequence[ProbeRequest], room: int, most: int, noiseless: bool) -> list[int]:
    """Counts of the next stage, at most `room`: the `most` best requests, and the unpruned count against drift."""
    chosen: set[int] = set()
    for request in sorted(requests, reverse=True)[:most]:
        more = chosen | {*request.counts} | (set() if noiseless else {vit.tokens})
        if len(more) <= room:
            chosen = more
    return sorted(chosen)


def probe_requests(staircase: Staircase, prior: UtilityPrior, rounds: int) -> list[ProbeRequest]:
    """Probes that could still change which count is best, for any of the utilities.

    Latency never falls with more tokens, so the best possible count in a gap (a, b) is b - 1 tokens at the latency
    of a. If that would beat the best known count by more than TOLERANCE, or if a is itself the best and the end of
    its tread is not yet known, the gap is split. Two counts whose latencies noise cannot separate are timed again
    instead, if a step between them would matter. So are two counts whose intervals do not show which is better.
    """
    points, ends = staircase.points, set(treads(staircase))
    tokens = [p.tokens for p in points]
    top = points[-1].latency.median_ms
    share = np.array([p.latency.median_ms for p in points]) / top
    utility = prior.utility(tokens, share)
    utility[:, [n not in ends for n in tokens]] = -np.inf
    best = utility.max(axis=1)
    winner = len(tokens) - 1 - utility[:, ::-1].argmax(axis=1)  # a tie goes to more tokens
    requests = []
    for index, (a, b) in enumerate(pairwise(points)):
        gain = prior.utility([b.tokens - 1], share[index : index + 1])[:, 0] - best
        matters = (gain > TOLERANCE) | (winner == index)
        if not matters.any():
            continue
        worth = float(gain[matters].max())
        if not exceeds(b.latency, a.latency, staircase.setup.noiseless):
            requests.append(ProbeRequest(worth, _unfinished(rounds, a, b)))
        elif b.tokens - a.tokens > 1:
            requests.append(_halved(worth, a.tokens, b.tokens, staircase.setup))
    low, high = np.array([p.latency.interval_ms for p in points]).T / top
    rows = np.arange(len(winner))
    gains = prior.utility(tokens, low) - prior.utility(tokens, high)[rows, winner][:, None]
    for index, point in enumerate(points):
        row = int(gains[:, index].argmax())
        rival = points[winner[row]]
        if point is not rival and gains[row, index] > TOLERANCE:
            requests.append(ProbeRequest(float(gains[row, index]), _unfinished(rounds, point, rival)))
    return [request for request in requests if request.counts]


def _unfinished(rounds: int, *points: Point) -> tuple[int, ...]:
    """The counts that have fewer than `rounds` samples."""
    return tuple(p.tokens for p in points if len(p.latency.samples_ms) < rounds)


def _halved(worth: float, low: int, high: int, setup: Setup) -> ProbeRequest:
    """A request that splits a gap; its ends are timed again too, because drift since then would look like a step."""
    middle = split(low, high, setup.batch)
    return ProbeRequest(worth, (middle,) if setup.noiseless else (middle, low, high))


def edge_requests(staircase: Staircase, used: Collection[int]) -> list[ProbeRequest]:
    """Probes that locate where the treads of used counts end; the narrowest gaps are worth most."""
    tokens = [p.tokens for p in staircase.points]
    requests = []
    for end in unconfirmed(staircase, used):
        after = tokens[tokens.index(end) + 1]
        requests.append(_halved(1 / (after - end), end, after, staircase.setup))
    return requests


def edge(staircase: Staircase, tokens: int) -> int:
    """The right end of the tread that contains a count: the most tokens for its latency, as far as is measured."""
    return min(n for n in treads(staircase) if n >= tokens)


def confirmed_edges(staircase: Staircase) -> tuple[int, ...]:
    """The confirmed ends of treads: one token more was measured and belongs to the next tread."""
    counts = {p.tokens for p in staircase.points}
    return tuple(n for n in treads(staircase) if n + 1 in counts or n == staircase.vit.tokens)


def unconfirmed(staircase: Staircase, tokens: Iterable[int]) -> tuple[int, ...]:
    """Ends of the treads that contain these counts for which one token more has not been measured."""
    return tuple(sorted({edge(staircase, n) for n in tokens} - {*confirmed_edges(staircase)}))


def on_edges(staircase: Staircase, tokens: Sequence[int]) -> tuple[int, ...]:
    """A schedule (tokens per block) with every count moved to the end of its tread, as far as that is known.

    Where the end is not confirmed, it is the largest count that was measured to be as fast.
    """
    return tuple(edge(staircase, n) for n in tokens)


def split(low: int, high: int, batch: int) -> int:
    """A count strictly between two, near the middle, preferably one at which a tile of a GPU would end.

    Tiles are powers of two and rows are batch · tokens. Where `low` is a multiple of a higher power of two than all
    counts in between, a step right after it is likely. This affects only the order of the probes: measurement
    decides where a tread ends.
    """

    def roundness(n: int) -> int:
        return (n * batch) & -(n * batch)

    quarter, middle = (high - low) // 4, (low + high) / 2
    inner = range(low + max(quarter, 1), high - max(quarter, 1) + 1)
    best = max(inner, key=lambda n: (roundness(n), -abs(n - middle)))
    return low + 1 if roundness(low) > roundness(best) else best

"""The schedule search: cuts in any blocks, token counts at tread ends, lowest loss for a given latency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from heapq import nsmallest

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.staircase import block_ms, unit
from edgeprune.records import Candidate, Fidelity, Progress, Staircase, silent
from edgeprune.scheduling.goals import candidate_of, cut_counts, pareto, single_cut

SAMPLED = 8  # treads at which single cuts of a block are evaluated; losses in between are interpolated
BUCKETS = 200  # of latency up to the limit; partial schedules in the same bucket are compared by loss only
KEPT = 4  # partial schedules per bucket and last count, so that the best ones differ in more than one token
EVALUATED = 48  # schedules within a latency limit whose KL is evaluated
PER_END = 3  # and with `every_end` the best of each number of tokens at the end
STEPS, PER_STEP = 40, 2  # without a limit: steps of latency up to the unpruned one, and schedules per step

Tokens = tuple[int, ...]
Evaluate = Callable[[Tokens, Tokens], Fidelity]  # of a schedule; the second is the one whose activations are kept
Ahead = Callable[[list[tuple[Tokens, Tokens]]], None]  # receives the schedules that `Evaluate` will be asked for


class Search:
    """Dynamic programming over blocks with an additive model of the loss; the best schedules are then evaluated.

    The loss is the KL in nats, or 1 - cosine of embeddings. That of single cuts is evaluated and gives the loss that
    each block adds when it runs on n tokens. With the additive latency model, dynamic programming then finds the
    schedules with the lowest sum of losses. Such sums rank schedules only roughly, so the best of them are evaluated.
    Greedy descent found worse schedules with three to five times the evaluations (docs/benchmarks.md). The search is
    deterministic.
    """

    def __init__(
        self,
        staircase: Staircase,
        method: str,
        fidelity: Evaluate,
        prefix_last: bool = False,
        progress: Progress = silent,
        ahead: Ahead = lambda schedules: None,
        every_end: bool = False,
    ) -> None:
        vit = staircase.vit
        self.staircase, self.method, self.prefix_last = staircase, method, prefix_last
        self.fidelity, self.progress, self.ahead, self.every_end = fidelity, progress, ahead, every_end
        self.levels = cut_counts(staircase)
        self.last = vit.depth - 2 if prefix_last else vit.depth - 1  # the last block that may lose tokens
        self.dense: Tokens = (vit.tokens,) * vit.depth
        self.found: dict[Tokens, Candidate] = {}

    def candidate(self, tokens: Tokens, base: Tokens) -> Candidate:
        """A schedule with its prediction and fidelity; each is evaluated only once."""
        if tokens not in self.found:
            score = self.fidelity(tokens, base)
            self.found[tokens] = candidate_of(self.staircase, self.method, self.prefix_last, tokens, score)
        return self.found[tokens]

    def front(self, limit_ms: float | None = None) -> list[Candidate]:
        """Pareto front, fastest first: most schedules close to `limit_ms`, or over all latencies without a limit.

        The first is the fastest schedule there is, so a limit that it misses is out of reach.
        """
        losses = self.losses()
        plans = sorted({*self.plans(losses, limit_ms), self.fastest()})  # neighbours share their first blocks
        self.ahead([(tokens, tokens) for tokens in plans])
        for done, tokens in enumerate(plans):
            self.progress("evaluating schedules", done, len(plans))
            self.candidate(tokens, tokens)
        self.progress("evaluating schedules", len(plans), len(plans))
        return pareto(list(self.found.values()))

    def losses(self) -> NDArray[np.float64]:
        """Loss that each block adds when run on fewer tokens, (last + 1, levels); exact for single cuts."""
        below = self.levels[:-1]
        sampled = (
            sorted({below[i] for i in np.linspace(0, len(below) - 1, SAMPLED).round().astype(int)}) if below else []
        )
        cuts = [single_cut(self.staircase.vit, b, n) for b in range(self.last + 1) for n in sampled]
        self.ahead([(tokens, self.dense) for tokens in (self.dense, *cuts)])
        self.candidate(self.dense, self.dense)
        single = np.zeros((self.last + 2, len(self.levels)))
        for block in range(self.last + 1):
            roots = []
            for done, tokens in enumerate(sampled):
                self.progress("evaluating single cuts", block * len(sampled) + done, (self.last + 1) * len(sampled))
                loss = self.candidate(single_cut(self.staircase.vit, block, tokens), self.dense).loss
                roots.append(max(loss, 0.0) ** 0.5)  # roughly linear in the number of tokens removed
            single[block] = np.interp(self.levels, [*sampled, self.dense[0]], [*roots, 0.0]) ** 2
        return single[:-1] - single[1:]

    def plans(self, losses: NDArray[np.float64], limit_ms: float | None) -> Iterator[Tokens]:
        """Schedules with the lowest sum of losses: within the limit, or in every step of latency."""
        dense = self.found[self.dense].predicted_ms
        paths = sorted(self._paths(losses, dense if limit_ms is None else limit_ms))
        if limit_ms is not None:
            yield from (tokens for _, _, tokens in paths[:EVALUATED])
            ends = Counter[int]()
            for _, _, tokens in paths if self.every_end else ():
                ends[tokens[-1]] += 1
                if ends[tokens[-1]] <= PER_END:
                    yield tokens
            return
        taken = [0] * (STEPS + 1)
        for _, ms, tokens in paths:
            step = int(STEPS * ms / dense)
            if taken[step] < PER_STEP:
                taken[step] += 1
                yield tokens

    def fastest(self) -> Tokens:
        """The schedule with the lowest predicted latency.

        Mostly one cut to the lowest count, but not where a cut was measured to cost less than nothing.
        """
        inner, final = self._costs()
        paths: dict[int, tuple[float, Tokens]] = {len(self.levels) - 1: (0.0, ())}  # the fastest, by last count
        for block in range(len(self.dense)):
            cost = final if block == len(self.dense) - 1 else inner
            reached: dict[int, list[tuple[float, Tokens]]] = {}
            for a, (ms, tokens) in paths.items():
                for b in range(a + 1) if block <= self.last else (a,):
                    reached.setdefault(b, []).append((ms + cost[a][b], (*tokens, self.levels[b])))
            paths = {b: min(found) for b, found in reached.items()}
        return min(paths.values())[1]

    def _costs(self) -> tuple[list[list[float]], list[list[float]]]:
        """Latency of a block, ms, by the levels entering and leaving; and that of the last block."""
        scale, ends = unit(self.staircase), range(len(self.levels))

        def costs(last: bool) -> list[list[float]]:
            shape = (self.staircase, self.method)
            return [
                [block_ms(*shape, self.levels[a], self.levels[b], last) * scale for b in range(a + 1)] for a in ends
            ]

        return costs(False), costs(self.prefix_last)

    def _paths(self, losses: NDArray[np.float64], limit_ms: float) -> list[tuple[float, float, Tokens]]:
        """The best schedules by bucket of latency and last token count, as (loss, ms, tokens)."""
        levels, depth = self.levels, len(self.dense)
        inner, final = self._costs()
        start = self.staircase.fixed.median_ms * unit(self.staircase)
        states: dict[tuple[int, int], list[tuple[float, float, Tokens]]] = {(len(levels) - 1, 0): [(0.0, start, ())]}
        for block in range(depth):
            cost = final if block == depth - 1 else inner
            reached: dict[tuple[int, int], list[tuple[float, float, Tokens]]] = {}
            for (a, _), paths in states.items():
                for b in range(a + 1) if block <= self.last else (a,):
                    loss = float(losses[block, b]) if block <= self.last else 0.0
                    for lost, ms, tokens in paths:
                        if (total := ms + cost[a][b]) <= limit_ms:
                            place = (b, int(BUCKETS * total / limit_ms))
                            reached.setdefault(place, []).append((lost + loss, total, (*tokens, levels[b])))
            states = {place: nsmallest(KEPT, paths) for place, paths in reached.items()}
        return [path for paths in states.values() for path in paths]

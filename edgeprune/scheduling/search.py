"""The schedule search: cuts in any blocks, counts on treads only, least KL for the latency it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import nsmallest

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.staircase import block_ms, treads, unit
from edgeprune.records import Candidate, Progress, Staircase, silent
from edgeprune.scheduling.goals import Score, candidate_of, pareto, single_cut

SAMPLED = 8  # treads at which a block's single cut is evaluated; between them its loss is interpolated
BUCKETS = 200  # of latency up to the limit: paths that end in one differ in loss alone
KEPT = 4  # paths per bucket and count, so that the best ones differ in more than a token
EVALUATED = 48  # plans within a latency limit whose KL is really taken
STEPS, PER_STEP = 40, 2  # without a limit: plans per step of latency, between nothing and the unpruned model

Tokens = tuple[int, ...]
Fidelity = Callable[[Tokens, Tokens], Score]  # of a schedule, given the one whose streams are to be kept


class Search:
    """Dynamic programming over blocks on an additive model of KL, whose best plans are then evaluated for real.

    KL of single cuts, measured, gives what each block adds by running on n tokens; with the additive latency
    model the best plans over all cuts follow exactly, at the cost of the cuts. Sums of losses rank plans only
    roughly, so the best of them are evaluated. Greedy descent did worse, with look-back no better, at three to
    five times the evaluations (docs/benchmarks.md). All is deterministic.
    """

    def __init__(
        self,
        staircase: Staircase,
        method: str,
        fidelity: Fidelity,
        prefix_last: bool = False,
        progress: Progress = silent,
    ) -> None:
        vit = staircase.vit
        self.staircase, self.method, self.prefix_last = staircase, method, prefix_last
        self.fidelity, self.progress = fidelity, progress
        self.levels = [n for n in treads(staircase) if n > vit.prefix + 1]
        self.last = vit.depth - 2 if prefix_last else vit.depth - 1  # the last block that may lose tokens
        self.dense: Tokens = (vit.tokens,) * vit.depth
        self.found: dict[Tokens, Candidate] = {}

    def candidate(self, tokens: Tokens, base: Tokens) -> Candidate:
        """A schedule with its prediction and fidelity, evaluated once."""
        if tokens not in self.found:
            score = self.fidelity(tokens, base)
            self.found[tokens] = candidate_of(self.staircase, self.method, self.prefix_last, tokens, score)
        return self.found[tokens]

    def front(self, limit_ms: float | None = None) -> list[Candidate]:
        """Pareto front, fastest first: densest just within `limit_ms`, or over all latencies without a limit."""
        losses = self.losses()
        plans = sorted(self.plans(losses, limit_ms))  # neighbours share their first blocks
        for done, tokens in enumerate(plans):
            self.progress("evaluating schedules", done, len(plans))
            self.candidate(tokens, tokens)
        self.progress("evaluating schedules", len(plans), len(plans))
        return pareto(list(self.found.values()))

    def losses(self) -> NDArray[np.float64]:
        """(last + 1, levels) nats that a block adds by running on fewer tokens; sums are exact for single cuts."""
        self.candidate(self.dense, self.dense)
        below = self.levels[:-1]
        sampled = (
            sorted({below[i] for i in np.linspace(0, len(below) - 1, SAMPLED).round().astype(int)}) if below else []
        )
        single = np.zeros((self.last + 2, len(self.levels)))
        for block in range(self.last + 1):
            roots = []
            for done, tokens in enumerate(sampled):
                self.progress("single cuts", block * len(sampled) + done, (self.last + 1) * len(sampled))
                kl = self.candidate(single_cut(self.staircase.vit, block, tokens), self.dense).kl
                roots.append(max(kl, 0.0) ** 0.5)  # grows about evenly with the tokens lost
            single[block] = np.interp(self.levels, [*sampled, self.dense[0]], [*roots, 0.0]) ** 2
        return single[:-1] - single[1:]

    def plans(self, losses: NDArray[np.float64], limit_ms: float | None) -> Iterator[Tokens]:
        """Schedules with the least sum of losses: within the limit, or in every step of latency."""
        dense = self.found[self.dense].predicted_ms
        paths = sorted(self._paths(losses, dense if limit_ms is None else limit_ms))
        if limit_ms is not None:
            yield from (tokens for _, _, tokens in paths[:EVALUATED])
            return
        taken = [0] * (STEPS + 1)
        for _, ms, tokens in paths:
            step = int(STEPS * ms / dense)
            if taken[step] < PER_STEP:
                taken[step] += 1
                yield tokens

    def _paths(self, losses: NDArray[np.float64], limit_ms: float) -> list[tuple[float, float, Tokens]]:
        """(loss, ms, tokens) of the best schedules by bucket of latency and last count."""
        levels, depth, scale = self.levels, len(self.dense), unit(self.staircase)
        ends = range(len(levels))

        def costs(last: bool) -> list[list[float]]:
            shape = (self.staircase, self.method)
            return [[block_ms(*shape, levels[a], levels[b], last) * scale for b in range(a + 1)] for a in ends]

        inner, final = costs(False), costs(self.prefix_last)
        start = self.staircase.fixed.median_ms * scale
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

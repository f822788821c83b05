"""The schedule search: cuts in any blocks, counts on treads only, least KL for the latency it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from edgeprune.records import Progress, Staircase, silent
from edgeprune.schedule import Candidate, Score, pareto
from edgeprune.staircase import predict_ms, treads

STRIDES = (1, 2, 4)  # treads that one move may go down
WORST_KL = 1.5  # nats; a schedule that lost this much is of no use to anyone
SLACK = 0.95  # a polished schedule may come out at most this much faster than asked
ROUNDS = 8  # of polishing at most
AROUND = 32  # schedules that a round evaluates, those that use the budget best

Tokens = tuple[int, ...]
Fidelity = Callable[[Tokens, Tokens], Score]  # of a schedule, given the one it was derived from


class Search:
    """Walks from the unpruned model down, each step the one that costs the least KL per ms it saves.

    A move lowers one block to a tread further down, and all later blocks with it where they were higher;
    its gain is predicted with the cost of the cut in it, so few deep cuts win over many shallow ones where
    cuts are dear. KL of a move only grows as others are taken, so a move's last known loss is a lower bound
    and only those that look best are evaluated again (lazy greedy). `polish` looks back: around one point it
    trades tokens between cuts, shifts, adds and removes cuts, at no more latency. All is deterministic.
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
            self.found[tokens] = Candidate(tokens, self.predict(tokens), score.kl, score.agreement, score.top1)
        return self.found[tokens]

    def predict(self, tokens: Tokens) -> float:
        """Latency of the additive model, ms."""
        return predict_ms(self.staircase, tokens, self.method, self.prefix_last)

    def front(self, limit_ms: float | None = None) -> list[Candidate]:
        """Pareto front from the unpruned model down to `limit_ms`, or until KL exceeds WORST_KL."""
        here = self.candidate(self.dense, self.dense)
        start = here.predicted_ms
        floor = limit_ms if limit_ms is not None else 0.0
        known: dict[tuple[int, int], float] = {}  # last loss of a move (block, stride), nats
        while here.predicted_ms > floor and (limit_ms is not None or here.kl < WORST_KL):
            if limit_ms is not None:
                gone = (start - here.predicted_ms) / max(start - floor, 1e-9)
                self.progress("search", round(100 * min(gone, 1)), 100)
            best = self._best_move(here, known)
            if best is None:
                break
            here = best
        self.progress("search", 100, 100)
        return pareto(list(self.found.values()))

    def _best_move(self, here: Candidate, known: dict[tuple[int, int], float]) -> Candidate | None:
        """The move with the least KL per ms saved, evaluating as few as the lower bounds allow."""
        moves = {}
        for block in range(self.last + 1):
            for stride in STRIDES:
                tokens = self.lowered(here.tokens, block, stride)
                if tokens is not None and (gain := here.predicted_ms - self.predict(tokens)) > 0:
                    moves[block, stride] = (tokens, gain)
        fresh: set[tuple[int, int]] = set()
        while moves:
            price = {m: known.get(m, 0.0) / gain for m, (_, gain) in moves.items()}
            move = min(price, key=lambda m: (price[m], -moves[m][1]))
            tokens, _ = moves[move]
            if move in fresh:
                return self.candidate(tokens, here.tokens)
            known[move] = max(self.candidate(tokens, here.tokens).kl - here.kl, 1e-6)
            fresh.add(move)
        return None

    def lowered(self, tokens: Tokens, block: int, stride: int) -> Tokens | None:
        """`tokens` with `block` lowered by `stride` treads and later blocks no higher; None below the last."""
        below = [n for n in self.levels if n < tokens[block]]
        if len(below) < stride:
            return None
        level = below[-stride]
        return (*tokens[:block], *(min(n, level) for n in tokens[block:]))

    def polish(self, start: Candidate, limit_ms: float) -> Candidate:
        """The best schedule around `start` that is predicted within `limit_ms`."""
        here = start
        for index in range(ROUNDS):
            cost = {t: self.predict(t) for t in self.neighbours(here.tokens)}
            within = [t for t in cost if SLACK * limit_ms <= cost[t] <= limit_ms]
            around = sorted(within, key=lambda t: -cost[t])[:AROUND]
            best = here
            for done, tokens in enumerate(around):
                self.progress(f"polishing, round {index + 1}", done, len(around))
                other = self.candidate(tokens, here.tokens)
                if other.kl < best.kl or best.predicted_ms > limit_ms:
                    best = other
            if best is here:
                break
            here = best
        return here

    def neighbours(self, tokens: Tokens) -> Iterator[Tokens]:
        """Schedules one exchange away: cuts moved, added, removed, tokens traded between them."""
        seen = {tokens}
        cuts = self._cuts(tokens)
        variants: list[list[tuple[int, int]]] = [cuts]
        for i, (block, level) in enumerate(cuts):
            rest = cuts[:i] + cuts[i + 1 :]
            variants += [sorted([*rest, (other, level)]) for other in (block - 1, block + 1)]
            variants.append(rest)
        for block in set(range(self.last + 1)) - {b for b, _ in cuts}:
            floor = next((level for b, level in cuts if b > block), 0)
            between = [n for n in self.levels if floor < n < tokens[block]]
            for level in {between[-1], between[len(between) // 2]} if between else ():
                variants.append(sorted([*cuts, (block, level)]))
        for variant in variants:
            for traded in self._trades(variant):
                built = self._tokens(traded)
                if built is not None and built not in seen:
                    seen.add(built)
                    yield built

    def _trades(self, cuts: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """The cuts themselves, with one a tread higher or lower, and with one higher and another lower."""
        yield list(cuts)
        for i in range(len(cuts)):
            for up in (1, -1):
                first = self._shifted(cuts, i, up)
                if first is None:
                    continue
                yield first
                for k in range(len(cuts)):
                    if up == 1 and k != i and (second := self._shifted(first, k, -1)) is not None:
                        yield second

    def _shifted(self, cuts: Sequence[tuple[int, int]], index: int, by: int) -> list[tuple[int, int]] | None:
        block, level = cuts[index]
        place = self.levels.index(level) + by
        if not 0 <= place < len(self.levels):
            return None
        return [*cuts[:index], (block, self.levels[place]), *cuts[index + 1 :]]

    def _cuts(self, tokens: Tokens) -> list[tuple[int, int]]:
        before = (self.dense[0], *tokens)
        return [(i, n) for i, n in enumerate(tokens) if n < before[i]]

    def _tokens(self, cuts: Sequence[tuple[int, int]]) -> Tokens | None:
        """Cuts as tokens per block; None where blocks coincide, leave the model or levels do not fall."""
        blocks, levels = [b for b, _ in cuts], [self.dense[0], *(n for _, n in cuts)]
        if len(set(blocks)) < len(blocks) or any(not 0 <= b <= self.last for b in blocks):
            return None
        if any(a <= b for a, b in pairwise(levels)):
            return None
        tokens, current = [], self.dense[0]
        for block in range(len(self.dense)):
            current = dict(cuts).get(block, current)
            tokens.append(current)
        return tuple(tokens)

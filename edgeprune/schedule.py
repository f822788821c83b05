"""Schedules by rule: the paper's utility, the published shapes, and what a goal picks from a Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import NamedTuple, Protocol

from edgeprune.errors import ScheduleError
from edgeprune.records import Candidate, Progress, Schedule, Staircase, Vit, encode, sha256_bytes, silent
from edgeprune.staircase import predict_ms, treads, trunk_ms

PAPER_BLOCK = 3  # the paper prunes in block 3 (sec. 4)


class Score(Protocol):
    """What a schedule keeps of the unpruned model."""

    @property
    def kl(self) -> float: ...
    @property
    def agreement(self) -> float: ...
    @property
    def top1(self) -> float | None: ...


class Goal(NamedTuple):
    """What is asked for; exactly one field is set. max_drop is in points of top-1."""

    alpha: float | None = None
    speedup: float | None = None
    budget_ms: float | None = None
    max_drop: float | None = None

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g} times faster or more"
        if self.budget_ms is not None:
            return f"{self.budget_ms:g} ms or less"
        if self.max_drop is not None:
            return f"at most {self.max_drop:g} points of top-1 lost"
        return f"the best trade-off at alpha {0.5 if self.alpha is None else self.alpha:g}"

    def limit_ms(self, dense_ms: float) -> float | None:
        """The latency this goal allows, ms; None where it limits something else."""
        if self.speedup is not None:
            return dense_ms / self.speedup
        return self.budget_ms


def single_cut(vit: Vit, block: int, tokens: int) -> tuple[int, ...]:
    """All tokens before `block`, `tokens` from it on."""
    return (vit.tokens,) * block + (tokens,) * (vit.depth - block)


def paper_schedule(
    staircase: Staircase,
    method: str,
    goal: Goal,
    accuracy: Callable[[int], float],
    block: int = PAPER_BLOCK,
    prefix_last: bool = False,
    progress: Progress = silent,
) -> Schedule:
    """POMT's schedule (arXiv 2407.05941, sec. 3): one cut, in `block`.

    U(n) = alpha (1 - L(n) / L_max) + (1 - alpha) A(n) / A_max over the treads, where `accuracy` gives
    A(n) in percent. With a latency goal instead of alpha, the most tokens that meet it. The paper takes
    any n; here only treads are candidates, and a tie goes to more tokens. Raises ScheduleError.
    """
    vit = staircase.vit
    end = vit.depth - 2 if prefix_last else vit.depth - 1
    if not 0 <= block <= end:
        raise ScheduleError(f"block {block} cannot lose tokens: {vit.name} can be cut in blocks 0 to {end}")
    counts = [n for n in treads(staircase) if n > vit.prefix + 1]
    if goal.max_drop is not None:
        raise ScheduleError("--max-drop needs --policy search: the paper's policy has no accuracy bound")
    limit = goal.limit_ms(staircase.dense.median_ms)
    if limit is not None:
        cost = {n: predict_ms(staircase, single_cut(vit, block, n), method, prefix_last) for n in counts}
        fits = [n for n in counts if cost[n] <= limit]
        if not fits:
            raise impossible(limit, staircase, cost[counts[0]], method)
        best = max(fits)
    else:
        alpha = 0.5 if goal.alpha is None else goal.alpha
        gained = {}
        for done, n in enumerate(counts):
            progress("random-drop accuracy", done, len(counts))
            gained[n] = accuracy(n)
        progress("random-drop accuracy", len(counts), len(counts))
        slowest, most = trunk_ms(staircase, vit.tokens), max(gained.values())
        best = max(
            counts,
            key=lambda n: (
                alpha * (1 - trunk_ms(staircase, n) / slowest) + (1 - alpha) * gained[n] / max(most, 1e-9),
                n,
            ),
        )
    return finished(staircase, method, "paper", single_cut(vit, block, best), prefix_last)


def published_shapes(vit: Vit, method: str, prefix_last: bool = False) -> Iterator[tuple[int, ...]]:
    """The schedules of a baseline as its authors shape them, from gentle to strong.

    pomt: one cut in block 3 (arXiv 2407.05941, sec. 4). evit: the same keep rate in blocks 3, 6 and 9 of 12
    (arXiv 2202.07800, sec. 4), one fused token each. tome, topk: equally many tokens less in every block
    (arXiv 2210.09461, sec. 3). Yields nothing for a method without a published shape.
    """
    body, last = vit.tokens - vit.prefix, vit.depth - 1 if prefix_last else vit.depth
    if method == "pomt":
        for n in range(vit.tokens - 1, vit.prefix + 1, -1):
            yield single_cut(vit, PAPER_BLOCK, n)
    elif method == "evit":
        quarters = {vit.depth // 4, vit.depth // 2, 3 * vit.depth // 4}
        for percent in range(99, 4, -1):
            tokens, current = [], vit.tokens
            for block in range(vit.depth):
                if block in quarters:
                    left = ceil((current - vit.prefix) * percent / 100)
                    current = min(current, vit.prefix + max(left, 1) + 1)
                tokens.append(current)
            yield tuple(tokens)
    elif method in ("tome", "topk"):
        for less in range(1, body):
            lowest = vit.prefix + 2
            yield tuple(max(vit.tokens - less * min(block + 1, last), lowest) for block in range(vit.depth))


def published_schedule(
    staircase: Staircase, method: str, limit_ms: float, prefix_last: bool = False
) -> Schedule | None:
    """The gentlest schedule of the published shape that is predicted within a latency; None without a shape.

    Raises ScheduleError where none is.
    """
    best = float("inf")
    for tokens in published_shapes(staircase.vit, method, prefix_last):
        cost = predict_ms(staircase, tokens, method, prefix_last)
        if cost <= limit_ms:
            return finished(staircase, method, "published", tokens, prefix_last)
        best = min(best, cost)
    if best < float("inf"):
        raise impossible(limit_ms, staircase, best, method)
    return None


def finished(
    staircase: Staircase, method: str, policy: str, tokens: Sequence[int], prefix_last: bool = False
) -> Schedule:
    """A schedule record with its prediction and the staircase it rests on."""
    return Schedule(
        vit=staircase.vit,
        method=method,
        policy=policy,
        tokens=tuple(tokens),
        prefix_last=prefix_last,
        predicted_ms=predict_ms(staircase, tokens, method, prefix_last),
        staircase_sha256=sha256_bytes(encode(staircase)),
    )


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both predicted latency and KL, fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.predicted_ms, c.kl)):
        if not front or candidate.kl < front[-1].kl:
            front.append(candidate)
    return front


def choose(
    front: Sequence[Candidate],
    staircase: Staircase,
    method: str,
    goal: Goal,
    drop: Callable[[Sequence[int]], float],
) -> Candidate:
    """The candidate of a front (fastest first) that a goal asks for.

    Latency goals: the lowest KL within the limit. alpha: the highest utility, with agreement for A.
    max_drop: the fastest whose `drop` (points of top-1, or of agreement without labels) is
    within it, by bisection. Raises ScheduleError with what is possible.
    """
    limit = goal.limit_ms(staircase.dense.median_ms)
    if limit is not None:
        fits = [c for c in front if c.predicted_ms <= limit]
        if not fits:
            raise impossible(limit, staircase, min(c.predicted_ms for c in front), method)
        return min(fits, key=lambda c: c.kl)
    if goal.max_drop is not None:
        low, high = 0, len(front) - 1  # front[-1] has the lowest KL: nearest to the unpruned model
        if drop(front[high].tokens) > goal.max_drop:
            raise ScheduleError(f"no schedule of {method} loses at most {goal.max_drop} points: raise --max-drop")
        while low < high:
            middle = (low + high) // 2
            if drop(front[middle].tokens) <= goal.max_drop:
                high = middle
            else:
                low = middle + 1
        return front[high]
    alpha = 0.5 if goal.alpha is None else goal.alpha
    most = max(c.agreement for c in front)
    dense = staircase.dense.median_ms
    return max(
        front,
        key=lambda c: alpha * (1 - c.predicted_ms / dense) + (1 - alpha) * c.agreement / max(most, 1e-9),
    )


def impossible(limit: float, staircase: Staircase, best: float, method: str) -> ScheduleError:
    """What to say where even the fastest schedule, predicted to take `best` ms, misses the limit (ms)."""
    dense = staircase.dense.median_ms
    return ScheduleError(
        f"{limit:.3g} ms cannot be met: {staircase.vit.name} takes {dense:.3g} ms unpruned and about "
        f"{best:.3g} ms at best with {method} ({dense / best:.2f}x): ask for less"
    )

"""Staircase and fidelity to tokens per block: the paper's utility, and a search over cuts on treads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from edgeprune.errors import ScheduleError
from edgeprune.records import Progress, Schedule, Staircase, encode, sha256_bytes, silent
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


class Candidate(NamedTuple):
    """A schedule with its predicted latency (ms) and its fidelity on the calibration images."""

    tokens: tuple[int, ...]
    predicted_ms: float
    kl: float
    agreement: float
    top1: float | None


class Goal(NamedTuple):
    """What is asked for; exactly one field is set. max_drop is in points of top-1."""

    alpha: float | None = None
    speedup: float | None = None
    budget_ms: float | None = None
    max_drop: float | None = None

    def limit_ms(self, dense_ms: float) -> float | None:
        """The latency this goal allows, ms; None where it limits something else."""
        if self.speedup is not None:
            return dense_ms / self.speedup
        return self.budget_ms


def single_cut(staircase: Staircase, block: int, tokens: int) -> tuple[int, ...]:
    """All tokens before `block`, `tokens` from it on."""
    depth = staircase.vit.depth
    return (staircase.vit.tokens,) * block + (tokens,) * (depth - block)


def paper_schedule(
    staircase: Staircase,
    method: str,
    goal: Goal,
    accuracy: Callable[[int], float],
    block: int = PAPER_BLOCK,
    progress: Progress = silent,
) -> Schedule:
    """POMT's schedule (arXiv 2407.05941, sec. 3): one cut, in `block`.

    U(n) = alpha (1 - L(n) / L_max) + (1 - alpha) A(n) / A_max over the treads, where `accuracy` gives
    A(n) in percent. With a latency goal instead of alpha, the most tokens that meet it. The paper takes
    any n; here only treads are candidates, and a tie goes to more tokens. Raises ScheduleError.
    """
    vit = staircase.vit
    if not 0 <= block < vit.depth:
        raise ScheduleError(f"block {block} does not exist: {vit.name} has blocks 0 to {vit.depth - 1}")
    counts = [n for n in treads(staircase) if n > vit.prefix + 1]
    if goal.max_drop is not None:
        raise ScheduleError("--max-drop needs --policy search: the paper's policy has no accuracy bound")
    limit = goal.limit_ms(staircase.dense.median_ms)
    if limit is not None:
        fits = [n for n in counts if predict_ms(staircase, single_cut(staircase, block, n), method) <= limit]
        if not fits:
            raise _impossible(limit, staircase, single_cut(staircase, block, counts[0]), method)
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
    return finished(staircase, method, "paper", single_cut(staircase, block, best))


def finished(staircase: Staircase, method: str, policy: str, tokens: Sequence[int]) -> Schedule:
    """A schedule record with its prediction and the staircase it rests on."""
    return Schedule(
        vit=staircase.vit,
        method=method,
        policy=policy,
        tokens=tuple(tokens),
        predicted_ms=predict_ms(staircase, tokens, method),
        staircase_sha256=sha256_bytes(encode(staircase)),
    )


def single_cut_front(
    staircase: Staircase,
    method: str,
    fidelity: Callable[[Sequence[int]], Score],
    goal: Goal,
    progress: Progress = silent,
) -> list[Candidate]:
    """Candidates with one cut at any block to any tread, those that a latency goal rules out left unscored.

    With a latency goal only the most tokens that meet it are scored for each block: fewer tokens in the
    same block cannot keep more.
    """
    vit = staircase.vit
    limit = goal.limit_ms(staircase.dense.median_ms)
    todo: list[tuple[int, ...]] = [(vit.tokens,) * vit.depth]
    ends = [n for n in treads(staircase) if vit.prefix + 1 < n < vit.tokens]
    for block in range(vit.depth):
        options = [single_cut(staircase, block, n) for n in ends]
        if limit is not None:
            fits = [t for t in options if predict_ms(staircase, t, method) <= limit]
            options = fits[-1:]
        todo += options
    front = []
    for done, tokens in enumerate(todo):
        progress("schedules", done, len(todo))
        score = fidelity(tokens)
        predicted = predict_ms(staircase, tokens, method)
        front.append(Candidate(tokens, predicted, score.kl, score.agreement, score.top1))
    progress("schedules", len(todo), len(todo))
    return pareto(front)


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
    max_drop: the fastest whose `drop` (points of top-1, or of agreement without labels, on all images) is
    within it, by bisection. Raises ScheduleError with what is possible.
    """
    limit = goal.limit_ms(staircase.dense.median_ms)
    if limit is not None:
        fits = [c for c in front if c.predicted_ms <= limit]
        if not fits:
            fastest = single_cut(staircase, 0, treads(staircase)[0])
            raise _impossible(limit, staircase, fastest, method)
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


def _impossible(limit: float, staircase: Staircase, fastest: Sequence[int], method: str) -> ScheduleError:
    """What to say where even the fastest schedule misses the limit."""
    dense = staircase.dense.median_ms
    best = predict_ms(staircase, fastest, method)
    return ScheduleError(
        f"{limit:.3g} ms cannot be met: {staircase.vit.name} takes {dense:.3g} ms unpruned and about "
        f"{best:.3g} ms at best with {method} ({dense / best:.2f}x): ask for less"
    )

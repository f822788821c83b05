"""Goals of a schedule, the Pareto front of candidates, and which of them meets a goal best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from edgeprune.errors import InputError, ScheduleError
from edgeprune.io import encode, sha256_bytes
from edgeprune.latency.staircase import predict_ms, treads
from edgeprune.records import Candidate, DenseFidelity, Fidelity, Schedule, Staircase, Vit
from edgeprune.scheduling import DEFAULT_ALPHA
from edgeprune.stats import ROUNDING

LIMITS = {  # smallest and largest value of a goal
    "alpha": (0, 1), "speedup": (1, 1e6), "budget_ms": (1e-6, 1e9), "max_drop": (0, 1e9), "min_cosine": (0, 1),
    "max_error": (0, 1e9),
}  # fmt: skip


class Goal(NamedTuple):
    """The goal of a schedule; at most one field is set (`check`). Without any, alpha is DEFAULT_ALPHA.

    alpha: weight of latency in the utility, 0 to 1. speedup: factor of at least 1. budget_ms: latency of one
    inference. max_drop: points of top-1 that may be lost, of agreement where there are no labels. min_cosine: least
    mean cosine to the unpruned embeddings, for models that embed. max_error: largest relative error, for dense
    features.
    """

    alpha: float | None = None
    speedup: float | None = None
    budget_ms: float | None = None
    max_drop: float | None = None
    min_cosine: float | None = None
    max_error: float | None = None

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"at least {self.speedup:g} times faster"
        if self.budget_ms is not None:
            return f"at most {self.budget_ms:g} ms"
        if self.max_drop is not None:
            return f"at most {self.max_drop:g} points of top-1 lost"
        if self.min_cosine is not None:
            return f"a mean cosine of at least {self.min_cosine:g}"
        if self.max_error is not None:
            return f"a relative error of at most {self.max_error:g}"
        return f"best trade-off at alpha {self.latency_weight:g}"

    def check(self) -> None:
        """Raise InputError for several goals at once, and for a value out of range."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are {len(given)} goals: set only one of them")
        for name, value in given.items():
            low, high = LIMITS[name]
            if not low <= value <= high:
                raise InputError(f"goal {name} = {value:g} is out of range: use {low:g} to {high:g}")

    @property
    def latency_weight(self) -> float:
        """Weight of latency in the utility, 0 to 1."""
        return DEFAULT_ALPHA if self.alpha is None else self.alpha

    @property
    def limits_latency(self) -> bool:
        """Is it a speed-up or a latency budget?"""
        return self.speedup is not None or self.budget_ms is not None

    @property
    def limits_fidelity(self) -> bool:
        """Is it a bound on the points lost, on the cosine of embeddings or on the error of dense features?"""
        return self.max_drop is not None or self.min_cosine is not None or self.max_error is not None

    def kept_by(self, found: Candidate | None) -> bool:
        """Is a candidate within a bound on the cosine or the error? True for goals without one."""
        if self.min_cosine is not None:
            return found is not None and found.cosine is not None and found.cosine >= self.min_cosine
        if self.max_error is not None:
            return found is not None and found.error is not None and found.error <= self.max_error
        return True

    def utility(self, latency: float, accuracy: float) -> float:
        """U = alpha (1 - L / L_max) + (1 - alpha) A / A_max from the two ratios (arXiv 2407.05941, sec. 3)."""
        return self.latency_weight * (1 - latency) + (1 - self.latency_weight) * accuracy

    def limit_ms(self, dense_ms: float) -> float | None:
        """The largest latency this goal allows, ms, for an unpruned latency of `dense_ms`; None if it limits none."""
        if self.speedup is not None:
            return dense_ms / self.speedup
        return self.budget_ms


def single_cut(vit: Vit, block: int, tokens: int) -> tuple[int, ...]:
    """The schedule with one cut: all tokens before `block`, `tokens` from it on."""
    return (vit.tokens,) * block + (tokens,) * (vit.depth - block)


def cut_counts(staircase: Staircase) -> list[int]:
    """The token counts that a cut may leave, and the whole count: the tread ends above two patches.

    Raises ScheduleError for a model with one patch.
    """
    vit = staircase.vit
    if vit.tokens <= vit.prefix + 1:
        raise ScheduleError(f"{vit.name} has one patch, so none can be removed: choose another model or size")
    return [n for n in treads(staircase) if n > vit.prefix + 1]


def finished(
    staircase: Staircase, method: str, policy: str, tokens: Sequence[int], prefix_last: bool = False
) -> Schedule:
    """A schedule record with its predicted latency and the hash of the staircase."""
    return Schedule(
        vit=staircase.vit,
        method=method,
        policy=policy,
        tokens=tuple(tokens),
        prefix_last=prefix_last,
        predicted_ms=predict_ms(staircase, tokens, method, prefix_last),
        staircase_sha256=sha256_bytes(encode(staircase)),
    )


def candidate_of(
    staircase: Staircase, method: str, prefix_last: bool, tokens: Sequence[int], score: Fidelity
) -> Candidate:
    """A schedule with its prediction and its fidelity."""
    predicted = predict_ms(staircase, tokens, method, prefix_last)
    error = score.error if isinstance(score, DenseFidelity) else None
    return Candidate(tuple(tokens), predicted, score.kl, score.agreement, score.top1, score.cosine, error)


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in both predicted latency and loss (KL), fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.predicted_ms, c.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


def choose(
    front: Sequence[Candidate],
    staircase: Staircase,
    method: str,
    goal: Goal,
    drop: Callable[[tuple[int, ...]], float],
) -> Candidate:
    """The candidate of a front (fastest first) that meets a goal best.

    Latency goals: the lowest loss within the limit. alpha: the highest utility, with agreement for A. max_drop: the
    fastest whose `drop` (points of top-1, or of agreement without labels) is within the limit, as is that of all
    slower ones. min_cosine and max_error: the fastest within the bound.
    Raises ScheduleError, which says what is possible, where no candidate meets the goal.
    """
    limit = goal.limit_ms(staircase.dense.median_ms)
    if limit is not None:
        fits = [c for c in front if c.predicted_ms <= limit]
        if not fits:
            raise impossible(limit, staircase, min(c.predicted_ms for c in front), method)
        return min(fits, key=lambda c: c.loss)
    if goal.max_drop is not None:
        # From the slowest on: the fastest that passes by itself would often be one that was lucky on few pictures.
        most = goal.max_drop + ROUNDING
        near = list(takewhile(lambda c: drop(c.tokens) <= most, reversed(front)))
        if not near:
            raise ScheduleError(
                f"every schedule of {method} loses more than {goal.max_drop} points: raise --max-drop"
            )
        return near[-1]
    if goal.limits_fidelity:
        near = [c for c in front if goal.kept_by(c)]
        if not near and goal.max_error is not None:
            raise ScheduleError(
                f"no schedule of {method} has a relative error of {goal.max_error:g} or less: raise --max-error"
            )
        if not near:
            raise ScheduleError(
                f"no schedule of {method} has a mean cosine of {goal.min_cosine:g}, the best has "
                f"{1 - front[-1].loss:.4f}: lower --min-cosine"
            )
        return near[0]
    most = max(c.accuracy for c in front)
    dense = staircase.dense.median_ms
    return max(front, key=lambda c: goal.utility(c.predicted_ms / dense, c.accuracy / max(most, 1e-9)))


def impossible(limit: float, staircase: Staircase, best: float, method: str) -> ScheduleError:
    """The error for a latency limit (ms) that even the fastest schedule, predicted at `best` ms, cannot meet."""
    dense = staircase.dense.median_ms
    return ScheduleError(
        f"{limit:.3g} ms cannot be met: {staircase.vit.name} takes {dense:.3g} ms unpruned and about "
        f"{best:.3g} ms at best with {method} ({dense / best:.2f}x): relax --speedup or --budget-ms"
    )

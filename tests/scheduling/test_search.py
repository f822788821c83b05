"""The search over cuts: what it returns is valid, within the limit, and near an exhaustive optimum."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations_with_replacement, pairwise

import msgspec
import pytest

from edgeprune.errors import ScheduleError
from edgeprune.latency.staircase import predict_ms
from edgeprune.records import Candidate, ClassFidelity, CutCost, LastShare, Staircase, check_tokens
from edgeprune.scheduling.goals import Goal, choose
from edgeprune.scheduling.search import Search, Tokens

LEVELS = (16, 24, 32, 40, 48, 56, 64)


class Model:
    """KL grows with the square of the share lost in each block, more in early blocks; counts evaluations."""

    def __init__(self, depth: int) -> None:
        self.weights = [1.0 / (1 + block) ** 2 for block in range(depth)]
        self.asked: list[tuple[Tokens, Tokens]] = []

    def kl(self, tokens: Tokens) -> float:
        before, total = 64, 0.0
        for weight, count in zip(self.weights, tokens, strict=True):
            total += weight * ((before - count) / before) ** 2 * 4
            before = count
        return total

    def __call__(self, tokens: Tokens, base: Tokens) -> ClassFidelity:
        self.asked.append((tokens, base))
        return ClassFidelity(kl=self.kl(tokens), agreement=100 - 10 * self.kl(tokens))


@pytest.fixture
def staircase(make_staircase: Callable[..., Staircase], make_vit: Callable[..., object]) -> Staircase:
    vit = make_vit(depth=5, tokens=64)
    return make_staircase({n: n / 4 for n in LEVELS}, vit=vit, last=(LastShare(tokens=64, share=0.5),))


def within(front: list[Candidate], limit: float) -> Candidate:
    """What a latency goal picks."""
    return min((c for c in front if c.predicted_ms <= limit), key=lambda c: c.kl)


def every_schedule(depth: int, last: int) -> list[Tokens]:
    """All schedules on the treads whose blocks after `last` lose nothing."""
    falling = [tuple(sorted(c, reverse=True)) for c in combinations_with_replacement(LEVELS, last + 1)]
    return [(*head, *([head[-1]] * (depth - last - 1))) for head in falling]


@pytest.mark.parametrize("prefix_last", [False, True])
@pytest.mark.parametrize("speedup", [1.2, 1.5, 2.0])
def test_choice_is_near_the_optimum(staircase: Staircase, speedup: float, prefix_last: bool) -> None:
    model = Model(5)
    limit = staircase.dense.median_ms / speedup
    best = within(Search(staircase, "fold", model, prefix_last).front(limit), limit)
    check_tokens(best.tokens, staircase.vit, prefix_last)
    every = every_schedule(5, 3 if prefix_last else 4)
    optimum = min(model.kl(t) for t in every if predict_ms(staircase, t, "fold", prefix_last) <= limit)
    assert optimum <= best.kl <= 1.1 * optimum
    assert len({t for t, _ in model.asked}) == len(model.asked) < len(every) * 0.9


@pytest.mark.parametrize("prefix_last", [False, True])
def test_where_losses_add_up_the_choice_is_the_optimum(staircase: Staircase, prefix_last: bool) -> None:
    """On levels no more than the sampled ones the losses are exact, and so is dynamic programming."""
    price = {n: ((64 - n) / 64) ** 2 for n in LEVELS}

    def additive(tokens: Tokens, base: Tokens) -> ClassFidelity:
        kl = sum(price[n] / (1 + block) for block, n in enumerate(tokens))
        return ClassFidelity(kl=kl, agreement=100.0)

    limit = staircase.dense.median_ms / 1.7
    cost = (CutCost(tokens_in=64, tokens_out=32, cost_ms=0.3),)
    priced = msgspec.structs.replace(staircase, cuts={"fold": cost})
    found = within(Search(priced, "fold", additive, prefix_last).front(limit), limit)
    every = every_schedule(5, 3 if prefix_last else 4)
    fits = [t for t in every if predict_ms(priced, t, "fold", prefix_last) <= limit]
    assert found.kl == pytest.approx(min(additive(t, t).kl for t in fits))


def test_for_recovery_schedules_with_every_count_at_the_end_are_evaluated(
    staircase: Staircase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.scheduling.search.EVALUATED", 1)
    limit, ends = staircase.dense.median_ms / 1.5, []
    for every_end in (False, True):
        search = Search(staircase, "fold", Model(5), every_end=every_end)
        search.front(limit)
        several = [t for t, c in search.found.items() if len({*t, 64}) > 2 and c.predicted_ms <= limit]
        ends.append({t[-1] for t in several})
    assert len(ends[0]) == 1 and {16, 24, 32} <= ends[1]


def test_without_a_limit_the_front_covers_all_latencies(staircase: Staircase) -> None:
    front = Search(staircase, "fold", Model(5)).front()
    times = [c.predicted_ms for c in front]
    lowest = predict_ms(staircase, (16,) * 5, "fold")
    assert times[0] == pytest.approx(lowest) and times[-1] == staircase.dense.median_ms
    gaps = [b - a for a, b in pairwise(times)]
    assert max(gaps) < 0.15 * (times[-1] - times[0])


@pytest.mark.parametrize("prefix_last", [False, True])
def test_a_goal_is_out_of_reach_only_where_the_fastest_schedule_misses_it(
    staircase: Staircase, prefix_last: bool
) -> None:
    """Cuts below 64 tokens that cost less than nothing: several of them are faster than one to the lowest count."""
    costs = (CutCost(tokens_in=64, tokens_out=32, cost_ms=1.0), CutCost(tokens_in=40, tokens_out=24, cost_ms=-2.0))
    priced = msgspec.structs.replace(staircase, cuts={"fold": costs})
    every = every_schedule(5, 3 if prefix_last else 4)
    fastest = min(every, key=lambda t: predict_ms(priced, t, "fold", prefix_last))
    best = predict_ms(priced, fastest, "fold", prefix_last)
    assert len({*fastest}) > 2

    def chosen(limit: float) -> Candidate:
        front = Search(priced, "fold", Model(5), prefix_last).front(limit)
        return choose(front, priced, "fold", Goal(budget_ms=limit), lambda tokens: 0.0)

    assert chosen(best * 1.0001).tokens == fastest
    said = f"{best:.3g} ms at best with fold ({priced.dense.median_ms / best:.2f}x)"
    with pytest.raises(ScheduleError, match=re.escape(said)):
        chosen(best * 0.98)


def test_front_falls_and_every_base_was_visited(staircase: Staircase) -> None:
    model = Model(5)
    front = Search(staircase, "fold", model).front(staircase.dense.median_ms / 2.5)
    times, losses = [c.predicted_ms for c in front], [c.kl for c in front]
    assert times == sorted(times) and losses == sorted(losses, reverse=True) and losses[-1] == 0
    visited = {tokens for tokens, _ in model.asked}
    assert {base for _, base in model.asked} <= visited


def test_a_dear_cut_makes_fewer_cuts(staircase: Staircase) -> None:
    def cuts(cost_ms: float) -> int:
        cost = (CutCost(tokens_in=64, tokens_out=32, cost_ms=cost_ms),)
        priced = msgspec.structs.replace(staircase, cuts={"fold": cost})
        limit = priced.dense.median_ms / 1.5
        best = within(Search(priced, "fold", Model(5)).front(limit), limit)
        return sum(a > b for a, b in zip((64, *best.tokens), best.tokens, strict=False))

    assert cuts(0.0) > cuts(1.0) >= 1


def test_it_is_deterministic(staircase: Staircase) -> None:
    runs = [Model(5), Model(5)]
    for model in runs:
        Search(staircase, "fold", model).front(staircase.dense.median_ms / 2)
    assert runs[0].asked == runs[1].asked

"""Schedules: the paper's utility by hand, published shapes, the search with a fake fidelity, and each goal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pytest

from edgeprune.errors import InputError, ScheduleError
from edgeprune.io import encode, sha256_bytes
from edgeprune.latency.staircase import predict_ms
from edgeprune.records import ClassFidelity, CutCost, Staircase, Vit, check_tokens
from edgeprune.scheduling.goals import Candidate, Goal, choose, pareto, single_cut
from edgeprune.scheduling.paper import paper_schedule
from edgeprune.scheduling.published import published_schedule, published_shapes
from edgeprune.scheduling.search import Search

MakeVit = Callable[..., Vit]
MakeStaircase = Callable[..., Staircase]
Tokens = tuple[int, ...]
LEVELS = {8: 2.0, 12: 4.0, 16: 8.0, 20: 10.0}  # tokens: ms of the trunk, each a tread


@pytest.fixture
def staircase(make_staircase: MakeStaircase, make_vit: MakeVit) -> Staircase:
    """Four blocks of 20 tokens; 11 ms unpruned, 1 ms of it outside the blocks."""
    cost = CutCost(tokens_in=20, tokens_out=12, cost_ms=0.2)
    return make_staircase(LEVELS, vit=make_vit(depth=4, tokens=20), cuts={"pomt": (cost,)})


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Goal(speedup=0), "speedup = 0 is out of range: use 1 to"),
        (Goal(speedup=float("nan")), "speedup = nan is out of range"),
        (Goal(budget_ms=0), "budget_ms = 0 is out of range"),
        (Goal(alpha=1.1), "alpha = 1.1 is out of range: use 0 to 1"),
        (Goal(max_drop=-1), "max_drop = -1 is out of range"),
        (Goal(speedup=2, max_drop=1), "speedup and max_drop are 2 goals: set only one"),
    ],
)
def test_goals_that_are_refused(goal: Goal, said: str) -> None:
    with pytest.raises(InputError, match=said):
        goal.check()


def test_goals_that_are_accepted() -> None:
    for goal in (Goal(), Goal(alpha=0), Goal(speedup=1), Goal(budget_ms=0.01), Goal(max_drop=0), Goal(max_error=2)):
        goal.check()


def never(tokens: int) -> float:
    raise AssertionError("a latency goal needs no accuracy")


ACCURACY = {8: 10.0, 12: 60.0, 16: 70.0, 20: 80.0}.__getitem__


@pytest.mark.parametrize(
    ("alpha", "best"),
    [
        # 1 - L/10 at 8, 12, 16, 20 tokens: 0.8, 0.6, 0.2, 0; A/80: 0.125, 0.75, 0.875, 1
        (None, 12),  # alpha 0.5: 0.4625, 0.675, 0.5375, 0.5
        (0.5, 12),
        (0.3, 12),  # 0.3275, 0.705, 0.6725, 0.7
        (0.9, 8),  # 0.7325, 0.615, 0.2675, 0.1
        (0.2, 20),  # 0.26, 0.72, 0.74, 0.8
        (1.0, 8),
        (0.0, 20),
    ],
)
def test_paper_maximises_its_utility(alpha: float | None, best: int, staircase: Staircase) -> None:
    found = paper_schedule(staircase, "pomt", Goal(alpha=alpha), ACCURACY, block=1)
    assert found.tokens == (20, best, best, best)
    assert (found.method, found.policy) == ("pomt", "paper")
    assert found.predicted_ms == predict_ms(staircase, found.tokens, "pomt")
    assert found.staircase_sha256 == sha256_bytes(encode(staircase))


def test_a_tie_goes_to_more_tokens(staircase: Staircase) -> None:
    utility_is_one_half = {8: 20.0, 12: 40.0, 16: 80.0, 20: 100.0}.__getitem__
    assert paper_schedule(staircase, "pomt", Goal(alpha=0.5), utility_is_one_half).tokens == (20,) * 4


def test_paper_offers_treads_alone(make_staircase: MakeStaircase, make_vit: MakeVit) -> None:
    points = {2: 0.5, 10: 2.0, 11: 4.0, 12: 4.0, 20: 10.0}  # 11 costs what 12 costs; 2 is prefix + 1
    seen: list[int] = []

    def accuracy(tokens: int) -> float:
        seen.append(tokens)
        return 50.0

    found = paper_schedule(make_staircase(points, vit=make_vit(depth=4, tokens=20)), "topk", Goal(), accuracy)
    assert sorted(seen) == [10, 12, 20] and found.tokens == (20, 20, 20, 10)


def test_paper_with_a_latency_goal_keeps_the_most_tokens_that_meet_it(staircase: Staircase) -> None:
    cost = {n: predict_ms(staircase, single_cut(staircase.vit, 1, n), "pomt") for n in LEVELS}
    assert cost[8] < cost[12] < cost[16] < cost[20] == pytest.approx(11)
    for n in LEVELS:
        for goal in (Goal(budget_ms=cost[n] + 1e-6), Goal(speedup=11 / (cost[n] + 1e-6))):
            assert paper_schedule(staircase, "pomt", goal, never, block=1).tokens == (20, n, n, n)


def test_paper_refuses_what_it_cannot_give(staircase: Staircase) -> None:
    least = predict_ms(staircase, (20, 8, 8, 8), "pomt")
    with pytest.raises(
        ScheduleError, match=rf"0\.1 ms cannot be met: .* takes 11 ms .* about {least:.3g} ms at best"
    ):
        paper_schedule(staircase, "pomt", Goal(budget_ms=0.1), never, block=1)
    with pytest.raises(ScheduleError, match=rf"\({11 / least:.2f}x\): relax"):
        paper_schedule(staircase, "pomt", Goal(speedup=50.0), never, block=1)
    with pytest.raises(ScheduleError, match="pass --policy search with --max-drop"):
        paper_schedule(staircase, "pomt", Goal(max_drop=1.0), never)
    for block, last in ((4, False), (-1, False), (3, True)):
        with pytest.raises(ScheduleError, match=f"block {block} cannot remove tokens"):
            paper_schedule(staircase, "pomt", Goal(), ACCURACY, block=block, prefix_last=last)


def test_pareto() -> None:
    def candidate(ms: float, kl: float) -> Candidate:
        return Candidate((), ms, kl, 0.0, None)

    a, b, c = candidate(1, 0.9), candidate(2, 0.5), candidate(4, 0.1)
    beaten = [candidate(3, 0.5), candidate(2, 0.6), candidate(5, 0.1), candidate(1, 1.0)]
    assert pareto([c, *beaten, a, b]) == [a, b, c]
    assert pareto([]) == []


FRONT = [
    Candidate((n,), ms, kl, ag, None) for n, ms, kl, ag in ((8, 3, 0.9, 40), (12, 5, 0.3, 90), (20, 11, 0.0, 100))
]


def drop(tokens: Sequence[int]) -> float:
    return {8: 30.0, 12: 2.0, 20: 0.0}[tokens[0]]


@pytest.mark.parametrize(
    ("goal", "best"),
    [
        (Goal(budget_ms=11.0), 20),
        (Goal(budget_ms=10.9), 12),
        (Goal(speedup=2.2), 12),
        (Goal(speedup=2.3), 8),
        (Goal(max_drop=1.9), 20),
        (Goal(max_drop=2.0), 12),
        (Goal(max_drop=40.0), 8),
        (Goal(), 12),  # 1 - ms / 11 + agreement / 100: 1.13, 1.45, 1
        (Goal(alpha=0.0), 20),
        (Goal(alpha=1.0), 8),
    ],
)
def test_choice_for_each_goal(goal: Goal, best: int, staircase: Staircase) -> None:
    assert choose(FRONT, staircase, "pomt", goal, drop).tokens == (best,)


@pytest.mark.parametrize(
    ("lost", "fastest"), [((0.5, 0, 1, 0), 0), ((3, 0.5, 1, 0), 1), ((0.5, 3, 2, 0), 3), ((3, 2, 2, 1), 3)], ids=str
)
def test_the_fastest_within_a_drop_is_found(lost: tuple[float, ...], fastest: int, staircase: Staircase) -> None:
    """One that loses less than slower ones was lucky on few pictures; so it counts as they do."""
    front = [Candidate((n,), 1 + n, 1 / (1 + n), 0.0, None) for n in range(4)]
    found = choose(front, staircase, "pomt", Goal(max_drop=1), lambda tokens: lost[tokens[0]])
    assert found == front[fastest]


def test_choice_that_does_not_exist(staircase: Staircase) -> None:
    with pytest.raises(ScheduleError, match=r"2\.9 ms cannot be met: .* about 3 ms at best with pomt \(3\.67x\)"):
        choose(FRONT, staircase, "pomt", Goal(budget_ms=2.9), drop)
    with pytest.raises(ScheduleError, match="every schedule of pomt loses more than -1 points: raise --max-drop"):
        choose(FRONT, staircase, "pomt", Goal(max_drop=-1), drop)


class Damage:
    """A fidelity by formula: tokens lost early hurt most; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Tokens] = []

    def __call__(self, tokens: Tokens, base: Tokens) -> ClassFidelity:
        self.asked.append(tokens)
        kl = sum((20 - n) ** 2 * weight for n, weight in zip(tokens, (8, 4, 2, 1), strict=True)) / 1000
        return ClassFidelity(kl=kl, agreement=100 - 10 * kl)


def every_schedule(last: int) -> list[Tokens]:
    """All that never rise, cut in blocks up to `last` alone."""
    falling = [t for t in product(LEVELS, repeat=4) if all(a >= b for a, b in pairwise(t))]
    return [t for t in falling if len(set(t[last:])) == 1]


@pytest.mark.parametrize("prefix_last", [False, True])
def test_search_front(prefix_last: bool, staircase: Staircase) -> None:
    damage = Damage()
    front = Search(staircase, "pomt", damage, prefix_last).front()
    assert pareto(front) == front and len(front) > 4
    assert front[-1].tokens == (20, 20, 20, 20) and front[-1].kl == 0
    assert len(damage.asked) == len(set(damage.asked))
    allowed = every_schedule(2 if prefix_last else 3)
    assert set(damage.asked) <= set(allowed)
    for candidate in front:
        assert candidate.predicted_ms == predict_ms(staircase, candidate.tokens, "pomt", prefix_last)
        assert candidate.kl == Damage()(candidate.tokens, ()).kl


@pytest.mark.parametrize("method", ["pomt", "evit", "tome", "topk"])
@pytest.mark.parametrize("prefix_last", [False, True])
def test_published_shapes_are_schedules_from_gentle_to_strong(
    method: str, prefix_last: bool, make_vit: MakeVit
) -> None:
    for vit in (make_vit(), make_vit(prefix=2, tokens=198), make_vit(depth=24)):
        shapes = list(published_shapes(vit, method, prefix_last))
        assert len(shapes) > 50
        for tokens in shapes:
            check_tokens(tokens, vit, prefix_last)
        assert all(sum(a) >= sum(b) for a, b in pairwise(shapes))


def test_published_shapes_by_hand(make_vit: MakeVit) -> None:
    vit = make_vit()
    assert (197,) * 3 + (120,) * 9 in list(published_shapes(vit, "pomt"))
    assert tuple(197 - 13 * (i + 1) for i in range(12)) in list(published_shapes(vit, "tome"))
    keep = [140, 140, 140, 100, 100, 100, 72, 72, 72]  # 70 %: 138 of 196 and a fused one, 98 of 139, 70 of 99; CLS
    assert (197,) * 3 + tuple(keep) in list(published_shapes(vit, "evit"))
    assert list(published_shapes(vit, "fold")) == []


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_published_shapes_of_a_model_with_few_blocks(depth: int, make_vit: MakeVit) -> None:
    vit = make_vit(depth=depth)
    for method, prefix_last in product(("pomt", "evit", "tome", "topk"), (False, True)):
        for tokens in published_shapes(vit, method, prefix_last):
            check_tokens(tokens, vit, prefix_last)
    assert not list(published_shapes(make_vit(depth=4), "pomt", prefix_last=True)), "block 3 is the last one"


def test_a_model_of_one_patch_has_nothing_to_remove(make_staircase: MakeStaircase, make_vit: MakeVit) -> None:
    staircase = make_staircase({2: 1.0}, vit=make_vit(tokens=2))
    with pytest.raises(ScheduleError, match="has one patch"):
        Search(staircase, "fold", Damage())
    with pytest.raises(ScheduleError, match="has one patch"):
        paper_schedule(staircase, "fold", Goal(speedup=1.5), never)


def test_published_schedule_is_the_gentlest_that_fits(staircase: Staircase) -> None:
    found = published_schedule(staircase, "topk", 9.0)
    assert found is not None and found.policy == "published"
    less = 20 - found.tokens[0]
    assert found.tokens == tuple(20 - less * (i + 1) for i in range(4))
    gentler = tuple(20 - (less - 1) * (i + 1) for i in range(4))
    assert predict_ms(staircase, found.tokens, "topk") <= 9.0 < predict_ms(staircase, gentler, "topk")
    assert published_schedule(staircase, "fold", 9.0) is None
    with pytest.raises(ScheduleError, match=r"0\.1 ms cannot be met"):
        published_schedule(staircase, "topk", 0.1)

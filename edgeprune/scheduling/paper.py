"""The paper's schedule: one cut, whose token count has the highest utility (arXiv 2407.05941, sec. 3)."""

from __future__ import annotations

from collections.abc import Callable

from edgeprune.errors import ScheduleError
from edgeprune.latency.staircase import predict_ms, trunk_ms
from edgeprune.records import Progress, Schedule, Staircase, silent
from edgeprune.scheduling.goals import Goal, cut_counts, finished, impossible, single_cut

PAPER_BLOCK = 3  # the paper prunes in block 3 (sec. 4)


def paper_schedule(
    staircase: Staircase,
    method: str,
    goal: Goal,
    accuracy: Callable[[int], float],
    block: int = PAPER_BLOCK,
    prefix_last: bool = False,
    progress: Progress = silent,
) -> Schedule:
    """The schedule of the paper (arXiv 2407.05941, sec. 3): one cut, in `block`.

    Maximises U(n) = alpha (1 - L(n) / L_max) + (1 - alpha) A(n) / A_max, where L(n) is the latency of the trunk and
    `accuracy` gives A(n) in percent. With a latency goal it takes the most tokens that meet it. The paper considers
    every n; here the candidates are the tread ends, and of equal ones the larger is taken. Raises ScheduleError for a
    block that cannot be cut, for bounds on accuracy, and for a latency out of reach.
    """
    vit = staircase.vit
    end = vit.depth - 2 if prefix_last else vit.depth - 1
    if not 0 <= block <= end:
        raise ScheduleError(f"block {block} cannot remove tokens: pass --block 0 to {end} for {vit.name}")
    counts = cut_counts(staircase)
    if goal.max_drop is not None or goal.min_cosine is not None:
        option = "--max-drop" if goal.min_cosine is None else "--min-cosine"
        raise ScheduleError(f"the paper's policy has no accuracy bound: pass --policy search with {option}")
    limit = goal.limit_ms(staircase.dense.median_ms)
    if limit is not None:
        cost = {n: predict_ms(staircase, single_cut(vit, block, n), method, prefix_last) for n in counts}
        fits = [n for n in counts if cost[n] <= limit]
        if not fits:
            raise impossible(limit, staircase, cost[counts[0]], method)
        best = max(fits)
    else:
        gained = {}
        for done, n in enumerate(counts):
            progress("evaluating random token subsets", done, len(counts))
            gained[n] = accuracy(n)
        progress("evaluating random token subsets", len(counts), len(counts))
        slowest, most = trunk_ms(staircase, vit.tokens), max(gained.values())
        best = max(
            counts, key=lambda n: (goal.utility(trunk_ms(staircase, n) / slowest, gained[n] / max(most, 1e-9)), n)
        )
    return finished(staircase, method, "paper", single_cut(vit, block, best), prefix_last)

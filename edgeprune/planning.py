"""A schedule for a job: the policy asked for, on the job's staircase and pictures; kept in the work folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgeprune.errors import InputError
from edgeprune.job import Job, Options
from edgeprune.records import (
    Candidate,
    Progress,
    Schedule,
    Staircase,
    encode,
    load,
    read_bytes,
    save,
    silent,
    write_bytes,
)
from edgeprune.schedule import Goal, choose, finished, paper_schedule, pareto
from edgeprune.search import Search, Tokens

if TYPE_CHECKING:
    from edgeprune.fidelity import Fidelity

POLICIES = ("search", "paper")
SAVE_EVERY = 8  # scores
Row = tuple[float, float, float | None]  # KL, agreement, top-1


def check_policy(policy: str) -> None:
    """Raise InputError for a policy that does not exist."""
    if policy not in POLICIES:
        raise InputError(f"unknown policy {policy!r}: choose from {', '.join(POLICIES)}")


def solve(job: Job, goal: Goal) -> Schedule:
    """Tokens per block for a goal, by the policy asked for."""
    options, staircase, vit = job.options, job.staircase, job.model.vit
    check_policy(options.policy)
    if options.method == "none":
        dense = (vit.tokens,) * vit.depth
        return finished(staircase, "none", options.policy, dense, job.prefix_last)
    parts = (encode(staircase), goal, options.policy, options.block, *_scored_on(job))

    def make(path: Path) -> None:
        if options.policy == "paper":
            schedule = paper_schedule(
                staircase, options.method, goal, _accuracy(job), options.block, job.prefix_last, job.progress
            )
        else:
            best = _searched(job, goal)
            schedule = finished(staircase, options.method, "search", best.tokens, job.prefix_last)
        save(schedule, path)

    return load(job.target.step("schedule", ".json", parts, make), Schedule)


def on_exact_edges(job: Job, schedule: Schedule) -> Schedule:
    """The same schedule on exact edges of treads, which are probed where they are not known."""
    tokens = job.settle(schedule.tokens)
    return finished(job.staircase, schedule.method, schedule.policy, tokens, schedule.prefix_last)


def _searched(job: Job, goal: Goal) -> Candidate:
    """What the goal picks from the front."""
    return choose(pareto(weighed(job, goal)), job.staircase, job.options.method, goal, job.drop)


def weighed(job: Job, goal: Goal) -> tuple[Candidate, ...]:
    """All schedules that the search evaluates for a goal; none where nothing is searched."""
    if job.options.policy != "search" or job.options.method == "none":
        return ()
    limit = goal.limit_ms(job.staircase.dense.median_ms)

    def make(path: Path) -> None:
        scores = Scores(job)
        search = Search(job.staircase, job.options.method, scores.of, job.prefix_last, job.progress)
        try:
            search.front(limit)
        finally:
            scores.save()
        write_bytes(path, msgspec.json.encode(list(search.found.values())))

    path = job.target.step("weighed", ".json", (encode(job.staircase), limit, *_scored_on(job)), make)
    return msgspec.json.decode(read_bytes(path), type=tuple[Candidate, ...])


def _scored_on(job: Job) -> tuple[object, ...]:
    """All that the fidelity of a schedule depends on, besides its tokens."""
    options = job.options
    return (
        job.model.vit,
        options.method,
        job.prefix_last,
        job.pictures_key,
        options.search_images,
        job.model.preprocessing,
    )


class Scores:
    """Fidelity by schedule, kept in a file: an interrupted search goes on, another goal starts ahead."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.path = job.target.path("scores", ".json", *_scored_on(job))
        self.known: dict[str, Row] = {}
        if self.path.exists():
            try:
                self.known = msgspec.json.decode(read_bytes(self.path), type=dict[str, Row])
            except msgspec.DecodeError:
                self.known = {}
        self._unsaved = 0

    def of(self, tokens: Tokens, base: Tokens) -> Fidelity:
        """Fidelity of a schedule; `base` is the one it was derived from, whose streams it shares."""
        from edgeprune.fidelity import Fidelity

        key = ",".join(map(str, tokens))
        if key not in self.known:
            evaluator = self.job.evaluator
            evaluator.base(base)
            score = evaluator.fidelity(tokens)
            self.known[key] = (score.kl, score.agreement, score.top1)
            self._unsaved += 1
            if self._unsaved >= SAVE_EVERY:
                self.save()
        return Fidelity(*self.known[key])

    def save(self) -> None:
        """Write what is known. Raises OutputError."""
        if self._unsaved:
            write_bytes(self.path, msgspec.json.encode(self.known))
            self._unsaved = 0


def _accuracy(job: Job) -> Callable[[int], float]:
    """The paper's A(n) in percent: top-1 of n random tokens, agreement where there are no labels."""

    def accuracy(tokens: int) -> float:
        score = job.evaluator.random_drop(tokens)
        return score.agreement if score.top1 is None else score.top1

    return accuracy


def schedule_from_file(path: Path, options: Options, progress: Progress = silent) -> tuple[Schedule, float]:
    """A schedule from a staircase file, and the unpruned latency (ms) it was measured against.

    Raises InputError where the staircase is of another model, ScheduleError where the goal is out of reach.
    """
    staircase = load(path, Staircase)
    setup = staircase.setup
    options = replace(options, device="cpu", precision="fp32", batch=setup.batch)
    job = Job(options, progress)
    if msgspec.structs.replace(staircase.vit, weights_sha256=job.model.vit.weights_sha256) != job.model.vit:
        raise InputError(f"{path} is of {staircase.vit.name}, not of this {job.model.vit.name}: profile it")
    job.staircase = msgspec.structs.replace(staircase, vit=job.model.vit)
    return solve(job, options.goal), staircase.dense.median_ms

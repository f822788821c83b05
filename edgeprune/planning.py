"""A schedule for a job: the policy asked for, on the job's staircase and pictures; kept in the work folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from edgeprune.errors import InputError
from edgeprune.job import Job, Options
from edgeprune.records import Progress, Schedule, Staircase, encode, load, save, silent
from edgeprune.schedule import Goal, choose, finished, paper_schedule, single_cut_front

POLICIES = ("search", "paper")


def solve(job: Job, goal: Goal) -> Schedule:
    """Tokens per block for a goal, by the policy asked for; kept in the work folder."""
    options, staircase, vit = job.options, job.staircase, job.model.vit
    if options.method == "none":
        return finished(staircase, "none", options.policy, (vit.tokens,) * vit.depth)
    images = (job.pictures_key, options.search_images)
    parts = (
        encode(staircase),
        options.method,
        options.policy,
        goal,
        options.block,
        images,
        job.model.preprocessing,
    )

    def make(path: Path) -> None:
        if options.policy == "paper":
            schedule = paper_schedule(staircase, options.method, goal, _accuracy(job), options.block, job.progress)
        else:
            front = single_cut_front(staircase, options.method, job.evaluator.fidelity, goal, job.progress)
            best = choose(front, staircase, options.method, goal, job.drop)
            schedule = finished(staircase, options.method, "search", best.tokens)
        save(schedule, path)

    return load(job.target.step("schedule", ".json", parts, make), Schedule)


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

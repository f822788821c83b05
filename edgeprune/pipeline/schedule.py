"""The `schedule` command: tokens per block from a staircase and pictures; measures nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from edgeprune.devices import load_device
from edgeprune.errors import InputError
from edgeprune.io import load
from edgeprune.latency.probing import unconfirmed
from edgeprune.pipeline.context import Options, context_for
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.pipeline.solve import solve
from edgeprune.records import Progress, Schedule, Staircase, silent
from edgeprune.runtimes import runtime_for
from edgeprune.runtimes.steps import WorkFolder
from edgeprune.runtimes.target import Target

log = logging.getLogger(__name__)


def schedule_from_staircase(
    staircase: Staircase, options: Options, progress: Progress = silent, source: str = "the staircase"
) -> Schedule:
    """The best schedule for a goal on a measured staircase.

    Token counts are the tread ends as far as they are measured; a log line names those that `build` would still
    confirm, and a warning says where the staircase has no costs of cuts. Raises InputError where the staircase is of
    another model, ScheduleError where the goal is out of reach.
    """
    device = load_device("cpu")  # nothing is compiled or run: its runtime need not be installed
    target = Target(device, runtime_for(device), staircase.setup, WorkFolder(options.work), progress)
    context = context_for(replace(options, batch=staircase.setup.batch), progress, target)
    vit = context.model.vit
    if staircase.vit.layers != vit.layers:
        raise InputError(
            f"{source} is of a model with {named(staircase.vit.layers)}, this one has {named(vit.layers)}: pass the "
            "same --layers to profile and schedule"
        )
    if msgspec.structs.replace(staircase.vit, weights_sha256=vit.weights_sha256) != vit:
        raise InputError(
            f"{source} is of {staircase.vit.name}, not of this {vit.name}: run edgeprune profile for this model"
        )
    staircase = msgspec.structs.replace(staircase, vit=vit)
    with target.work.lock():
        schedule = solve(context, staircase, ScheduleScores(context), options.goal).schedule
    if schedule.cuts and schedule.method not in staircase.cuts:
        log.warning(
            "%s has no cut costs for %s, so cuts are assumed to be free: run edgeprune profile --method %s",
            source, schedule.method, schedule.method,
        )  # fmt: skip
    if open_ends := unconfirmed(staircase, schedule.tokens):
        counts = ", ".join(map(str, open_ends))
        log.info("tread ends that are not confirmed: %s tokens; edgeprune build measures them", counts)
    return schedule


def named(layers: Sequence[int]) -> str:
    """Layers of dense features, for messages."""
    return f"--layers {','.join(map(str, layers))}" if layers else "no --layers"


def schedule_from_file(path: Path, options: Options, progress: Progress = silent) -> tuple[Schedule, Staircase]:
    """The schedule from a staircase file, and that staircase."""
    staircase = load(path, Staircase)
    return schedule_from_staircase(staircase, options, progress, str(path)), staircase

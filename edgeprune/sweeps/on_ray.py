"""The builds of a sweep on Ray: one actor for each board, and their schedules evaluated on all nodes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune.defaults import CALIB
from edgeprune.distributed.cluster import Cluster, on_node, ray_module
from edgeprune.errors import HostError
from edgeprune.sweeps.plan import HERE, Job
from edgeprune.sweeps.run import Outcome, Watch, outcome_of, words

log = logging.getLogger(__name__)

ATTEMPTS = 3  # of a build whose process dies
POLL_S = 0.5
NAMED = 20  # attempts to get the name of a board


class Board:
    """Runs in a process of its own, which holds one board: one build at a time."""

    def __init__(self) -> None:
        self.state = ""

    def run(self, job: Job, work: Path, out: Path, calib: Path, cluster: Cluster) -> Outcome:
        """One build; its schedules are evaluated by the cluster. Paths are absolute."""
        self.state = "starting"

        def progress(what: str, done: int, total: int) -> None:
            self.state = words(what, done, total)

        return outcome_of(job, replace(job.options(work, out), calib=calib, cluster=cluster), progress)

    def now(self) -> str:
        """What it does now."""
        return self.state


@dataclass
class Lane:
    """A board, its actor, the builds that wait for it and the one that runs."""

    board: str
    waiting: list[Job]
    actor: Any = None
    running: Job | None = None
    answer: Any = None
    attempts: dict[str, int] = field(default_factory=dict)  # by build


class Boards:
    """Boards work side by side, each in an actor on this node; boards of this machine itself come last, alone.

    So nothing is evaluated for another board while this machine is timed. An actor that dies is started again, and
    its build goes on from the steps in its work folder.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.ray = cluster, ray_module()
        self.calib = CALIB.resolve()

    def run(self, boards: Mapping[str, Sequence[Job]], work: Path, out: Path, watch: Watch) -> Iterator[Outcome]:
        """As in run.Executor."""
        lanes = [Lane(board, list(jobs)) for board, jobs in boards.items()]
        for group in ([lane for lane in lanes if lane.board != HERE], [lane for lane in lanes if lane.board == HERE]):
            try:
                yield from self._together(group, work.resolve(), out.resolve(), watch)
            finally:
                for lane in group:
                    if lane.actor is not None:
                        self.ray.kill(lane.actor)

    def _together(self, lanes: Sequence[Lane], work: Path, out: Path, watch: Watch) -> Iterator[Outcome]:
        while any(lane.waiting or lane.running for lane in lanes):
            for lane in lanes:
                if lane.running is None and lane.waiting:
                    lane.running = lane.waiting.pop(0)
                    try:
                        lane.actor = lane.actor or self._actor(lane.board)
                    except HostError as error:
                        failed, lane.running, lane.waiting = [lane.running, *lane.waiting], None, []
                        yield from (Outcome(job=job, error=str(error)) for job in failed)
                        continue
                    watch(lane.running, "starting")
                    lane.answer = lane.actor.run.remote(lane.running, work, out, self.calib, self.cluster)
            busy = [lane for lane in lanes if lane.running is not None]
            if not busy:
                continue
            ready, _ = self.ray.wait([lane.answer for lane in busy], timeout=POLL_S)
            for lane in busy:
                if lane.answer in ready:
                    outcome = self._outcome(lane)
                    if outcome is not None:
                        yield outcome
                else:
                    assert lane.running is not None
                    with suppress(self.ray.exceptions.RayError):
                        watch(lane.running, self.ray.get(lane.actor.now.remote(), timeout=POLL_S))

    def _actor(self, board: str) -> Any:
        """A process for a board. Its name keeps other sweeps of the cluster away from it. Raises HostError."""
        here = on_node(self.ray.get_runtime_context().get_node_id())
        options = {"num_cpus": 0, "max_concurrency": 2, "scheduling_strategy": here, "name": f"board {board}"}
        for attempt in range(NAMED):  # the name of an actor that has just died is free a moment later
            try:
                return self.ray.remote(Board).options(**options).remote()
            except (ValueError, AssertionError):  # the latter where Ray has the name still, but no longer its class
                time.sleep(0.1 * attempt)
        raise HostError(f"the board {board} is in use by another sweep on this cluster: wait for it")

    def _outcome(self, lane: Lane) -> Outcome | None:
        """How the running build ended; None where its process died and it is to run again."""
        job, exceptions = lane.running, self.ray.exceptions
        assert job is not None
        lane.running = None
        try:
            outcome: Outcome = self.ray.get(lane.answer)
        except exceptions.RayActorError as error:
            lane.actor = None
            lane.attempts[job.name] = lane.attempts.get(job.name, 0) + 1
            if lane.attempts[job.name] < ATTEMPTS:
                log.warning("the process of board %s died; %s continues from its last step", lane.board, job.name)
                lane.waiting.insert(0, job)
                return None
            detail = " ".join(str(error).split())[:160]
            return Outcome(job=job, error=f"its process died {ATTEMPTS} times ({detail}): look into Ray's logs")
        return outcome

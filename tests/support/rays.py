"""Boards that die, or only note when they work; a driver that dies; what is left of its processes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from edgeprune.distributed.cluster import Cluster, connected
from edgeprune.sweeps.on_ray import Board, Boards
from edgeprune.sweeps.plan import Job
from edgeprune.sweeps.run import Outcome, run_sweep
from support import exports
from support.processes import after_saves, die, measure_few

ROUNDS = 3  # of a staircase


class SharedBoard(Board):
    """With the exports that all tests share."""

    def run(self, job: Job, work: Path, out: Path, calib: Path, cluster: Cluster) -> Outcome:
        exports.share()
        return super().run(job, work, out, calib, cluster)


class DyingBoard(SharedBoard):
    """Its process dies once, when it has saved samples of its first staircase; it leaves a copy of them."""

    def run(self, job: Job, work: Path, out: Path, calib: Path, cluster: Cluster) -> Outcome:
        mark, ssh = work / "died", work / "ssh"
        measure_few(ROUNDS)
        if ssh.exists():
            os.environ["EDGEPRUNE_SSH"] = ssh.read_text()
        if not mark.exists():
            after_saves(2, lambda: self.die(mark, work))
        return super().run(job, work, out, calib, cluster)

    def die(self, mark: Path, work: Path) -> None:
        [samples] = work.glob("*/samples-*.json")
        mark.write_bytes(samples.read_bytes())
        die()


class NotingBoard(Board):
    """Builds nothing; notes when it was busy."""

    def run(self, job: Job, work: Path, out: Path, calib: Path, cluster: Cluster) -> Outcome:
        assert all(path.is_absolute() for path in (work, out, calib)), "it runs in a folder of Ray's"
        start = time.time()
        self.wait(work, job.board)
        return Outcome(job=job, error=f"{start} {time.time()}")

    def wait(self, work: Path, board: str) -> None:
        time.sleep(0.2)


class MeetingBoard(NotingBoard):
    """The boards a and b each wait half a minute for the other to have begun."""

    def wait(self, work: Path, board: str) -> None:
        both, end = (work / "a", work / "b"), time.time() + 30
        if work / board in both:
            (work / board).touch()
            while not all(path.exists() for path in both) and time.time() < end:
                time.sleep(0.05)
        super().wait(work, board)


def sweep_and_die(address: str, jobs: Sequence[Job], work: Path, out: Path) -> None:
    """A driver that is killed when its first build has ended, whose board died before."""
    from edgeprune.sweeps import on_ray

    on_ray.Board = DyingBoard  # type: ignore[misc]
    with connected(address) as cluster:
        assert cluster is not None
        run_sweep(jobs, Boards(cluster), work, out, ended=lambda outcome: die())


def marked(name: str, value: str) -> list[int]:
    """Processes that have a variable in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{name}={value}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return [pid for pid in found if pid != os.getpid()]


def named(word: str) -> list[int]:
    """Processes that have a word in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and word.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found

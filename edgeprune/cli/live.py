"""The builds of a sweep while they run: a table on a terminal, else one line for each that has ended."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from edgeprune.sweeps.plan import Job
    from edgeprune.sweeps.run import Outcome

SHOWN = 24  # rows: those that run, then those that wait, then those that failed, then the rest
WAITING, DONE, FAILED = "waiting", "done", "failed"


class LiveRows:
    """The state of every build; a rich renderable."""

    def __init__(self, jobs: Sequence[Job], lines: bool) -> None:
        self.jobs, self.lines = jobs, lines
        self.states = {job.name: WAITING for job in jobs}
        self.started: dict[str, float] = {}
        self.took: dict[str, list[float]] = {}  # seconds, by board

    def watch(self, job: Job, state: str) -> None:
        """A build does something."""
        self.started.setdefault(job.name, time.monotonic())
        self.states[job.name] = state

    def ended(self, outcome: Outcome) -> None:
        """A build has ended; those that were not run took no time."""
        job = outcome.job
        self.states[job.name] = DONE if outcome.error is None else FAILED
        if job.name in self.started:
            self.took.setdefault(job.board, []).append(time.monotonic() - self.started[job.name])
        if self.lines:
            count = sum(state in (DONE, FAILED) for state in self.states.values())
            detail = f": {outcome.error}" if outcome.error else ""
            typer.echo(f"{count} of {len(self.jobs)} {self.states[job.name]}: {job.name}{detail}", err=True)

    def left_s(self, job: Job) -> float | None:
        """Seconds until a running build ends, by the mean of those before it on its board; None where unknown."""
        if job.name not in self.started or self.states[job.name] in (DONE, FAILED) or job.board not in self.took:
            return None
        return max(mean(self.took[job.board]) - (time.monotonic() - self.started[job.name]), 0.0)

    def whole_left_s(self) -> float | None:
        """Seconds until all boards are through; None before every board that is left has finished a build."""
        left: dict[str, float] = {}
        for job in self.jobs:
            state = self.states[job.name]
            if state in (DONE, FAILED):
                continue
            if job.board not in self.took:
                return None
            own = self.left_s(job)
            left[job.board] = left.get(job.board, 0.0) + (mean(self.took[job.board]) if own is None else own)
        return max(left.values(), default=0.0)

    def __rich__(self) -> Any:
        from rich.table import Table

        ranks = {WAITING: 1, FAILED: 2, DONE: 3}
        rows = sorted(self.jobs, key=lambda job: ranks.get(self.states[job.name], 0))
        done = sum(state in (DONE, FAILED) for state in self.states.values())
        table = Table(title=f"{done} of {len(self.jobs)} builds, {clock(self.whole_left_s())} left")
        for column in ("build", "state", "board", "left"):
            table.add_column(column, overflow="ellipsis", no_wrap=True)
        for job in rows[:SHOWN]:
            table.add_row(job.name, self.states[job.name], job.board, clock(self.left_s(job)))
        if len(rows) > SHOWN:
            table.caption = f"and {len(rows) - SHOWN} more"
        return table


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss; a dash where they are unknown."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@contextmanager
def live_rows(jobs: Sequence[Job]) -> Iterator[LiveRows]:
    """Rows on stderr while the builds run; warnings of the builds appear above them."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, markup=False, emoji=False)
    rows = LiveRows(jobs, lines=not console.is_terminal)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("edgeprune")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        if rows.lines:
            yield rows
            return
        with Live(rows, console=console, refresh_per_second=2, transient=True):
            handler.setStream(sys.stderr)  # the one of the table, so that warnings appear above it
            yield rows
    finally:
        logger.removeHandler(handler)

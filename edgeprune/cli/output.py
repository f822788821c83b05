"""Output of the commands: progress and log lines on stderr, tables, lines and the JSON object."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeprune.errors import MissingError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

MOST_COUNTED = 100_000  # of a total that is shown as a number; larger ones are bytes


@contextmanager
def clocks(device: str, lock: bool, host: str | None = None) -> Iterator[None]:
    """Lock the clocks of this device while something is measured, if requested; a remote host locks its own.

    Raises DeviceError.
    """
    if not lock or host is not None:
        yield
        return
    from edgeprune.devices import check_is_here, load_device
    from edgeprune.devices.power import locked_clocks
    from edgeprune.runtimes.quiet import clocks_turn

    found = load_device(device)
    check_is_here(found)
    with clocks_turn(), locked_clocks(found):
        yield


class ProgressBar:
    """Draws progress calls (what, done, total) on one line: the latest `what` with its elapsed and remaining time.

    Work inside other work, such as an engine compiled while token counts are prepared, is shown in its place; the
    outer bar then continues where it was.
    """

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, tuple[TaskID, int]] = {}  # the task of each `what`, and how much of it was done

    def __call__(self, what: str, done: int, total: int) -> None:
        count = f" {min(done + 1, total)} of {total}" if 1 < total <= MOST_COUNTED else ""
        name, bracket, rest = what.partition(" (")
        task, before = self.tasks.get(name, (None, 0))
        if task is not None and done < before:  # the same work once more
            self.bar.remove_task(task)
            task = None
        if task is None:
            pulse = total == 1 and not done  # a single piece of work: its progress is not known
            task = self.bar.add_task(name, total=None if pulse else total)
        for other in self.bar.task_ids:
            self.bar.update(other, visible=other == task)
        text = f"{name}{count}{bracket}{rest}"
        self.bar.update(task, completed=done, total=total if done or total > 1 else None, description=text)
        self.tasks[name] = task, done


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Log lines on stderr and, where that is a terminal, a progress bar below them."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("edgeprune")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TaskProgressColumn(),
        TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            handler.setStream(sys.stderr)  # the stream of the bar, so that log lines appear above it
            yield ProgressBar(bar)
    finally:
        logger.removeHandler(handler)


def show(table: Any, as_json: bool) -> None:
    """Print a table: on stdout, or on stderr if --json reserves stdout for a program."""
    from rich.console import Console

    console = Console(stderr=as_json, markup=False, emoji=False)  # names and labels are shown as they are
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def tell(line: str, as_json: bool) -> None:
    """Print a line: on stdout, or on stderr if --json reserves stdout for a program."""
    typer.echo(line, err=as_json)


def json_line(row: dict[str, Any]) -> None:
    """Print the JSON object, the last line of stdout."""
    typer.echo(json.dumps(row, allow_nan=False))


def open_in_browser(path: Path) -> None:
    """Open a file in the browser. Raises MissingError if there is none."""
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        raise MissingError(f"no browser was found: open {path} in one yourself")

"""Progress, tables, lines and the JSON object: where the output of commands goes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from edgeprune.errors import MissingError


@contextmanager
def clocks(device: str, lock: bool, host: str | None = None) -> Iterator[None]:
    """The clocks of this device locked while something is measured, where that was asked for; a host does its own."""
    if not lock or host is not None:
        yield
        return
    from edgeprune.devices import check_is_here, load_device
    from edgeprune.devices.power import locked_clocks

    found = load_device(device)
    check_is_here(found)
    with locked_clocks(found):
        yield


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr and log lines beside it; no bar where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("edgeprune")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    try:
        with Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not sys.stderr.isatty()
        ) as bar:
            handler.setStream(sys.stderr)  # the bar's own, so that lines do not tear it
            task = bar.add_task("starting", total=None)
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
    finally:
        logger.removeHandler(handler)


def show(table: Any, as_json: bool) -> None:
    """A table for a person: on stdout, or on stderr where stdout is for a program."""
    from rich.console import Console

    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def tell(line: str, as_json: bool) -> None:
    typer.echo(line, err=as_json)


def json_line(row: dict[str, Any]) -> None:
    typer.echo(json.dumps(row, allow_nan=False))


def open_in_browser(path: Path) -> None:
    """Raise MissingError where there is none."""
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        raise MissingError(f"no browser is found here: open {path} in one")

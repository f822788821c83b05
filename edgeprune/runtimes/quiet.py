"""Timing and evaluation on one machine take turns: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def evaluating() -> Iterator[None]:
    """Compute while nothing on this machine is timed; several processes at once may."""
    with _locked("turn", fcntl.LOCK_SH):
        pass  # a waiting timing holds this lock, so that new evaluations cannot starve it
    with _locked("use", fcntl.LOCK_SH):
        yield


@contextmanager
def timing() -> Iterator[None]:
    """Time something while nothing else is timed or evaluated on this machine: waits for what has begun.

    It would wait for itself for ever: never enter it within itself or within evaluating().
    """
    with _locked("turn", fcntl.LOCK_EX), _locked("use", fcntl.LOCK_EX):
        yield


@contextmanager
def clocks_turn() -> Iterator[None]:
    """Change the clocks of this machine while no other process has changed them: each restores what it found."""
    with _locked("clocks", fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(name: str, kind: int) -> Iterator[None]:
    """Hold a lock of this user; without a folder that takes it, a warning says what may go wrong."""
    with ExitStack() as stack:
        try:
            path = Path(tempfile.gettempdir(), f"edgeprune-{os.getuid()}-{name}.lock")
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, handle)
            _wait(handle, kind, path)
        except OSError as error:
            _warn(error.strerror or str(error))
        yield


def _wait(handle: int, kind: int, path: Path) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another edgeprune that measures on this machine (`fuser -v %s` shows it)", path)
        fcntl.flock(handle, kind)


@cache
def _warn(reason: str) -> None:
    """Once per process."""
    log.warning(
        "runs on this machine cannot take turns (%s): let no other edgeprune run here meanwhile, or set TMPDIR to a "
        "folder you may write to", reason,
    )  # fmt: skip

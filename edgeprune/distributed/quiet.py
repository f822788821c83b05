"""Timing and evaluation on one machine take turns: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def evaluating() -> Iterator[None]:
    """Compute while nothing on this machine is timed; several processes at once may."""
    with _locked("turn", fcntl.LOCK_SH):
        pass  # a waiting timing holds this lock, so that new evaluations cannot starve it
    with _locked("use", fcntl.LOCK_SH):
        yield


@contextmanager
def timing() -> Iterator[None]:
    """Time something while nothing is evaluated on this machine: waits for evaluations that have begun."""
    with _locked("turn", fcntl.LOCK_EX), _locked("use", fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(name: str, kind: int) -> Iterator[None]:
    path = Path(tempfile.gettempdir(), f"edgeprune-{os.getuid()}-{name}.lock")
    with open(path, "w") as file:
        fcntl.flock(file, kind)
        yield

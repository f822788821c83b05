"""One workstation at a time uses a device: a lock of its operating system, which ends with its process."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeprune.errors import HostError

WAIT_S = 10.0  # for a connection that has ended, but whose process here has not yet
POLL_S = 0.1


@contextmanager
def machine() -> Iterator[None]:
    """Keep other workers off this machine, those of other users too where they share a folder for temporary files.

    Raises HostError where one uses it.
    """
    path = Path(tempfile.gettempdir(), "edgeprune-worker.lock")
    handle = _opened(path)
    try:
        until = time.monotonic() + WAIT_S
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > until:
                raise HostError(
                    "another edgeprune --host is using this board: wait until it ends, or run "
                    f"`sudo fuser -v {path}` on the board to see the process"
                )
            time.sleep(POLL_S)
        yield
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    """A lock needs no right to write, and Linux refuses O_CREAT for a file of another user in /tmp."""
    with suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with suppress(PermissionError):  # another user made it in the meantime
            os.fchmod(handle, 0o644)  # whatever the umask
        return handle
    except PermissionError:  # another user made it in the meantime
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)

"""The work folder: files of finished steps under a hash of their inputs, used by one process at a time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.defaults import WORK
from edgeprune.errors import InputError, OutputError
from edgeprune.io import code_key, key_of, writable

log = logging.getLogger(__name__)


PROFILING_MODELS = "profiling-models"  # the step that is a folder of files
LABELS = {  # of the steps in log lines
    "staircase": "measuring the staircase",
    "depth": "timing two blocks",
    "pixels": "decoding images",
    "candidates": "evaluating schedules",
    "schedule": "choosing the schedule",
    "model": "exporting ONNX",
    "precise": "converting ONNX",
    "engine": "compiling the engine",
    "latency": "timing engines",
    "logits": "evaluating images",
    "trial": "recovery trial",
    "recovered": "recovering accuracy",
}


@dataclass(frozen=True)
class WorkFolder:
    """A folder that keeps finished steps: the same step with the same inputs and code is not done twice."""

    path: Path = WORK

    def file(self, name: str, suffix: str, *parts: Any) -> Path:
        """The path of a result called `name` that depends only on `parts` and on the sources of this package."""
        return self.path / f"{name}-{key_of(code_key(), *parts)}{suffix}"

    def step(self, name: str, suffix: str, parts: Sequence[Any], make: Callable[[Path], None]) -> Path:
        """The file of a step with the inputs `parts`; `make` writes it unless it is there already."""
        file, label = self.file(name, suffix, *parts), LABELS.get(name, name)
        if file.exists():
            log.info("%s: reused %s", label, file.name)
        else:
            make(file)
            log.info("%s: done", label)
        return file

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of this folder; that two time at once is for quiet.py to prevent.

        Half-written files of a killed process are removed, but not below folders that have locks of their own, as
        those of the boards of a sweep. Raises InputError where another process holds the lock, OutputError.
        """
        import fcntl

        with writable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w")  # noqa: SIM115 it is held below
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another edgeprune is using {self.path}: wait for it, or pass another --work"
                ) from None
            except OSError as error:  # some network file systems have no locks
                raise OutputError(
                    f"{self.path}: cannot be locked ({error.strerror}): pass a --work folder on a local disk"
                ) from None
            for left in (*self.path.glob(".*.tmp"), *self.path.glob(f"{PROFILING_MODELS}-*/.*.tmp")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield

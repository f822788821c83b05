"""Where one run measures: device, runtime and setup, and the folder that keeps its finished steps."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.devices import check_is_here, load_device
from edgeprune.errors import InputError
from edgeprune.io import code_key, key_of, sha256_file, writable
from edgeprune.records import Device, Progress, Setup, silent
from edgeprune.runtimes import Runtime, runtime_for
from edgeprune.runtimes.inference import Open
from edgeprune.runtimes.remote.runtime import RemoteRuntime
from edgeprune.runtimes.remote.ssh import Host

log = logging.getLogger(__name__)

WORK = Path("engines/.work")
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Target:
    """A device as its runtime sees it, and a work folder. Steps are kept under a hash of their inputs."""

    device: Device
    runtime: Runtime
    setup: Setup
    work: Path = WORK
    progress: Progress = silent

    @property
    def onnx_precision(self) -> str:
        """Precision of the ONNX files: a simulation knows its own and runs them in fp32."""
        return "fp32" if self.setup.simulated else self.setup.precision

    def engine(self, onnx: Path, *weights: str) -> Path:
        """What the runtime opens for an ONNX file: the file itself, or the engine compiled from it, which is kept.

        `weights` names those that lie outside the ONNX file. Raises EngineError, OutputError.
        """
        if self.runtime.suffix == onnx.suffix:
            return onnx

        def make(path: Path) -> None:
            self.runtime.compile(onnx, self.setup, path, self.progress)

        return self.step("engine", self.runtime.suffix, (sha256_file(onnx), weights, self.setup), make)

    def opener(self, onnx: Path, *weights: str) -> Open:
        """Compiles an ONNX file now and opens its engine when called."""
        engine = self.engine(onnx, *weights)
        return lambda: self.runtime.open(engine, self.setup)

    def path(self, name: str, suffix: str, *parts: Any) -> Path:
        """The place in the work folder for a result that depends on `parts` and the package's sources alone."""
        return self.work / f"{name}-{key_of(code_key(), *parts)}{suffix}"

    def step(self, name: str, suffix: str, parts: Sequence[Any], make: Callable[[Path], None]) -> Path:
        """The file of a finished step; made now unless one with the same inputs is already there."""
        path = self.path(name, suffix, *parts)
        if path.exists():
            log.info("%s: reused %s", name, path.name)
        else:
            make(path)
            log.info("%s: done", name)
        return path


@contextmanager
def work_lock(work: Path) -> Iterator[None]:
    """Nobody else works in this folder: two that measure at once would spoil each other's latencies.

    What a killed process left half-written is removed. Raises InputError where somebody does, OutputError.
    """
    import fcntl

    with writable(work):
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / ".lock", "w")  # noqa: SIM115 it is held below
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another edgeprune works in {work}: wait for it, or pass another --work") from None
        for left in work.glob("**/.*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def check_batch(batch: int) -> None:
    """Raise InputError for a batch that holds nothing."""
    if batch < 1:
        raise InputError(f"batch {batch} is not possible: use 1 or more")


def check_precision(precision: str) -> None:
    """Raise InputError for a precision that does not exist."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}: choose from {', '.join(PRECISIONS)}")


def target_for(
    device: str,
    precision: str = "fp32",
    batch: int = 1,
    simulate: bool = False,
    work: Path = WORK,
    progress: Progress = silent,
    host: Host | None = None,
    lock_clocks: bool = False,
) -> Target:
    """A device that is this machine, is simulated, or answers on `host`; clocks are locked there on request.

    Raises DeviceError, MissingError, InputError, HostError.
    """
    check_batch(batch)
    check_precision(precision)
    found = load_device(device)
    runtime: Runtime
    if host is not None:
        if simulate:
            raise InputError("--simulate needs no host: leave out --host")
        runtime = RemoteRuntime(found, host, lock_clocks)
    else:
        if not simulate:
            check_is_here(found)
        runtime = runtime_for(found, simulate)
    return Target(found, runtime, runtime.setup(found, precision, batch), work, progress)

"""The device's end of `--host`: compiles, loads, times and runs engines for a workstation. Needs no torch."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from edgeprune.devices.power import locked_clocks
from edgeprune.errors import REPORT, EdgepruneError, EngineError, HostError, InputError
from edgeprune.io import key_of, sha256_file, writable
from edgeprune.runtimes import (
    RUNS_PER_TIMING,
    Inspected,
    Observed,
    OnDevice,
    Runtime,
    Session,
    cuda_graph_of,
    runtime_for,
)
from edgeprune.runtimes.quiet import clocks_turn
from edgeprune.runtimes.remote import protocol
from edgeprune.runtimes.remote.busy import machine
from edgeprune.version import __version__

if TYPE_CHECKING:
    from edgeprune.records import Setup

RAMP_MS = 100.0  # of inferences before the timed ones of a request


class Worker:
    """State of one connection: a runtime, its setup and open sessions. `work` keeps files under their sha256.

    From Prepare on it has the machine to itself (remote/busy.py). `alone` is entered while something is timed.
    """

    def __init__(
        self,
        work: Path,
        send: Callable[[protocol.Message], None],
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.files, self.models = work / "files", work / "models"
        self.send, self.stack, self.alone = send, ExitStack(), alone
        self.opened: dict[int, Session] = {}
        self.numbers = count()
        self._partial: Path | None = None
        self.runtime: Runtime
        self.setup: Setup

    def answer(self, request: protocol.Request) -> protocol.Message | None:
        """The answer to a request; None where nothing is left to send. Raises EdgepruneError."""
        match request:
            case protocol.Prepare():
                return self._prepare(request)
            case protocol.Missing(sha256):
                return protocol.Names(tuple(name for name in sha256 if not self._file(name).is_file()))
            case protocol.Put():
                return self._put(request)
            case protocol.Compile(files, main):
                return self._compile(files, main)
            case protocol.Get(sha256):
                self._get(sha256)
                return None
            case protocol.Open(files, main):
                return self._open(files, main)
            case protocol.Time(numbers):
                return self._time(numbers)
            case protocol.State():
                runtime: object = self.runtime
                return protocol.StateIs(runtime.gpu_state() if isinstance(runtime, Observed) else None)
            case protocol.Infer(number, shape, data):
                output = self._session(number).infer(np.frombuffer(data, np.float32).reshape(shape))
                return protocol.Output(output.shape, np.ascontiguousarray(output, np.float32).tobytes())
            case protocol.Fused(number):
                session = self._session(number)
                return protocol.Value(session.fused_attention() if isinstance(session, Inspected) else None)
            case protocol.Close(number):
                self._session(number)
                self.opened.pop(number).__exit__(None, None, None)
                return protocol.Done()

    def close(self) -> None:
        """Free every session, remove what has arrived of an unfinished file, and restore the clocks."""
        for session in self.opened.values():
            session.__exit__(None, None, None)
        self.opened.clear()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)
        self.stack.close()

    def _prepare(self, request: protocol.Prepare) -> protocol.Ready:
        if request.version != __version__:
            raise HostError(
                f"edgeprune is {__version__} on the device and {request.version} here: install the same version"
            )
        self.stack.enter_context(machine())
        for folder in (self.files, self.models):
            with writable(folder):
                folder.mkdir(parents=True, exist_ok=True)
        for left in self.files.glob(".*.tmp"):  # of workers that were killed
            left.unlink(missing_ok=True)
        self.runtime = runtime_for(request.device)
        if request.lock_clocks:
            self.stack.enter_context(clocks_turn())
            self.stack.enter_context(locked_clocks(request.device))
        self.setup = self.runtime.setup(request.device, request.precision, request.batch)
        return protocol.Ready(self.setup, self.runtime.suffix, self.runtime.parity, self.runtime.free_bytes())

    def _file(self, sha256: str) -> Path:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise InputError(f"{sha256[:80]!r} is not a sha256: {REPORT}")
        return self.files / sha256

    def _put(self, request: protocol.Put) -> protocol.Done | None:
        path = self._file(request.sha256)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with writable(path):
            if self._partial != partial:
                partial.unlink(missing_ok=True)
                self._partial = partial
            with open(partial, "ab") as file:
                file.write(request.data)
            if not request.last:
                return None
            self._partial = None
            found = sha256_file(partial)
            if found != request.sha256:
                partial.unlink()
                wanted = request.sha256[:12]
                raise HostError(
                    f"a file arrived damaged (sha256 {found[:12]}…, not {wanted}…): run the command again"
                )
            os.replace(partial, path)
        return protocol.Done()

    def _placed(self, files: dict[str, str], main: str) -> Path:
        """Put the files into one folder under their names, as ONNX needs its weights; the path of `main`."""
        folder = self.models / key_of(files)
        with writable(folder):
            folder.mkdir(exist_ok=True)
            for name, sha256 in files.items():
                if not name or main not in files or Path(name).name != name or name.startswith("."):
                    raise InputError(f"{name!r} is not a file name: {REPORT}")
                source, place = self._file(sha256), folder / name
                if not source.is_file():
                    raise InputError(f"{name} has not arrived: run the command again")
                if not place.exists():
                    os.link(source, place)
        return folder / main

    def _compile(self, files: dict[str, str], main: str) -> protocol.Compiled:
        onnx = self._placed(files, main)
        out = self.files / f"{key_of(files, self.setup)}{self.runtime.suffix}"  # the timing cache is next to it

        def progress(what: str, done: int, total: int) -> None:
            try:
                self.send(protocol.Progressed(what, done, total))
            except OSError:  # the workstation is gone: this stops the builder
                raise KeyboardInterrupt from None

        try:
            self.runtime.compile(onnx, self.setup, out, progress)
        finally:
            log = out.with_suffix(".log")
            text = log.read_text(errors="replace") if log.is_file() else ""
            log.unlink(missing_ok=True)
        sha256 = sha256_file(out)
        os.replace(out, self._file(sha256))
        return protocol.Compiled(sha256, text)

    def _get(self, sha256: str) -> None:
        with open(self._file(sha256), "rb") as file:
            piece = file.read(protocol.PIECE_BYTES)
            while piece:
                following = file.read(protocol.PIECE_BYTES)
                self.send(protocol.Put(sha256, piece, not following))
                piece = following

    def _open(self, files: dict[str, str], main: str) -> protocol.Opened:
        session = self.runtime.open(self._placed(files, main), self.setup)
        number = next(self.numbers)
        self.opened[number] = session.__enter__()
        memory_bytes = session.memory_bytes() if isinstance(session, OnDevice) else None
        return protocol.Opened(number, memory_bytes, cuda_graph_of(session))

    def _time(self, numbers: tuple[int, ...]) -> protocol.Times:
        """Time sessions in this order, once clocks that fell between two requests have had RAMP_MS to rise."""
        sessions = [self._session(number) for number in numbers]
        ran_ms = 0.0
        with self.alone():
            while sessions and ran_ms < RAMP_MS:
                ran_ms += RUNS_PER_TIMING * sessions[0].time_ms()
            return protocol.Times(tuple(session.time_ms() for session in sessions))

    def _session(self, number: int) -> Session:
        if number not in self.opened:
            raise InputError(f"session {number} is not open: {REPORT}")
        return self.opened[number]


class _Forward(logging.Handler):
    """Sends log lines to the workstation."""

    def __init__(self, send: Callable[[protocol.Message], None]) -> None:
        super().__init__(logging.INFO)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line; ignored where the workstation is gone."""
        with suppress(OSError):
            self._send(protocol.Logged(record.levelno, record.getMessage()))


def serve(
    requests: IO[bytes],
    answers: IO[bytes],
    work: Path,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Answer requests until the connection closes or SIGTERM. Sessions are freed and clocks restored in any case.

    `alone` is entered while something is timed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def send(message: protocol.Message) -> None:
        protocol.write(answers, message)

    worker, logger = Worker(work.expanduser(), send, alone), logging.getLogger("edgeprune")
    handler = _Forward(send)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        while (request := protocol.read_request(requests)) is not None:
            try:
                answer = worker.answer(request)
            except EdgepruneError as error:
                answer = protocol.Failed(type(error).__name__, str(error))
            except OSError as error:
                answer = protocol.Failed(
                    HostError.__name__, f"on the device: {error}: correct that there and run the command again"
                )
            except Exception as error:  # the workstation must be informed of any error
                answer = protocol.Failed(
                    EngineError.__name__, f"on the device: {type(error).__name__}: {error}: {REPORT}"
                )
            if answer is not None:
                send(answer)
    except ValueError as error:  # from msgspec, for anything but a message
        send(
            protocol.Failed(
                HostError.__name__,
                f"a message that the device does not understand ({error}): install the same version there",
            )
        )
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    finally:
        worker.close()
        logger.removeHandler(handler)

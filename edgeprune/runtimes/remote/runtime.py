"""The runtime of another machine over ssh: engines are compiled, timed and run there, and kept here."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edgeprune import errors
from edgeprune.errors import EdgepruneError, EngineError, HostError, OutputError
from edgeprune.io import replacing, sha256_file, write_bytes
from edgeprune.onnx_graph.graph import weights_of
from edgeprune.records import Device, GpuState, Progress, Setup, silent
from edgeprune.runtimes import Session
from edgeprune.runtimes.remote import protocol
from edgeprune.runtimes.remote.ssh import Channel, Host
from edgeprune.version import __version__

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

M = TypeVar("M", bound=protocol.Message)
_CHANNELS: weakref.WeakValueDictionary[Host, Channel] = weakref.WeakValueDictionary()  # a device has one worker


class RemoteRuntime:
    """Talks to `edgeprune worker` on `host` over one connection, which ends with this object or the process.

    Latencies are measured on the device by its own clock, without the network.
    """

    def __init__(self, device: Device, host: Host, lock_clocks: bool = False) -> None:
        self.device, self.lock_clocks = device, lock_clocks
        before = _CHANNELS.get(host)
        if before is not None:  # of an earlier command, kept alive by a traceback, for example
            before.leave()
        _CHANNELS[host] = self.channel = Channel(host, f"{host.program} worker")
        weakref.finalize(self, self.channel.leave)
        self.suffix, self.parity = "", 0.0  # set by setup()
        self._free: int | None = None

    def setup(self, device: Device, precision: str, batch: int) -> Setup:
        """The setup of the device's own runtime. Raises HostError, and the errors of that runtime."""
        hello = protocol.Prepare(__version__, device, precision, batch, self.lock_clocks)
        ready = self.ask(hello, protocol.Ready)
        self.suffix, self.parity, self._free = ready.suffix, ready.parity, ready.free_bytes
        return ready.setup

    def free_bytes(self) -> int | None:
        """Free bytes on the device when the connection was made; None where memory is not a limit."""
        return self._free

    def compile(self, onnx: Path, setup: Setup, out: Path, progress: Progress = silent) -> None:
        """Compile there and fetch the engine and its log. Raises EngineError, OutputError, HostError."""
        made = self.ask(protocol.Compile(self._sent(onnx), onnx.name), protocol.Compiled, progress)
        piece = self.ask(protocol.Get(made.sha256), protocol.Put)
        with replacing(out) as temporary, open(temporary, "wb") as file:
            file.write(piece.data)
            while not piece.last:
                piece = self._answer(protocol.Put)
                file.write(piece.data)
        digest = sha256_file(out)
        if digest != made.sha256:
            out.unlink()
            raise HostError(
                f"an engine arrived damaged (sha256 {digest[:12]}…, not {made.sha256[:12]}…): run the command again"
            )
        write_bytes(out.with_suffix(".log"), made.log.encode())

    def open(self, path: Path, setup: Setup) -> RemoteSession:
        """Load an engine there. Raises EngineError, HostError."""
        opened = self.ask(protocol.Open(self._sent(path), path.name), protocol.Opened)
        kind = RemoteSession if opened.memory_bytes is None else RemoteGpuSession
        return kind(self, opened)

    def gpu_state(self) -> GpuState | None:
        """Clock, temperature and throttling of the GPU there; None where it cannot be read. Raises HostError."""
        return self.ask(protocol.State(), protocol.StateIs).state

    def ask(self, request: protocol.Message, kind: type[M], progress: Progress = silent) -> M:
        """Send a request and wait for its answer, of class `kind`. Raises HostError, or the error on the device."""
        try:
            protocol.write(self.channel.stdin, request)
        except OSError:
            raise self.channel.failure() from None
        return self._answer(kind, progress)

    def _answer(self, kind: type[M], progress: Progress = silent) -> M:
        while True:
            try:
                answer = protocol.read_answer(self.channel.stdout)
            except ValueError as error:  # for example a greeting of the login shell
                raise HostError(
                    f"{self.channel.host.address} sent an invalid reply ({error}): "
                    "make sure that its shell prints nothing at login"
                ) from None
            match answer:
                case None:
                    raise self.channel.failure()
                case protocol.Progressed(what, done, total):
                    progress(what, done, total)
                case protocol.Logged(level, text):
                    log.log(level, "%s: %s", self.channel.host.address, text)
                case protocol.Failed(name, text):
                    found = getattr(errors, name, EngineError)
                    raise (found if issubclass(found, errors.EdgepruneError) else EngineError)(text)
                case _:
                    if not isinstance(answer, kind):
                        name = type(answer).__name__
                        raise HostError(
                            f"the device answered {name}, not {kind.__name__}: install the same version there"
                        )
                    return answer

    def _sent(self, path: Path) -> dict[str, str]:
        """Names and sha256 of a file and of the weight files next to it; those that the device lacks are sent."""
        paths = [path, *(weights_of(path) if path.suffix == ".onnx" else ())]
        files = {_hash(p, p.stat().st_mtime_ns, p.stat().st_size): p for p in paths}
        for sha256 in self.ask(protocol.Missing(tuple(files)), protocol.Names).sha256:
            with open(files[sha256], "rb") as file:
                piece = file.read(protocol.PIECE_BYTES)
                while True:
                    following = file.read(protocol.PIECE_BYTES)
                    message = protocol.Put(sha256, piece, not following)
                    if not following:
                        self.ask(message, protocol.Done)
                        break
                    try:
                        protocol.write(self.channel.stdin, message)
                    except OSError:
                        raise self.channel.failure() from None
                    piece = following
        return {p.name: sha256 for sha256, p in files.items()}


class RemoteSession:
    """An engine that is open on the device."""

    def __init__(self, runtime: RemoteRuntime, opened: protocol.Opened) -> None:
        self._runtime, self._number, self._memory_bytes = runtime, opened.session, opened.memory_bytes
        self.cuda_graph = opened.cuda_graph

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, values) fp32 outputs of one batch, fp32. Raises EngineError on a wrong shape, HostError."""
        data = np.ascontiguousarray(images, np.float32)
        output = self._runtime.ask(protocol.Infer(self._number, data.shape, data.tobytes()), protocol.Output)
        return np.frombuffer(output.data, np.float32).reshape(output.shape)

    def time_ms(self) -> float:
        """One inference there after an untimed one, ms. Raises EngineError, HostError."""
        return self.times_ms([self])[0]

    def times_ms(self, order: Sequence[Session]) -> list[float]:
        """time_ms() of each of these sessions on the same machine, in one request. Raises EngineError, HostError."""
        numbers = tuple(session._number for session in order if isinstance(session, RemoteSession))
        assert len(numbers) == len(order)
        return list(self._runtime.ask(protocol.Time(numbers), protocol.Times).ms)

    def fused_attention(self) -> int | None:
        """Attention layers that run as one fused kernel; None where the engine on the device does not say."""
        value = self._runtime.ask(protocol.Fused(self._number), protocol.Value).value
        return None if value is None else int(value)

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close()
        elif issubclass(kind, EdgepruneError) and not issubclass(kind, (HostError, OutputError)):
            with suppress(EdgepruneError):  # the first error is the one to report
                self._close()
        # after any other error the connection may be out of step, and ends with the process

    def _close(self) -> None:
        self._runtime.ask(protocol.Close(self._number), protocol.Done)


class RemoteGpuSession(RemoteSession):
    """An engine that is open in the memory of a GPU there."""

    def memory_bytes(self) -> int:
        """Bytes that the engine takes there."""
        assert self._memory_bytes is not None
        return self._memory_bytes


@lru_cache(maxsize=256)
def _hash(path: Path, mtime_ns: int, size: int) -> str:
    return sha256_file(path)

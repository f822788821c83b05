"""The messages between a workstation and the worker on a device: length-prefixed MessagePack over pipes."""

from __future__ import annotations

from typing import IO, TypeVar

import msgspec

from edgeprune.records import Device, GpuState, Setup

MAX_FRAME_BYTES = 512 << 20
PIECE_BYTES = 4 << 20  # of a file in one frame
HEAD_BYTES = 4  # length of a frame, big-endian


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the class name is sent as their tag."""


# ---- to the device


class Prepare(Message, frozen=True):
    """First message. Answered by Ready."""

    version: str
    device: Device
    precision: str
    batch: int
    lock_clocks: bool = False


class Missing(Message, frozen=True):
    """Which of these files, by sha256, does the device lack? Answered by Names."""

    sha256: tuple[str, ...]


class Put(Message, frozen=True):
    """A piece of a file. Only the last is answered, by Done."""

    sha256: str
    data: bytes
    last: bool


class Compile(Message, frozen=True):
    """Build an engine from `main` among `files` (name -> sha256). Answered by Compiled."""

    files: dict[str, str]
    main: str


class Get(Message, frozen=True):
    """Fetch a file that the device made. Answered by several Put."""

    sha256: str


class Open(Message, frozen=True):
    """Load an engine. Answered by Opened."""

    files: dict[str, str]
    main: str


class Time(Message, frozen=True):
    """Latencies of these sessions, one after the other, each after an untimed inference. Answered by Times."""

    sessions: tuple[int, ...]


class State(Message, frozen=True):
    """What decides the GPU's speed now? Answered by StateIs."""


class Infer(Message, frozen=True):
    """Run one batch, fp32, C order. Answered by Output."""

    session: int
    shape: tuple[int, ...]
    data: bytes


class Fused(Message, frozen=True):
    """How many attention layers run as one kernel? Answered by Value."""

    session: int


class Close(Message, frozen=True):
    """Free a session. Answered by Done."""

    session: int


# ---- from the device


class Ready(Message, frozen=True):
    """The setup on the device, and the constants of its runtime."""

    setup: Setup
    suffix: str
    parity: float
    free_bytes: int | None


class Names(Message, frozen=True):
    """Files by sha256."""

    sha256: tuple[str, ...]


class Compiled(Message, frozen=True):
    """An engine, which Get fetches, and its build log."""

    sha256: str
    log: str


class Opened(Message, frozen=True):
    """A session's number, the memory of the device that it takes, and if it runs as a CUDA graph; None is unknown."""

    session: int
    memory_bytes: int | None
    cuda_graph: bool | None = None


class Times(Message, frozen=True):
    """Latencies, ms."""

    ms: tuple[float, ...]


class StateIs(Message, frozen=True):
    """The state of the GPU; None is unknown."""

    state: GpuState | None


class Value(Message, frozen=True):
    """A figure; None is unknown."""

    value: float | None


class Output(Message, frozen=True):
    """Outputs of one batch, fp32, C order; several are one array (features.packed)."""

    shape: tuple[int, ...]
    data: bytes


class Done(Message, frozen=True):
    """The request is carried out."""


class Progressed(Message, frozen=True):
    """Progress on the device; sent before an answer."""

    what: str
    done: int
    total: int


class Logged(Message, frozen=True):
    """A line of the device's log; sent before an answer."""

    level: int
    text: str


class Failed(Message, frozen=True):
    """An error, by the name of its class in errors.py."""

    kind: str
    text: str


Request = Prepare | Missing | Put | Compile | Get | Open | Time | State | Infer | Fused | Close
Answer = (
    Ready | Names | Put | Compiled | Opened | Value | Times | StateIs | Output | Done | Progressed | Logged | Failed
)
_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_answers = msgspec.msgpack.Decoder(Answer)
T = TypeVar("T")


def write(pipe: IO[bytes], message: Message) -> None:
    """Send one message. Raises OSError where the connection is closed."""
    data = _encoder.encode(message)
    pipe.write(len(data).to_bytes(HEAD_BYTES, "big") + data)
    pipe.flush()


def read_request(pipe: IO[bytes]) -> Request | None:
    """The next message to the device, None at the end. Raises ValueError for anything else."""
    return _read(pipe, _requests)


def read_answer(pipe: IO[bytes]) -> Answer | None:
    """The next message from the device, None at the end. Raises ValueError for anything else."""
    return _read(pipe, _answers)


def _read(pipe: IO[bytes], decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    head = pipe.read(HEAD_BYTES)
    if len(head) < HEAD_BYTES:
        return None
    size = int.from_bytes(head, "big")
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {size} bytes")
    data = pipe.read(size)
    return decoder.decode(data) if len(data) == size else None

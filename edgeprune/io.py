"""Records, arrays and bytes from and to files: read with a size limit, written atomically."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import OutputError, RecordError
from edgeprune.records import SCHEMA, Record
from edgeprune.version import __version__

MAX_RECORD_BYTES = 64 << 20
CODE = (".py", ".toml", ".j2", ".css")
NPY: Any = np.lib.format  # numpy 2.2, the last for Python 3.10, has no types for it
T = TypeVar("T", bound=Record)


class _Origin(msgspec.Struct):
    """What a file of any version says about itself."""

    schema: int | None = None
    edgeprune: str | None = None


def decode(data: bytes, kind: type[T], source: str) -> T:
    """A record from JSON bytes. Raises RecordError, which names the invalid field or the version that wrote it."""
    try:
        record = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _check_origin(data, source)
        raise RecordError(
            f"{source}: not a valid {kind.__name__.lower()} file ({error}): write it again with edgeprune"
        ) from None
    if getattr(record, "schema", SCHEMA) != SCHEMA:
        _check_origin(data, source)
    return record


def _check_origin(data: bytes, source: str) -> None:
    """Raise RecordError for a file of another schema or another version of edgeprune."""
    try:
        found = msgspec.json.decode(data, type=_Origin)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    wrote = found.edgeprune if re.fullmatch(r"[\w.+-]{1,40}", found.edgeprune or "") else None
    if found.schema not in (None, SCHEMA):
        named = f" ({wrote})" if wrote else ""
        raise RecordError(
            f"{source}: schema {found.schema}, not {SCHEMA}: use the version of edgeprune that wrote it{named}"
        )
    if wrote not in (None, __version__):
        raise RecordError(
            f"{source}: written by edgeprune {wrote}, which edgeprune {__version__} cannot read: use that version, "
            "or write it again with this one"
        )


def load(path: Path, kind: type[T]) -> T:
    """Read a record from a JSON file. Raises RecordError."""
    return decode(read_bytes(path), kind, str(path))


def read_bytes(path: Path, limit: int = MAX_RECORD_BYTES) -> bytes:
    """The content of a file. Raises RecordError if it cannot be read or is larger than `limit` bytes."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise RecordError(f"{path}: {size} bytes, more than the {limit} allowed: check the path")
            return file.read()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def load_array(path: Path, advice: str = "build again") -> NDArray[np.float32]:
    """The array in an fp32 .npy file; its header is checked against the file size first. Raises RecordError."""
    try:
        with open(path, "rb") as file:
            read = {(1, 0): NPY.read_array_header_1_0, (2, 0): NPY.read_array_header_2_0}
            shape, _, kind = read[NPY.read_magic(file)](file)
            left = os.fstat(file.fileno()).st_size - file.tell()
            if kind != np.float32 or left != 4 * math.prod(shape):
                raise ValueError("not fp32, or cut short")
        array: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, which can raise anything
        raise RecordError(f"{path}: not an fp32 array ({' '.join(str(error).split())[:120]}): {advice}") from None
    return array


def save_array(array: NDArray[Any], path: Path) -> None:
    """Write an array as .npy atomically. Raises OutputError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def encode(record: Record) -> bytes:
    """A record as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def save(record: Record, path: Path) -> None:
    """Write a record atomically. Raises OutputError."""
    write_bytes(path, encode(record))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part. Raises OutputError."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn an OSError from writing `path` into an OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            hint = "free some space or choose another --out / --work"
        else:
            hint = "choose a folder you may write to"
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}): {hint}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that replaces `path` if the block succeeds. Raises OutputError."""
    with writable(path):
        check_replaceable(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o644)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Make the folder of a file that will be written; tell now what would be told after long work.

    Raises OutputError for a device or a pipe, which would be replaced by a file, and where nothing can be written.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OutputError(f"{path}: is not a regular file: choose another path")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def sha256_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """A key for content: the first 16 hexadecimal digits of the hash of the parts as JSON."""
    return sha256_bytes(msgspec.json.encode(parts, order="deterministic"))[:16]


@lru_cache(maxsize=1)
def code_key() -> str:
    """Hash of the package's code, device files and page templates, once per process: a change redoes all steps."""
    package = Path(__file__).parent
    files = sorted(path for path in package.rglob("*") if path.suffix in CODE)
    return key_of([(path.relative_to(package).as_posix(), sha256_file(path)) for path in files])

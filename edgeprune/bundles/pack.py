"""A bundle as one file, a .tar.zst that is the same for the same bundle, for tools that carry files to devices."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import zstandard

from edgeprune.bundles.format import GOLDEN, MANIFEST, ONNX, check_files, load_bundle, remove_stale, version_name
from edgeprune.bundles.signature import sign, signature_path, verified
from edgeprune.errors import InputError
from edgeprune.io import MAX_RECORD_BYTES, decode, replacing, sha256_file, writable, write_bytes
from edgeprune.records import Manifest, Progress, silent

SUFFIX = ".tar.zst"
LEVEL = 3  # zstd's default; weights hardly compress at any level
BLOCK = tarfile.BLOCKSIZE
PIECE_BYTES = 1 << 20
ONNX_PER_ENGINE = 16  # an fp32 ONNX is 4 times its INT8 engine; the rest is margin


class Packed(NamedTuple):
    """What `pack` wrote."""

    path: Path
    version: str  # the name of the bundle's folder on a device
    sha256: str
    size_bytes: int
    signature: Path | None


class Unpacked(NamedTuple):
    """What `unpack` wrote."""

    path: Path
    version: str
    signer: str | None  # None where no signature was asked for
    manifest: Manifest


def pack(bundle: Path, out: Path, key: Path | None = None, progress: Progress = silent) -> Packed:
    """Write a bundle as one file: manifest.json first, then the files it lists, by name.

    The bytes depend on the contents alone, not on times, owners or the order of the folder, as long as the version
    of zstd is the same. With `key`, an OpenSSH private key, its signature is written to OUT.sig; without one, a
    signature of an earlier file there is removed. Raises InputError for a damaged or simulated bundle, OutputError,
    MissingError without ssh-keygen.
    """
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX:
        raise InputError(f"{out}: the file to write must end in {SUFFIX}: choose another name")
    manifest = load_bundle(bundle)
    version, beside = version_name(bundle, manifest), signature_path(out)
    files = [bundle / name for name in (MANIFEST, *sorted(manifest.files))]
    with replacing(out) as temporary:
        with open(temporary, "wb") as target:
            _write(files, target, progress)
        signature = sign(temporary, key) if key else None
        digest, size = sha256_file(temporary), temporary.stat().st_size
        beside.unlink(missing_ok=True)
    if signature is None:
        return Packed(out, version, digest, size, None)
    write_bytes(beside, signature)
    return Packed(out, version, digest, size, beside)


def _write(files: list[Path], target: IO[bytes], progress: Progress) -> None:
    """Files as a tar without times and owners, compressed."""
    whole, done = sum(file.stat().st_size for file in files), 0
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    with (
        compressor.stream_writer(target, closefd=False) as writer,
        tarfile.open(fileobj=writer, mode="w|", format=tarfile.GNU_FORMAT) as archive,
    ):
        for file in files:
            progress(f"packing {file.name}", done, whole)
            entry = tarfile.TarInfo(file.name)
            entry.size, entry.mode = file.stat().st_size, 0o644
            with open(file, "rb") as data:
                archive.addfile(entry, data)
            done += entry.size


def unpack(
    file: Path,
    out: Path,
    allowed_signers: Path | None = None,
    signer: str | None = None,
    unsigned: bool = False,
    progress: Progress = silent,
) -> Unpacked:
    """Check the signature FILE.sig, unpack a file of `pack` and check all hashes; the folder `out` appears whole.

    `allowed_signers` is a list as in ssh-keygen(1); with `signer` only that name of it will do. `unsigned` takes a
    file without looking for a signature. `out` must be absent or empty. Raises VerifyError for a signature that is
    missing or wrong, InputError for anything but a whole bundle, OutputError, MissingError without ssh-keygen.
    """
    if (allowed_signers is None) is not unsigned:
        raise InputError(
            "exactly one is needed: pass --allowed-signers FILE, or --unsigned to skip the signature check"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already: choose another folder, or remove it")
    try:
        data = open(file, "rb")  # noqa: SIM115 checked and unpacked through one handle
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}): check the path") from None
    with data:
        who = verified(data, file, allowed_signers, signer) if allowed_signers else None
        data.seek(0)
        with writable(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(out)
            fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
            try:
                manifest = _Archive(data, file, progress).extract(fresh)
                check_files(fresh, manifest, file)
                version = version_name(fresh, manifest)
                os.chmod(fresh, 0o755)
                _sync(fresh)
                os.rename(fresh, out)
                _sync(out.parent)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return Unpacked(out, version, who, manifest)


class _Archive:
    """Reads what `pack` wrote and nothing else: regular files with the names in the manifest, which comes first."""

    def __init__(self, data: IO[bytes], source: Path, progress: Progress) -> None:
        self.source, self.progress = source, progress
        self.data, self.whole = data, os.fstat(data.fileno()).st_size
        self.reader = zstandard.ZstdDecompressor().stream_reader(data, closefd=False)

    def extract(self, folder: Path) -> Manifest:
        """Write the files into `folder`. Raises InputError; hashes are not looked at."""
        entry = self._next()
        if entry is None or entry.name != MANIFEST or entry.size > MAX_RECORD_BYTES:
            raise self._unusable(f"it does not begin with {MANIFEST}")
        self._copy(entry, folder)
        manifest = decode((folder / MANIFEST).read_bytes(), Manifest, f"{self.source}: {MANIFEST}")
        left = set(manifest.files) - {MANIFEST}
        while (entry := self._next()) is not None:
            if entry.name not in left:
                raise self._unusable(f"{entry.name!r} is not in the manifest, or appears twice")
            if entry.size > most_bytes(manifest, entry.name):
                raise self._unusable(f"{entry.name} has {entry.size} bytes, more than its manifest allows")
            left.remove(entry.name)
            self._copy(entry, folder)
        return manifest

    def _next(self) -> tarfile.TarInfo | None:
        """The header of the next file; None at the end. Raises InputError for anything but a file of this folder."""
        header = self._read(BLOCK)
        if not header.strip(b"\0"):
            return None
        try:
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise self._unusable(f"not a tar header: {error}") from None
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.size < 0:
            raise self._unusable(f"{entry.name!r} is not a regular file")
        return entry

    def _copy(self, entry: tarfile.TarInfo, folder: Path) -> None:
        """Write the content that follows its header."""
        left = entry.size
        with open(folder / entry.name, "xb") as file:
            while left:
                self.progress(f"unpacking {entry.name}", self.data.tell(), self.whole)
                piece = self._read(min(left, PIECE_BYTES))
                file.write(piece)
                left -= len(piece)
            file.flush()
            os.fsync(file.fileno())
        self._read(-entry.size % BLOCK)

    def _read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises InputError."""
        try:
            found = self.reader.read(size) if size else b""
        except zstandard.ZstdError as error:
            raise self._unusable(str(error)) from None
        if len(found) != size:
            raise self._unusable("it is cut short")
        return found

    def _unusable(self, why: str) -> InputError:
        return InputError(
            f"{self.source} is damaged or was not written by edgeprune pack ({why}): copy or pack it again"
        )


def most_bytes(manifest: Manifest, name: str) -> int:
    """The size that a file of a bundle can have at most, in bytes, so that a small archive cannot fill the disk."""
    setup, vit = manifest.engine.setup, manifest.vit
    golden = dict(zip(GOLDEN, (3 * prod(vit.size), vit.values), strict=True))
    if name == manifest.engine.path:
        return manifest.engine.size_bytes
    if name in golden:
        return 4 * setup.batch * golden[name] + MAX_RECORD_BYTES
    if name == ONNX or name.endswith(".weights"):
        return ONNX_PER_ENGINE * manifest.engine.size_bytes + MAX_RECORD_BYTES
    return MAX_RECORD_BYTES


def _sync(folder: Path) -> None:
    """Write a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

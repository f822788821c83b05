"""Copies bundles to devices over OpenSSH: resumed, checked by hash, verified there, then switched to by one link."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgeprune.bundles.format import MANIFEST, load_bundle, version_name
from edgeprune.bundles.remote_folder import CURRENT, PREVIOUS, RemoteFolder
from edgeprune.errors import EdgepruneError, HostError, InputError, RecordError
from edgeprune.io import read_bytes, sha256_file
from edgeprune.records import Progress, Record, silent
from edgeprune.runtimes.remote.ssh import Host

MAX_TOML_BYTES = 64 << 10
AT_ONCE = 8  # hosts


class Destination(Record, frozen=True, kw_only=True):
    """A folder on another machine."""

    host: str  # USER@HOST, or a name of ~/.ssh/config
    dir: str
    program: str = "edgeprune"  # edgeprune there, for verify
    device: str | None = None  # what it is, as in --device: `sweep` measures there

    @property
    def text(self) -> str:
        """HOST:DIR."""
        return f"{self.host}:{self.dir}"


class Fleet(Record, frozen=True, kw_only=True):
    """hosts.toml: one [[to]] table for each destination."""

    to: tuple[Destination, ...]


class Shipped(NamedTuple):
    """The result at one destination.

    `state` is switched, current (it was current already), mended (it was, with damaged files, which were replaced) or
    failed; after a canary that failed also rolled back, for what had been switched, and untouched, for what was not
    reached.
    """

    to: str
    state: str
    detail: str
    sent_bytes: int = 0
    canary: bool = False
    latency_ms: dict[str, float] | None = None  # of a canary, measured there: median, p99, low, high, p90
    speedup_to_previous: float | None = None  # of a canary, where it was compared


def destination(text: str, program: str = "edgeprune") -> Destination:
    """Parse USER@HOST:DIR. Raises InputError."""
    host, colon, folder = text.rpartition(":") if text.count(":") == 1 else text.partition("]:")
    host = f"{host}]" if colon == "]:" else host
    if not (host and colon and folder):
        raise InputError(f"{text!r} is not a destination: write USER@HOST:DIR")
    return Destination(host=host, dir=folder, program=program)


def fleet(path: Path) -> tuple[Destination, ...]:
    """The destinations of a hosts.toml. Raises RecordError."""
    try:
        found = msgspec.toml.decode(read_bytes(path, MAX_TOML_BYTES), type=Fleet)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise RecordError(f"{path}: not a list of hosts: {detail}: write [[to]] tables with host and dir") from None
    if not found.to:
        raise RecordError(f"{path}: no hosts in it: write [[to]] tables with host and dir")
    return found.to


def remote_folder(to: Destination, incoming: str = "") -> RemoteFolder:
    """The folder of a destination."""
    return RemoteFolder(Host(to.host, to.program), to.dir, incoming)


def ship_all(bundle: Path, to: Sequence[Destination], progress: Progress = silent) -> list[Shipped]:
    """Ship to several destinations at once; with a single one, progress counts bytes. Raises InputError."""
    load_bundle(bundle)
    if len(to) == 1:
        return [ship(bundle, to[0], progress)]
    return each(lambda where: ship(bundle, where), to, progress)


def each(
    action: Callable[[Destination], Shipped], to: Sequence[Destination], progress: Progress = silent
) -> list[Shipped]:
    """Run an action at several destinations at once; a failure at one does not affect the others."""

    def one(where: Destination) -> Shipped:
        try:
            return action(where)
        except EdgepruneError as error:
            return Shipped(where.text, "failed", " ".join(str(error).split()))

    done: list[Shipped] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for result in pool.map(one, to):
            done.append(result)
            progress("shipping", len(done), len(to))
    return done


def ship(bundle: Path, to: Destination, progress: Progress = silent) -> Shipped:
    """Copy a bundle to DIR/<name>-<hash>, verify it there, then point the link DIR/current at it.

    DIR/previous points at the version before; older ones are removed. Interrupted copies are resumed, and damaged
    files of a version that is there already are replaced. The host needs a POSIX shell, coreutils, flock and
    edgeprune. Raises HostError, in which case the link DIR/current is unchanged, and InputError for a damaged or
    simulated bundle.
    """
    manifest = load_bundle(bundle)
    name = version_name(bundle, manifest)
    files = {**manifest.files, MANIFEST: sha256_file(bundle / MANIFEST)}
    remote = remote_folder(to, f".{name}.part")
    with remote.locked():
        sent, mended, there = 0, False, remote.has(name)
        if there:
            sent, mended = _mended(remote, bundle, name, files, progress)
            remote.verify(name, f", its {'damaged files were replaced' if mended else 'files are unchanged'}")
        else:
            sent = remote.fill(bundle, files, progress)
            remote.verify(f".{name}.part")
            remote.run(f"mv -T {remote.incoming} {remote.quoted(name)}")
        if there and remote.link(CURRENT) == name:
            return Shipped(to.text, "mended" if mended else "current", name, sent)
        remote.switch(name)
    return Shipped(to.text, "switched", name, sent)


def _mended(
    remote: RemoteFolder, bundle: Path, name: str, files: dict[str, str], progress: Progress
) -> tuple[int, bool]:
    """Replace the damaged and missing files of a version there; bytes sent, and whether there were such files.

    Each file is replaced in one step, so a reader never sees part of one. Raises HostError.
    """
    found = remote.files(remote.quoted(name))
    damaged = {file: digest for file, digest in files.items() if found.get(file, (0, ""))[1] != digest}
    if not damaged:
        return 0, False
    sent = remote.fill(bundle, damaged, progress)
    remote.replace_files(name, damaged)
    return sent, True


def roll_back(to: Destination) -> Shipped:
    """Verify the previous version and point DIR/current at it again. Raises HostError."""
    remote = remote_folder(to)
    with remote.locked():
        name = remote.link(PREVIOUS)
        if not re.fullmatch(r"[\w.-]+", name):
            raise HostError(f"{to.text} has no previous version: ship one")
        remote.verify(name)
        remote.switch(name)
    return Shipped(to.text, "switched", name)

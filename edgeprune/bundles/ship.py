"""Copies bundles to devices over OpenSSH: resumed, checked by hash, verified there, then switched to by one link."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgeprune.bundles.format import MANIFEST, load_bundle
from edgeprune.errors import EdgepruneError, HostError, InputError, RecordError
from edgeprune.io import read_bytes, sha256_file
from edgeprune.records import Progress, Record, silent
from edgeprune.runtimes.remote.ssh import Channel, Host

MAX_TOML_BYTES = 64 << 10
PIECE_BYTES = 1 << 20
AT_ONCE = 8  # hosts
BUSY = 75  # EX_TEMPFAIL of sysexits.h
CURRENT, PREVIOUS = "current", "previous"


class Destination(Record, frozen=True, kw_only=True):
    """A folder on another machine."""

    host: str  # USER@HOST, or a name of ~/.ssh/config
    dir: str
    program: str = "edgeprune"  # edgeprune there, for verify
    device: str | None = None  # what it is, as in --device: `sweep` measures there


class Fleet(Record, frozen=True, kw_only=True):
    """hosts.toml: one [[to]] table for each destination."""

    to: tuple[Destination, ...]


class Shipped(NamedTuple):
    """The result at one destination: `state` is switched, current (it was current already) or failed."""

    to: str
    state: str
    detail: str
    sent_bytes: int = 0


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
            return Shipped(f"{where.host}:{where.dir}", "failed", " ".join(str(error).split()))

    done: list[Shipped] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for result in pool.map(one, to):
            done.append(result)
            progress("shipping", len(done), len(to))
    return done


def ship(bundle: Path, to: Destination, progress: Progress = silent) -> Shipped:
    """Copy a bundle to DIR/<name>-<hash>, verify it there, then point the link DIR/current at it.

    DIR/previous points at the version before; older ones are removed. Interrupted copies are resumed. The host needs
    a POSIX shell, coreutils, flock and edgeprune. Raises HostError, in which case DIR/current is unchanged, and
    InputError for a damaged or simulated bundle.
    """
    manifest = load_bundle(bundle)
    digest = sha256_file(bundle / MANIFEST)
    schedule, setup = manifest.schedule, manifest.engine.setup
    if setup.simulated:
        raise InputError(f"{bundle} is simulated, it has no engine for a device: build it on the device first")
    name = f"{manifest.vit.name}-{schedule.method}-{setup.precision}-b{setup.batch}-{digest[:12]}"
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{name!r} cannot be the name of a folder: rename the model")
    files = {**manifest.files, MANIFEST: digest}
    remote = _RemoteFolder(to, f".{name}.part")
    where = f"{to.host}:{to.dir}"
    with remote.locked():
        if remote.run(f"readlink {CURRENT} || true").strip() == name:
            remote.verify(name)
            return Shipped(where, "current", name)
        sent = 0
        if remote.run(f"test -d {remote.quoted(name)} && echo there || true").strip() != "there":
            sent = remote.fill(bundle, files, progress)
            remote.verify(f".{name}.part")
            remote.run(f"mv {remote.incoming} {remote.quoted(name)}")
        else:
            remote.verify(name)
        remote.switch(name)
    return Shipped(where, "switched", name, sent)


def roll_back(to: Destination) -> Shipped:
    """Verify the previous version and point DIR/current at it again. Raises HostError."""
    remote = _RemoteFolder(to, "")
    with remote.locked():
        name = remote.run(f"readlink {PREVIOUS} || true").strip()
        if not re.fullmatch(r"[\w.-]+", name):
            raise HostError(f"{to.host}:{to.dir} has no previous version: ship one")
        remote.verify(name)
        remote.switch(name)
    return Shipped(f"{to.host}:{to.dir}", "switched", name)


class _RemoteFolder:
    """Commands in a folder on another machine."""

    def __init__(self, to: Destination, incoming: str) -> None:
        self.to, self.host = to, Host(to.host, to.program)
        self.incoming = self.quoted(incoming)

    @staticmethod
    def quoted(name: str) -> str:
        """A name quoted for the shell; never taken for an option."""
        return shlex.quote(f"./{name}")

    def _inside(self, script: str) -> str:
        """`script` preceded by a cd into the folder, which may begin with ~/."""
        first, _, rest = self.to.dir.partition("/")
        place = f'"$HOME"/{shlex.quote(rest)}' if first == "~" else shlex.quote(self.to.dir)
        return f"set -e; mkdir -p -- {place}; cd -- {place}; {script}"

    def run(self, script: str) -> str:
        """The output of a script. Raises HostError where it fails."""
        with Channel(self.host, self._inside(script)) as channel:
            said = channel.stdout.read().decode(errors="replace")
            if channel.end():
                raise channel.failure()
        return said

    def locked(self) -> Channel:
        """Lock the folder until the channel ends or the connection is lost. Raises HostError."""
        script = f"exec 9>.ship.lock; flock -n 9 || exit {BUSY}; echo ready; cat >/dev/null"
        channel = Channel(self.host, self._inside(script))
        if channel.stdout.readline().strip() != b"ready":
            if channel.end() == BUSY:
                raise HostError(f"{self.to.host}:{self.to.dir}: another ship is running: wait for it")
            raise channel.failure()
        return channel

    def fill(self, bundle: Path, files: dict[str, str], progress: Progress) -> int:
        """Send what the host lacks of all files (name -> sha256) and check their hashes; the number of bytes sent."""
        there, sent = self._files(), 0
        whole = sum((bundle / name).stat().st_size for name in files)
        for name in files:
            progress(f"sending {name}", sent, whole)
            file, (size, digest) = bundle / name, there.get(name, (0, ""))
            start = size if 0 < size <= file.stat().st_size and digest == _hash_of_start(file, size) else 0
            if start < file.stat().st_size or size == 0:
                sent += self._send(file, start)
        there = self._files()
        for name, wanted in files.items():
            found = there.get(name, (0, ""))[1]
            if found != wanted:
                self.run(f"rm -f {self.incoming}/{shlex.quote(name)}")
                raise HostError(
                    f"{name} arrived damaged (sha256 {found[:12]}…, not {wanted[:12]}…): run the command again"
                )
        return sent

    def _files(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and sha256 of the files that have arrived, by name."""
        script = 'for f in *; do if [ -f "$f" ]; then echo "$(wc -c < "$f") $(sha256sum < "$f") $f"; fi; done'
        lines = self.run(f"mkdir -p {self.incoming}; cd {self.incoming}; {script}").splitlines()
        rows = (line.split(None, 3) for line in lines)  # sha256sum writes "hash  -"
        return {name: (int(size), digest) for size, digest, _, name in rows}

    def _send(self, file: Path, start: int) -> int:
        """Send a file from byte `start` on and append it; the number of bytes sent."""
        place = f"{self.incoming}/{shlex.quote(file.name)}"
        with (
            Channel(self.host, self._inside(f"cat {'>>' if start else '>'} {place}")) as channel,
            open(file, "rb") as data,
        ):
            data.seek(start)
            while piece := data.read(PIECE_BYTES):
                try:
                    channel.stdin.write(piece)
                except OSError:
                    raise channel.failure() from None
            if channel.end():
                raise channel.failure()
        return file.stat().st_size - start

    def verify(self, name: str) -> None:
        """Run `edgeprune verify` there. Raises HostError with the last line of its output."""
        with Channel(self.host, self._inside(f"{self.to.program} verify {self.quoted(name)} 2>&1")) as channel:
            said = channel.stdout.read().decode(errors="replace").strip().splitlines()
            if channel.end():
                if not said:
                    raise channel.failure()
                raise HostError(f"verify at {self.to.host} failed, {CURRENT} is unchanged: {said[-1][:400]}")

    def switch(self, name: str) -> None:
        """Point `current` at `name` and `previous` at the version before, each in one step; remove older versions."""
        link = shlex.quote(name)
        self.run(
            f"old=$(readlink {CURRENT} || true); "
            f'if [ -n "$old" ] && [ "$old" != {link} ]; then ln -s -- "$old" .{PREVIOUS}.new; '
            f"mv -fT .{PREVIOUS}.new {PREVIOUS}; fi; "
            f"rm -f .{CURRENT}.new; ln -s -- {link} .{CURRENT}.new; mv -fT .{CURRENT}.new {CURRENT}; sync; "
            f"for one in *-{12 * '[0-9a-f]'}; do "  # versions before the previous one
            f'[ "$one" = {link} ] || [ "$one" = "$(readlink {PREVIOUS})" ] || [ ! -f "$one/{MANIFEST}" ] '
            '|| rm -rf -- "./$one"; done'
        )


def _hash_of_start(file: Path, length: int) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as data:
        while length and (piece := data.read(min(PIECE_BYTES, length))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()

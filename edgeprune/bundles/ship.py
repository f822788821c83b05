"""Bundles to devices over OpenSSH: resumed, hash-checked and verified there before one link is switched to them."""

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
    """A folder on a machine."""

    host: str  # USER@HOST, or a name of ~/.ssh/config
    dir: str
    program: str = "edgeprune"  # edgeprune there, for verify


class Fleet(Record, frozen=True, kw_only=True):
    """hosts.toml: one [[to]] table for each destination."""

    to: tuple[Destination, ...]


class Shipped(NamedTuple):
    """How it went: `state` is switched, current (it was there already) or failed."""

    to: str
    state: str
    detail: str
    sent_bytes: int = 0


def destination(text: str, program: str = "edgeprune") -> Destination:
    """USER@HOST:DIR. Raises InputError."""
    host, colon, folder = text.rpartition(":") if text.count(":") == 1 else text.partition("]:")
    host = f"{host}]" if colon == "]:" else host
    if not (host and colon and folder):
        raise InputError(f"{text!r} is no destination: write USER@HOST:DIR")
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
    """`ship` to several at once; with one, the progress is that of its files. Raises InputError for a bad bundle."""
    load_bundle(bundle)
    if len(to) == 1:
        return [ship(bundle, to[0], progress)]
    return each(lambda where: ship(bundle, where), to, progress)


def each(
    action: Callable[[Destination], Shipped], to: Sequence[Destination], progress: Progress = silent
) -> list[Shipped]:
    """An action at several destinations at once; what fails at one does not touch the others."""

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
    """Copy a bundle to DIR/<name>-<hash>, verify it there, then let DIR/current lead to it, DIR/previous to the last.

    Versions before the last are removed. A file that was cut short goes on where it stopped. The far end needs a
    POSIX shell, coreutils, flock and edgeprune. Raises HostError, after which DIR/current leads where it
    did, and InputError for a simulated bundle.
    """
    manifest = load_bundle(bundle)
    digest = sha256_file(bundle / MANIFEST)
    schedule, setup = manifest.schedule, manifest.engine.setup
    if setup.simulated:
        raise InputError(f"{bundle} is simulated, no engine of a device: build it there, or ship what was measured")
    name = f"{manifest.vit.name}-{schedule.method}-{setup.precision}-b{setup.batch}-{digest[:12]}"
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{name!r} is no name for a folder: rename the model")
    files = {**manifest.files, MANIFEST: digest}
    far = _Far(to, f".{name}.part")
    where = f"{to.host}:{to.dir}"
    with far.locked():
        if far.run(f"readlink {CURRENT} || true").strip() == name:
            far.verify(name)
            return Shipped(where, "current", name)
        sent = 0
        if far.run(f"test -d {far.quoted(name)} && echo there || true").strip() != "there":
            sent = far.fill(bundle, files, progress)
            far.verify(f".{name}.part")
            far.run(f"mv {far.incoming} {far.quoted(name)}")
        else:
            far.verify(name)
        far.switch(name)
    return Shipped(where, "switched", name, sent)


def roll_back(to: Destination) -> Shipped:
    """Let DIR/current lead to the previous version again, once that is verified. Raises HostError."""
    far = _Far(to, "")
    with far.locked():
        name = far.run(f"readlink {PREVIOUS} || true").strip()
        if not re.fullmatch(r"[\w.-]+", name):
            raise HostError(f"{to.host}:{to.dir} has no previous version: ship one")
        far.verify(name)
        far.switch(name)
    return Shipped(f"{to.host}:{to.dir}", "switched", name)


class _Far:
    """Commands in a folder on another machine."""

    def __init__(self, to: Destination, incoming: str) -> None:
        self.to, self.host = to, Host(to.host, to.program)
        self.incoming = self.quoted(incoming)

    @staticmethod
    def quoted(name: str) -> str:
        """For a shell, never read as an option."""
        return shlex.quote(f"./{name}")

    def _inside(self, script: str) -> str:
        """`script` in the folder, which may be ~ or begin with ~/."""
        first, _, rest = self.to.dir.partition("/")
        place = f'"$HOME"/{shlex.quote(rest)}' if first == "~" else shlex.quote(self.to.dir)
        return f"set -e; mkdir -p -- {place}; cd -- {place}; {script}"

    def run(self, script: str) -> str:
        """What a script prints. Raises HostError where it fails."""
        with Channel(self.host, self._inside(script)) as channel:
            said = channel.stdout.read().decode(errors="replace")
            if channel.end():
                raise channel.trouble()
        return said

    def locked(self) -> Channel:
        """Nobody else ships into the folder until this ends, be it by a cut connection. Raises HostError."""
        script = f"exec 9>.ship.lock; flock -n 9 || exit {BUSY}; echo ready; cat >/dev/null"
        channel = Channel(self.host, self._inside(script))
        if channel.stdout.readline().strip() != b"ready":
            if channel.end() == BUSY:
                raise HostError(f"{self.to.host}:{self.to.dir}: another ship is under way: wait for it")
            raise channel.trouble()
        return channel

    def fill(self, bundle: Path, files: dict[str, str], progress: Progress) -> int:
        """Send what is missing of all files (name -> sha256) and compare hashes there; how many bytes that took."""
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
                raise HostError(f"{name} arrived as {found[:12]}…, not {wanted[:12]}…: run it again")
        return sent

    def _files(self) -> dict[str, tuple[int, str]]:
        """Size and sha256 of what has arrived, by name."""
        script = 'for f in *; do if [ -f "$f" ]; then echo "$(wc -c < "$f") $(sha256sum < "$f") $f"; fi; done'
        lines = self.run(f"mkdir -p {self.incoming}; cd {self.incoming}; {script}").splitlines()
        rows = (line.split(None, 3) for line in lines)  # sha256sum writes "hash  -"
        return {name: (int(size), digest) for size, digest, _, name in rows}

    def _send(self, file: Path, start: int) -> int:
        """Append a file from `start` on; how many bytes."""
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
                    raise channel.trouble() from None
            if channel.end():
                raise channel.trouble()
        return file.stat().st_size - start

    def verify(self, name: str) -> None:
        """Run `edgeprune verify` there. Raises HostError with the line that it ends with."""
        with Channel(self.host, self._inside(f"{self.to.program} verify {self.quoted(name)} 2>&1")) as channel:
            said = channel.stdout.read().decode(errors="replace").strip().splitlines()
            if channel.end():
                if not said:
                    raise channel.trouble()
                raise HostError(f"verify at {self.to.host} failed, {CURRENT} stays as it was: {said[-1][:400]}")

    def switch(self, name: str) -> None:
        """`current` leads to `name`, `previous` to what it led to, each replaced in one step; older versions go."""
        link = shlex.quote(name)
        self.run(
            f"old=$(readlink {CURRENT} || true); "
            f'if [ -n "$old" ] && [ "$old" != {link} ]; then ln -s -- "$old" .{PREVIOUS}.new; '
            f"mv -fT .{PREVIOUS}.new {PREVIOUS}; fi; "
            f"rm -f .{CURRENT}.new; ln -s -- {link} .{CURRENT}.new; mv -fT .{CURRENT}.new {CURRENT}; sync; "
            f"for one in *-{12 * '[0-9a-f]'}; do "  # what was shipped before the last
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

"""A folder of versions on another machine: files sent and checked by hash, `current` switched in one step."""

from __future__ import annotations

import hashlib
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeprune.bundles.format import MANIFEST
from edgeprune.errors import HostError
from edgeprune.records import Progress
from edgeprune.runtimes.remote.ssh import Channel, Host

PIECE_BYTES = 1 << 20
BUSY = 75  # EX_TEMPFAIL of sysexits.h
CURRENT, PREVIOUS = "current", "previous"
SOCKET_CHARACTERS = 80  # of a path; the limit is 107, of which ssh needs 17 itself


class RemoteFolder:
    """Commands in a folder on another machine."""

    def __init__(self, host: Host, folder: str, incoming: str = "") -> None:
        """`incoming` is the name of a folder in it that receives files."""
        self.host, self.folder = host, folder
        self.incoming = self.quoted(incoming)
        self._shared: tuple[str, ...] = ()  # options of ssh: go through the connection that holds the lock

    @staticmethod
    def quoted(name: str) -> str:
        """A name quoted for the shell; never taken for an option."""
        return shlex.quote(f"./{name}")

    def _inside(self, script: str) -> str:
        """`script` preceded by a cd into the folder, which may begin with ~/."""
        first, _, rest = self.folder.partition("/")
        place = f'"$HOME"/{shlex.quote(rest)}' if first == "~" else shlex.quote(self.folder)
        return f"set -e; mkdir -p -- {place}; cd -- {place}; {script}"

    def _channel(self, script: str) -> Channel:
        return Channel(self.host, self._inside(script), *self._shared)

    def run(self, script: str) -> str:
        """The output of a script. Raises HostError where it fails."""
        with self._channel(script) as channel:
            said = channel.stdout.read().decode(errors="replace")
            if channel.end():
                raise channel.failure()
        return said

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder until the block ends or the connection is lost. Raises HostError.

        All commands inside the block go through this one connection (ControlMaster of ssh_config(5)); where the host
        allows no second session in it (MaxSessions 1), ssh opens connections of their own.
        """
        script = f"exec 9>.ship.lock; flock -n 9 || exit {BUSY}; echo ready; cat >/dev/null"
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as place:
            path = f"{place}/ssh"
            share = len(path) <= SOCKET_CHARACTERS
            with Channel(self.host, self._inside(script), *(("-M", "-S", path) if share else ())) as channel:
                if channel.stdout.readline().strip() != b"ready":
                    if channel.end() == BUSY:
                        raise HostError(f"{self.host.address}:{self.folder}: another ship is running: wait for it")
                    raise channel.failure()
                self._shared = ("-S", path) if share else ()
                try:
                    yield
                finally:
                    self._shared = ()

    def fill(self, bundle: Path, files: dict[str, str], progress: Progress) -> int:
        """Send what `incoming` lacks of files (name -> sha256) and check their hashes; the number of bytes sent."""
        there, sent = self.files(self.incoming, "mkdir -p"), 0
        whole = sum((bundle / name).stat().st_size for name in files)
        for name in files:
            progress(f"sending {name}", sent, whole)
            file, (size, digest) = bundle / name, there.get(name, (0, ""))
            start = size if 0 < size <= file.stat().st_size and digest == _hash_of_start(file, size) else 0
            if start < file.stat().st_size or size == 0:
                sent += self._send(file, start)
        there = self.files(self.incoming)
        for name, wanted in files.items():
            found = there.get(name, (0, ""))[1]
            if found != wanted:
                self.run(f"rm -f {self.incoming}/{shlex.quote(name)}")
                raise HostError(
                    f"{name} arrived damaged (sha256 {found[:12]}…, not {wanted[:12]}…): run the command again"
                )
        return sent

    def files(self, folder: str, before: str = "test -d") -> dict[str, tuple[int, str]]:
        """Size in bytes and sha256 of the files in a quoted folder, by name; links are left out.

        `before` is a command on the folder. Raises HostError where it fails.
        """
        # A file that cannot be read counts as damaged.
        of_one = 'd=$(sha256sum 2>/dev/null < "$f") || d="unreadable -"; echo "$(stat -c %s -- "$f") $d $f"'
        script = f'for f in *; do if [ -f "$f" ] && [ ! -L "$f" ]; then {of_one}; fi; done'
        lines = self.run(f"{before} {folder}; cd {folder}; {script}").splitlines()
        rows = (line.split(None, 3) for line in lines)  # sha256sum writes "hash  -"
        return {name: (int(size), digest) for size, digest, _, name in rows}

    def _send(self, file: Path, start: int) -> int:
        """Send a file from byte `start` on and append it; the number of bytes sent."""
        place = f"{self.incoming}/{shlex.quote(file.name)}"
        with self._channel(f"cat {'>>' if start else '>'} {place}") as channel, open(file, "rb") as data:
            data.seek(start)
            while piece := data.read(PIECE_BYTES):
                try:
                    channel.stdin.write(piece)
                except OSError:
                    raise channel.failure() from None
            if channel.end():
                raise channel.failure()
        return file.stat().st_size - start

    def has(self, name: str) -> bool:
        """Is there a folder of this name?"""
        return self.run(f"test -d {self.quoted(name)} && echo there || true").strip() == "there"

    def replace_files(self, folder: str, names: Iterable[str]) -> None:
        """Move files from `incoming` into a folder, each in one step, and remove `incoming`."""
        place = self.quoted(folder)
        moves = (
            f"if [ -d {place}/{shlex.quote(n)} ]; then rm -rf {place}/{shlex.quote(n)}; fi; "
            f"mv -fT {self.incoming}/{shlex.quote(n)} {place}/{shlex.quote(n)}; "
            for n in names
        )
        self.run(f"{''.join(moves)}sync; rm -rf {self.incoming}")

    def link(self, name: str) -> str:
        """What the link `name` points to; empty where there is none."""
        return self.run(f"readlink {name} || true").strip()

    def verify(self, name: str, otherwise: str = f", {CURRENT} is unchanged") -> None:
        """Run `edgeprune verify` there. Raises HostError with `otherwise` and the last line of its output."""
        with self._channel(f"{self.host.program} verify {self.quoted(name)} 2>&1") as channel:
            said = channel.stdout.read().decode(errors="replace").strip().splitlines()
            if channel.end():
                if not said:
                    raise channel.failure()
                raise HostError(f"verify at {self.host.address} failed{otherwise}: {said[-1][:400]}")

    def switch(self, name: str) -> None:
        """Point `current` at `name` and `previous` at the version it replaces, each in one step; remove older."""
        link = shlex.quote(name)
        self.run(
            f"old=$(readlink {CURRENT} || true); "
            f'if [ -n "$old" ] && [ "$old" != {link} ]; then rm -f .{PREVIOUS}.new; ln -s -- "$old" .{PREVIOUS}.new; '
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

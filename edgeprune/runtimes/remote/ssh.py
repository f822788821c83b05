"""Commands on other machines through the user's own OpenSSH client, with its configuration and keys."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from contextlib import suppress
from typing import IO, NamedTuple

from edgeprune.errors import HostError

OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
PROGRAM = "EDGEPRUNE_SSH"  # like GIT_SSH_COMMAND: "ssh -F file"
ADDRESS = r"([\w.-]+@)?[\w.:\[\]%-]+"
# Exit codes: of ssh itself, also where the process there was killed; of a shell that has no such command, and of one
# whose command was killed.
FAILED, NOT_FOUND, KILLED = 255, 127, 137
CLOSING_S = 20  # time for a process to end after its input is closed


class Host(NamedTuple):
    """A machine, and the edgeprune program there."""

    address: str  # USER@HOST, or a name of ~/.ssh/config
    program: str = "edgeprune"


class Channel:
    """A command that runs on another machine, with pipes to it; a context manager that ends it."""

    def __init__(self, host: Host, remote: str, *options: str) -> None:
        """Start the command `remote` with more options for ssh, if any.

        Raises HostError for a bad address, and where ssh is not installed.
        """
        if host.address.startswith("-") or not re.fullmatch(ADDRESS, host.address):
            raise HostError(f"{host.address!r} is not a host: write USER@HOST or a name of ~/.ssh/config")
        self.host = host
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the process
        line = [*shlex.split(os.environ.get(PROGRAM, "ssh")), *OPTIONS, *options, host.address, remote]
        try:
            self._process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
            )
        except OSError as error:
            raise HostError(f"{line[0]} cannot be started ({error.strerror}): install the OpenSSH client") from None
        assert self._process.stdin is not None and self._process.stdout is not None
        self.stdin: IO[bytes] = self._process.stdin
        self.stdout: IO[bytes] = self._process.stdout

    def leave(self) -> None:
        """Close its input, which ends it."""
        with suppress(OSError):  # it has ended already
            self.stdin.close()

    def end(self) -> int:
        """Close its input, wait for it, and return its exit code."""
        self.leave()
        try:
            return self._process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def failure(self) -> HostError:
        """The error to raise, made from the exit code and the last line of stderr."""
        code = self.end()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read()[-4096:].decode(errors="replace").splitlines()]
        said = next((line for line in reversed(lines) if line), "")[:300] or f"exit code {code}"
        name = self.host.address
        if code == KILLED or (code == FAILED and not any(lines)):
            return HostError(
                f"{name} ended early without a word ({said}): if `dmesg` there names the out-of-memory killer, close "
                "other programs there; then run the command again"
            )
        if code == NOT_FOUND:
            return HostError(
                f"{name} has no {self.host.program}: install edgeprune there, or pass --host-program PATH"
            )
        if code == FAILED:
            return HostError(f"{name} cannot be reached, or the connection was cut ({said}): try `ssh {name} true`")
        return HostError(f"{name} ended early ({said}): fix that on the host and run the command again")

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        self.stdout.close()
        self._errors.close()

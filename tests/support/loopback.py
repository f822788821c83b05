"""A real OpenSSH server on loopback with its own keys, for tests of remote commands."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from edgeprune.bundles.ship import destination, ship
from support import brief
from support.paths import ROOT

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
# edgeprune as on a Jetson: torch, timm and the like cannot be imported.
PROGRAM = """#!{python}
import importlib.abc, os, sys
os.environ.update({environment!r})
sys.path.insert(0, {root!r})
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"torch", "timm", "torchvision", "onnxscript"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from edgeprune.cli import main
{brief}
main()
"""


class Server(NamedTuple):
    """A machine that is reached over ssh."""

    address: str  # USER@HOST
    home: Path  # its files
    program: Path  # edgeprune there, without torch
    ssh: str  # for EDGEPRUNE_SSH
    process: subprocess.Popen[bytes]
    port: int
    log: Path  # of sshd

    @property
    def options(self) -> tuple[str, ...]:
        """For the command line."""
        return ("--host", self.address, "--host-program", str(self.program))


@contextlib.contextmanager
def server(folder: Path, settings: str = "") -> Iterator[Server]:
    """sshd on a free port of 127.0.0.1, for one key and one user, the one who runs the tests; more sshd_config."""
    if SSHD is None:
        pytest.skip("sshd is not installed (Debian: openssh-server)")
    if getpass.getuser() == "root":
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd drops its privileges
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(keygen, check=True, timeout=30)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    host_key = (folder / "host.pub").read_text().split()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host_key[0]} {host_key[1]}\n")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PidFile none\nPermitRootLogin yes\nMaxStartups 100\nSubsystem sftp internal-sftp\n"
        f"SetEnv HOME={folder}/home\n"  # shells read the start-up files of HOME, and those of a developer take 0.2 s
        f"{settings}\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n Port {port}\n IdentityFile {folder}/user\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {folder}/known\n GlobalKnownHostsFile /dev/null\n StrictHostKeyChecking yes\n"
        " KexAlgorithms curve25519-sha256\n"  # the default, which quantum computers could not break, takes 0.15 s
    )
    home = folder / "home"
    home.mkdir()
    environment = {"HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1", "EDGEPRUNE_THREADS": "1"}
    program, root = folder / "edgeprune", str(ROOT)
    program.write_text(PROGRAM.format(python=sys.executable, environment=environment, root=root, brief=brief.CODE))
    program.chmod(0o755)
    process = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=(folder / "log").open("wb")
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        address, ssh = f"{getpass.getuser()}@127.0.0.1", f"ssh -F {folder}/ssh_config"
        yield Server(address, home, program, ssh, process, port, folder / "log")
    finally:
        process.terminate()
        process.wait(20)


def check_ships(bundle: Path, folder: Path) -> None:
    """Ship a bundle to a machine of its own, where it verifies; skips without sshd."""
    with server(folder / "sshd") as there, mock.patch.dict(os.environ, EDGEPRUNE_SSH=there.ssh):
        done = ship(bundle, destination(f"{there.address}:{folder}/far", str(there.program)))
    assert done.state == "switched", done
    assert {path.name for path in (folder / "far" / "current").iterdir()} == {path.name for path in bundle.iterdir()}

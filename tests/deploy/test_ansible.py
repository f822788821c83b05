"""The Ansible role: real ansible-core against several SSH servers on loopback, and its script alone."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from support.builds import ONE_THREAD, Shared
from support.loopback import Server, server
from support.pages import commands
from support.paths import ROOT

from edgeprune.bundles.bundle import Bundle
from edgeprune.bundles.format import version_name
from edgeprune.bundles.ship import Destination, roll_back
from edgeprune.io import sha256_file

SCRIPT = ROOT / "deploy" / "ansible" / "roles" / "edgeprune_bundle" / "files" / "install.sh"
# edgeprune on a device where the first verify ends in a mishap.
UNLUCKY = """#!/bin/sh
if [ "$1" = verify ] && [ ! -e {once} ]; then
  touch {once}
  {mishap}
  exit 1
fi
exec {program} "$@"
"""
FAILS = 'echo "error: engine: expected loads and runs, found out of memory: close other programs" >&2'
# The connection is lost: the process of sshd that this one descends from is killed.
CUT_OFF = """p=$$
  while [ "$p" -gt 1 ]; do
    case $(cat /proc/$p/comm) in sshd*) kill -9 "$p"; exit 1 ;; esac
    p=$(sed -n 's/^PPid:[^0-9]*//p' /proc/$p/status)
  done"""


class Packed(NamedTuple):
    """Two versions of a bundle, and the second one packed and signed."""

    folder: Path  # deit.tar.zst, its signature, and allowed_signers
    old: Path
    new: Path
    old_name: str
    new_name: str


@pytest.fixture(scope="module")
def packed(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("packed")
    names = []
    for text in ("old", "new"):
        shutil.copytree(shared.bundle, folder / text)
        manifest = json.loads((folder / text / "manifest.json").read_text())
        manifest["labels"][0] = text
        (folder / text / "manifest.json").write_text(json.dumps(manifest))
        names.append(version_name(folder / text, Bundle.load(folder / text).manifest))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "release"], check=True, timeout=30)
    (folder / "allowed_signers").write_text(f"release@example.com {(folder / 'release.pub').read_text()}")
    Bundle.load(folder / "new").pack(folder / "deit.tar.zst", sign=folder / "release")
    return Packed(folder, folder / "old", folder / "new", *names)


@pytest.fixture
def devices(packed: Packed, tmp_path: Path) -> Iterator[dict[str, Server]]:
    """Three machines on which the old version is current: one works, one is cut off once, one fails once."""
    with ExitStack() as stack:
        found = {}
        for name, mishap in (("cut", CUT_OFF), ("good", None), ("fails", FAILS)):
            one = stack.enter_context(server(tmp_path / name))
            far = one.home / "models"
            shutil.copytree(packed.old, far / packed.old_name)
            (far / "current").symlink_to(packed.old_name)
            if mishap:
                program = tmp_path / name / "unlucky"
                program.write_text(UNLUCKY.format(once=f"{program}.once", mishap=mishap, program=one.program))
                program.chmod(0o755)
                one = one._replace(program=program)
            found[name] = one
        yield found


def play(devices: dict[str, Server], folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The page's own command, with these machines as its inventory; each has its own folder and program."""
    [words] = [c.words for c in commands("docs/fleet.md") if c.words[0] == "ansible-playbook"]
    options = [word.replace("$PWD", str(folder)) for word in words[1:]]
    hosts = {
        name: {
            "ansible_host": "127.0.0.1",
            "ansible_port": one.port,
            "ansible_user": one.address.partition("@")[0],
            "ansible_ssh_common_args": one.ssh.removeprefix("ssh "),
            "ansible_python_interpreter": sys.executable,
            "ansible_remote_tmp": str(one.home / ".ansible"),
            "far": str(one.home / "models"),
            "program": str(one.program),
        }
        for name, one in devices.items()
    }
    (folder / "hosts.ini").write_text(
        "\n".join(" ".join([name, *(f"{k}='{v}'" for k, v in given.items())]) for name, given in hosts.items())
    )
    (folder / "ansible.cfg").write_text("")  # that of the machine does not count
    if not (folder / "deploy").exists():
        (folder / "deploy").symlink_to(ROOT / "deploy")
    here = ("-e", json.dumps({"edgeprune_bundle_dir": "{{ far }}", "edgeprune_bundle_program": "{{ program }}"}))
    environment = {
        "ANSIBLE_HOME": str(folder / ".ansible"), "ANSIBLE_PIPELINING": "1", "LC_ALL": "C.UTF-8",
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=5s", "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_CONFIG": str(folder / "ansible.cfg"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", *options, *here, *more],
        cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | ONE_THREAD | environment,
    )  # fmt: skip


def recap(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, int]]:
    """The counts at the end, by machine."""
    lines = done.stdout.partition("PLAY RECAP")[2].splitlines()[1:]
    found = {line.split()[0]: [pair.split("=") for pair in line.split()[2:]] for line in lines if ":" in line}
    return {name: {key: int(count) for key, count in pairs} for name, pairs in found.items()}


def state(far: Path) -> tuple[str, str | None, list[str]]:
    """What is current and previous, and all that lies there."""
    previous = far / "previous"
    names = sorted(path.name for path in far.iterdir())
    return os.readlink(far / "current"), os.readlink(previous) if previous.is_symlink() else None, names


def same(a: Path, b: Path) -> bool:
    return {p.name: sha256_file(p) for p in a.iterdir()} == {p.name: sha256_file(p) for p in b.iterdir()}


def test_one_fails_one_is_cut_off_and_a_second_run_mends_both(
    packed: Packed, devices: dict[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ansible")
    far = {name: one.home / "models" for name, one in devices.items()}
    done = play(devices, packed.folder)
    counts = recap(done)
    assert done.returncode != 0, done.stdout
    assert counts["cut"]["unreachable"] == 1 and counts["fails"]["failed"] == 1, done.stdout + done.stderr
    assert counts["good"]["failed"] == counts["good"]["unreachable"] == 0, done.stdout
    assert "close other programs" in done.stdout
    assert state(far["good"])[:2] == (packed.new_name, packed.old_name) and same(far["good"] / "current", packed.new)
    for name in ("cut", "fails"):
        assert state(far[name])[:2] == (packed.old_name, None) and same(far[name] / "current", packed.old)
        assert not (far[name] / packed.new_name).exists()

    done = play(devices, packed.folder)
    counts = recap(done)
    assert done.returncode == 0, done.stdout + done.stderr
    assert counts["good"]["changed"] == 0 and counts["cut"]["changed"] > 0 and counts["fails"]["changed"] > 0
    clean = sorted([".installed", ".ship.lock", "current", "previous", packed.new_name, packed.old_name])
    for name in devices:
        assert state(far[name]) == (packed.new_name, packed.old_name, clean) and same(
            far[name] / "current", packed.new
        )

    os.truncate(far["cut"] / "current" / "model.onnx", 1000)
    done = play({name: devices[name] for name in ("cut", "good")}, packed.folder)
    counts = recap(done)
    assert done.returncode == 0 and counts["cut"]["changed"] > 0 and counts["good"]["changed"] == 0, done.stdout
    assert state(far["cut"]) == (packed.new_name, packed.old_name, clean) and same(far["cut"] / "current", packed.new)

    monkeypatch.setenv("EDGEPRUNE_SSH", devices["good"].ssh)
    roll_back(Destination(host=devices["good"].address, dir=str(far["good"]), program=str(devices["good"].program)))
    assert state(far["good"])[:2] == (packed.old_name, packed.new_name), "the layout is not that of ship"


def test_the_role_says_what_it_lacks(packed: Packed, devices: dict[str, Server]) -> None:
    pytest.importorskip("ansible")
    good = {"good": devices["good"]}
    done = play(good, packed.folder, "-e", "edgeprune_bundle_archive=nowhere.tar.zst")
    assert done.returncode != 0 and "edgeprune_bundle_archive must be a file on the controller" in done.stdout
    assert state(devices["good"].home / "models")[0] == packed.old_name


def install(packed: Packed, far: Path, program: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, packed.folder / "deit.tar.zst", far, *more]
    environment = os.environ | {"EDGEPRUNE": str(program)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_the_script_alone(packed: Packed, tmp_path: Path) -> None:
    """What Mender and the like call: the first version, the same once more, a wrong signer, another installation."""
    program, far = tmp_path / "edgeprune", tmp_path / "far away"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m edgeprune "$@"\n')
    program.chmod(0o755)
    signed = ("--allowed-signers", str(packed.folder / "allowed_signers"))
    for said in ("switched", "current", "mended"):
        if said == "mended":
            (far / "current" / "model.onnx").write_bytes(b"damaged")
            (far / "current" / "golden_input.npy").unlink()
        done = install(packed, far, program, *signed)
        assert (done.returncode, done.stdout) == (0, f"{said} {packed.new_name}\n"), done.stderr
    assert same(far / "current", packed.new) and not (far / "previous").is_symlink()
    (tmp_path / "nobody").write_text("")
    done = install(packed, far, program, "--allowed-signers", str(tmp_path / "nobody"))
    assert done.returncode == 1 and "by none of the signers" in done.stderr and len(done.stderr.splitlines()) == 1
    assert state(far) == (packed.new_name, None, sorted([".installed", ".ship.lock", "current", packed.new_name]))
    assert install(packed, far, program).returncode == 2
    with open(far / ".ship.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = install(packed, far, program, *signed)
        assert done.returncode == 75 and "another installation is running" in done.stderr

"""`ship` to real OpenSSH servers on loopback: resumed, checked and verified there, switched in one step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.builds import Shared, call, row_of
from support.loopback import Server, server

from edgeprune.bundles.ship import destination, fleet, remote_folder, ship
from edgeprune.errors import HostError, InputError, RecordError
from edgeprune.io import sha256_file

pytestmark = pytest.mark.usefixtures("ssh")


@pytest.fixture
def versions(shared: Shared, tmp_path: Path) -> Callable[[str], Path]:
    """versions(text) is a bundle of its own: the same engine, another label."""

    def make(text: str, **changes: Any) -> Path:
        copy = tmp_path / f"bundle-{text}"
        shutil.copytree(shared.bundle, copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["labels"][0] = text
        (copy / "manifest.json").write_text(json.dumps(manifest | changes))
        return copy

    return make


def same(a: Path, b: Path) -> bool:
    """The same files with the same contents."""
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(
        sha256_file(a / n) == sha256_file(b / n) for n in names
    )


def test_ship_switch_and_roll_back(
    there: Server, versions: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (versions(name) for name in ("one", "two", "three"))
    far, to = tmp_path / "far away", f"{there.address}:{tmp_path}/far away"
    program = ("--host-program", there.program)
    [row] = row_of(capsys, "ship", first, to, *program)["rows"]
    whole = sum(path.stat().st_size for path in first.iterdir())
    assert row["state"] == "switched" and row["sent_bytes"] == whole
    assert same(far / "current", first) and not (far / "previous").exists()
    [row] = row_of(capsys, "ship", first, to, *program)["rows"]
    assert row["state"] == "current" and row["sent_bytes"] == 0
    row_of(capsys, "ship", second, to, *program)
    assert same(far / "current", second) and same(far / "previous", first)
    row_of(capsys, "ship", third, to, *program)
    assert same(far / "current", third) and same(far / "previous", second)
    assert len([path for path in far.iterdir() if path.is_dir() and not path.is_symlink()]) == 2, "old ones pile up"
    row_of(capsys, "ship", "--roll-back", to, *program)
    assert same(far / "current", second) and same(far / "previous", third)
    assert not [path.name for path in far.iterdir() if path.name.endswith((".part", ".new"))]


def test_a_damaged_version_there_is_mended(
    there: Server, versions: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The current one and the one before it: damaged files are sent again, and nothing else."""
    first, second = versions("one"), versions("two")
    to, far = f"{there.address}:{tmp_path}/far", tmp_path / "far"
    program = ("--host-program", there.program)
    for bundle in (first, second):
        row_of(capsys, "ship", bundle, to, *program)
    for place in ("previous", "current"):
        os.truncate(far / place / "model.onnx", 1000)
    (far / "current" / "golden_input.npy").unlink()
    sizes = [(second / name).stat().st_size for name in ("model.onnx", "golden_input.npy")]
    [row] = row_of(capsys, "ship", second, to, *program)["rows"]
    assert (row["state"], row["sent_bytes"]) == ("mended", sum(sizes)) and same(far / "current", second)
    [row] = row_of(capsys, "ship", first, to, *program)["rows"]
    assert (row["state"], row["sent_bytes"]) == ("switched", sizes[0]) and same(far / "current", first)
    assert same(far / "previous", second) and not list(far.glob(".*.part"))


@pytest.mark.parametrize(("settings", "connections"), [("", range(1, 2)), ("MaxSessions 1", range(8, 20))])
def test_all_goes_through_one_connection(
    settings: str,
    connections: range,
    versions: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = versions("one")
    with server(tmp_path / "sshd", settings) as there:
        monkeypatch.setenv("EDGEPRUNE_SSH", there.ssh)
        row = ship(bundle, destination(f"{there.address}:{tmp_path}/far", str(there.program)))
        assert row.state == "switched" and same(tmp_path / "far/current", bundle)
        assert there.log.read_text().count("Accepted publickey") in connections


def test_a_bundle_that_does_not_verify_there_is_not_switched_to(
    there: Server, versions: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = versions("good"), versions("bad", tolerance=-1.0)
    to, program = f"{there.address}:{tmp_path}/far", ("--host-program", there.program)
    row_of(capsys, "ship", good, to, *program)
    code, _, err = call(capsys, "ship", bad, to, *program)
    assert code == 1 and "current is unchanged" in err and "golden output" in err
    assert same(tmp_path / "far" / "current", good) and not (tmp_path / "far" / "previous").exists()


def test_a_cut_connection_goes_on_where_it_stopped(
    there: Server, versions: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh is killed after half of the largest file; the second run sends the rest alone."""
    bundle, where = versions("cut"), destination(f"{there.address}:{tmp_path}/far", str(there.program))
    whole = sum(path.stat().st_size for path in bundle.iterdir())
    half = (bundle / "model.onnx").stat().st_size // 2
    cutter = tmp_path / "cutter"
    cutter.write_text(
        f'#!/bin/sh\ncase "$*" in *model.onnx*cat*|*cat*model.onnx*) head -c {half} | {there.ssh} "$@"; '
        f'exec sh -c "kill -9 \\$\\$";; *) exec {there.ssh} "$@";; esac\n'
    )
    cutter.chmod(0o755)
    monkeypatch.setenv("EDGEPRUNE_SSH", str(cutter))
    with pytest.raises(HostError):
        ship(bundle, where)
    assert not (tmp_path / "far" / "current").exists()
    monkeypatch.setenv("EDGEPRUNE_SSH", there.ssh)
    done = ship(bundle, where)
    assert done.state == "switched" and 0 < done.sent_bytes <= whole - half
    assert same(tmp_path / "far" / "current", bundle)


def test_half_a_file_of_something_else_is_sent_anew(
    there: Server, versions: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle, where = versions("other"), destination(f"{there.address}:{tmp_path}/far", str(there.program))
    digest = sha256_file(bundle / "manifest.json")[:12]
    part = tmp_path / "far" / f".vit_digits-pomt-fp32-b1-{digest}.part"
    part.mkdir(parents=True)
    (part / "model.onnx").write_bytes(b"something else")
    (part / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes())
    done = ship(bundle, where)
    whole = sum(path.stat().st_size for path in bundle.iterdir())
    assert done.sent_bytes == whole - (bundle / "manifest.json").stat().st_size
    assert same(tmp_path / "far" / "current", bundle)


def test_a_full_disk_is_reported(
    there: Server, versions: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small file system, where that can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", small], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: needs root")
    try:
        code, _, err = call(
            capsys, "ship", versions("full"), f"{there.address}:{small}", "--host-program", there.program
        )
        assert code == 1 and "No space left on device" in err
        assert not (small / "current").exists()
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_wrong_host_key_is_reported(
    there: Server,
    versions: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = Path(there.ssh.split()[-1])
    other = (config.parent / "user.pub").read_text().split()
    known = (config.parent / "known").read_text().split()
    (tmp_path / "known").write_text(f"{known[0]} {other[0]} {other[1]}\n")
    (tmp_path / "config").write_text(config.read_text().replace(f"{config.parent}/known", f"{tmp_path}/known"))
    monkeypatch.setenv("EDGEPRUNE_SSH", f"ssh -F {tmp_path}/config")
    code, _, err = call(capsys, "ship", versions("key"), f"{there.address}:{tmp_path}/far")
    assert code == 1 and "Host key verification failed" in err
    assert not (tmp_path / "far").exists()


def test_two_at_once_into_one_folder(there: Server, versions: Callable[[str], Path], tmp_path: Path) -> None:
    where = destination(f"{there.address}:{tmp_path}/far", str(there.program))
    (tmp_path / "far").mkdir()
    holder = subprocess.Popen(
        ["flock", str(tmp_path / "far" / ".ship.lock"), "sh", "-c", "echo held; cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdin is not None
    holder.stdout.readline()
    try:
        with pytest.raises(HostError, match="another ship is running"):
            ship(versions("lock"), where)
    finally:
        holder.stdin.close()
        holder.wait(20)


def test_several_hosts_at_once(
    there: Server, versions: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of three cannot be reached: the others are switched, and the exit code tells."""
    hosts = tmp_path / "hosts.toml"
    entries = [
        (there.address, tmp_path / "a"),
        (there.address, tmp_path / "b"),
        ("nobody@host.invalid", tmp_path / "c"),
    ]
    hosts.write_text(
        "".join(f'[[to]]\nhost = "{host}"\ndir = "{place}"\nprogram = "{there.program}"\n' for host, place in entries)
    )
    bundle = versions("all")
    code, out, err = call(capsys, "ship", bundle, "--all", hosts, "--json")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert code == 1 and [row["state"] for row in rows] == ["switched", "switched", "failed"]
    assert "1 of 3 failed: nobody@host.invalid" in err.splitlines()[-1]
    assert same(tmp_path / "a" / "current", bundle) and same(tmp_path / "b" / "current", bundle)


def test_destinations_and_lists_of_hosts_are_checked(tmp_path: Path) -> None:
    assert destination("me@[::1]:/opt/x").host == "me@[::1]" and destination("nano:models").dir == "models"
    for text in ("nano", "nano:", ":dir", "/just/a/path"):
        with pytest.raises(InputError, match="USER@HOST:DIR"):
            destination(text)
    for text, reason in (
        ("", "missing required field"),
        ("to = []", "no hosts"),
        ("[[to]]\nhost = 1", "Expected `str`"),
        ("{", "not a list of hosts"),
    ):
        (tmp_path / "hosts.toml").write_text(text)
        with pytest.raises(RecordError, match=reason):
            fleet(tmp_path / "hosts.toml")


@pytest.mark.parametrize(("folder", "place"), [("~", ""), ("~/", ""), ("~/a b", "a b"), ("~a/b", "~a/b"), ("c", "c")])
def test_a_home_is_found_at_the_far_end(folder: str, place: str, tmp_path: Path) -> None:
    script = remote_folder(destination(f"nano:{folder}"))._inside("pwd")
    said = subprocess.check_output(["sh", "-c", script], cwd=tmp_path, env={"HOME": str(tmp_path)}, text=True)
    assert Path(said.rstrip("\n")) == tmp_path / place


def test_a_damaged_bundle_is_not_sent(
    there: Server, versions: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = versions("damaged")
    os.truncate(bundle / "model.onnx", 1000)
    code, _, err = call(capsys, "ship", bundle, f"{there.address}:{tmp_path}/far")
    assert code == 1 and "model.onnx" in err and not (tmp_path / "far").exists()

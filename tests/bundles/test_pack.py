"""`pack` and `unpack`: the same bytes for the same bundle, signed, and nothing but a whole bundle comes out."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from support.builds import Shared, call, row_of

from edgeprune.bundles.bundle import Bundle
from edgeprune.io import sha256_file

SIGNER = "release@example.com"
KILLED = """
import os, signal, sys
from pathlib import Path
from edgeprune.bundles.pack import unpack
def progress(what, done, total):
    if "model.onnx" in what:
        os.kill(os.getpid(), signal.SIGKILL)
unpack(Path(sys.argv[1]), Path(sys.argv[2]), unsigned=True, progress=progress)
"""


def key(path: Path) -> Path:
    """An OpenSSH key without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=30)
    return path


def allow(path: Path, **keys: Path) -> Path:
    """A list of allowed signers: name=key, @example.com added."""
    lines = [f"{name}@example.com {one.with_suffix('.pub').read_text()}" for name, one in keys.items()]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def kit(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bundle/, deit.tar.zst and its signature by `release`, two keys, and lists of signers."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed (Debian: openssh-client)")
    folder = tmp_path_factory.mktemp("kit")
    shutil.copytree(shared.bundle, folder / "bundle")
    release, other = key(folder / "release"), key(folder / "other")
    allow(folder / "signers", release=release, other=other)
    allow(folder / "others", other=other)
    Bundle.load(folder / "bundle").pack(folder / "deit.tar.zst", sign=release)
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """refused(*argv) is the one line of a command that exits with 1; `unpack` leaves nothing where it would write."""
    place = tmp_path / "place"
    place.mkdir()

    def run(*argv: object) -> str:
        code, out, err = call(capsys, *argv)
        assert code == 1 and len(err.splitlines()) == 1, out + err
        assert argv[0] != "unpack" or not any(place.iterdir())
        return err

    return run


def members(archive: Path) -> list[tarfile.TarInfo]:
    data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(archive.read_bytes())).read()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def same(a: Path, b: Path) -> bool:
    return {p.name: sha256_file(p) for p in a.iterdir()} == {p.name: sha256_file(p) for p in b.iterdir()}


# --- pack ---


def test_the_bytes_depend_on_the_contents_alone(kit: Path, tmp_path: Path) -> None:
    """Another order, times and rights: the same file; one label more: another."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in sorted((path.name for path in (kit / "bundle").iterdir()), reverse=True):
        (copy / name).write_bytes((kit / "bundle" / name).read_bytes())
        os.utime(copy / name, (0, 0))
        (copy / name).chmod(0o600)
    (copy / "notes.txt").write_text("not in the manifest")
    again = Bundle.load(copy).pack(tmp_path / "again.tar.zst")
    assert again.read_bytes() == (kit / "deit.tar.zst").read_bytes()
    found = members(again)
    assert [one.name for one in found] == ["manifest.json", *sorted(Bundle.load(copy).manifest.files)]
    assert {(one.mtime, one.uid, one.gid, one.uname, one.mode, one.type) for one in found} == {
        (0, 0, 0, "", 0o644, tarfile.REGTYPE)
    }
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["labels"][0] = "another"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    other = Bundle.load(copy).pack(tmp_path / "other.tar.zst")
    assert other.read_bytes() != again.read_bytes()


def test_pack_says_what_it_wrote(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deit.tar.zst"
    row = row_of(capsys, "pack", kit / "bundle", out, "--sign", kit / "release")
    digest = sha256_file(kit / "bundle" / "manifest.json")[:12]
    assert row == {
        "path": str(out),
        "version": f"vit_digits-pomt-fp32-b1-{digest}",
        "sha256": sha256_file(out),
        "size_bytes": out.stat().st_size,
        "signature": f"{out}.sig",
    }
    assert row_of(capsys, "pack", kit / "bundle", out)["signature"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deit.tar.zst"], "the old signature would be wrong"


def test_pack_refuses(
    kit: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.tar.zst"
    assert "not a bundle" in refused("pack", tmp_path, out)
    assert "must end in .tar.zst" in refused("pack", kit / "bundle", tmp_path / "out.zip")
    assert "no such key" in refused("pack", kit / "bundle", out, "--sign", tmp_path / "nobody")
    assert "cannot sign" in refused("pack", kit / "bundle", out, "--sign", kit / "signers")
    damaged = shutil.copytree(kit / "bundle", tmp_path / "damaged")
    os.truncate(damaged / "model.onnx", 1000)
    assert "model.onnx" in refused("pack", damaged, out)
    simulated = shutil.copytree(kit / "bundle", tmp_path / "simulated")
    manifest = json.loads((simulated / "manifest.json").read_text())
    manifest["engine"]["setup"]["simulated"] = True
    (simulated / "manifest.json").write_text(json.dumps(manifest))
    assert "simulated" in refused("pack", simulated, out)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install the OpenSSH client" in refused("pack", kit / "bundle", out, "--sign", kit / "release")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


# --- unpack ---


def test_there_and_back(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "deit"
    row = row_of(capsys, "unpack", kit / "deit.tar.zst", out, "--allowed-signers", kit / "signers")
    assert (
        row["signer"] == SIGNER and row["version"].startswith("vit_digits-pomt-fp32-b1-") and row["path"] == str(out)
    )
    assert same(out, kit / "bundle") and [path.name for path in out.parent.iterdir()] == ["deit"]
    (tmp_path / "empty").mkdir()
    signers = {"allowed_signers": kit / "signers", "signer": SIGNER}
    found = Bundle.unpack(kit / "deit.tar.zst", tmp_path / "empty", **signers)  # type: ignore[arg-type]
    assert found == Bundle.load(tmp_path / "empty")
    bare = tmp_path / "bare.tar.zst"
    bare.write_bytes((kit / "deit.tar.zst").read_bytes())
    row = row_of(capsys, "unpack", bare, tmp_path / "bare", "--unsigned")
    assert row["signer"] is None and same(tmp_path / "bare", kit / "bundle")


def test_other_tools_read_it(kit: Path, tmp_path: Path) -> None:
    if not (shutil.which("tar") and shutil.which("zstd")):
        pytest.skip("tar or zstd is not installed")
    command = ["tar", "--zstd", "-xf", str(kit / "deit.tar.zst"), "-C", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and same(tmp_path, kit / "bundle")


def test_signatures_are_checked_first(kit: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    file, out = tmp_path / "deit.tar.zst", tmp_path / "place" / "deit"
    signature = tmp_path / "deit.tar.zst.sig"
    file.write_bytes((kit / "deit.tar.zst").read_bytes())
    signed = ("--allowed-signers", kit / "signers")
    assert "pass --allowed-signers FILE, or --unsigned" in refused("unpack", file, out)
    assert "pass --allowed-signers FILE, or --unsigned" in refused("unpack", file, out, *signed, "--unsigned")
    assert "its signature deit.tar.zst.sig is missing" in refused("unpack", file, out, *signed)
    signature.write_bytes((kit / "deit.tar.zst.sig").read_bytes())
    assert "no such file: pass an" in refused("unpack", file, out, "--allowed-signers", tmp_path / "nowhere")
    assert "by none of the signers in" in refused("unpack", file, out, "--allowed-signers", kit / "others")
    assert f"signed by {SIGNER}, not by other@" in refused(
        "unpack", file, out, *signed, "--signer", "other@example.com"
    )
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    file.write_bytes(flipped)
    assert f"does not match its signature by {SIGNER}" in refused("unpack", file, out, *signed)
    assert "model.onnx has sha256" in refused("unpack", file, out, "--unsigned")
    file.write_bytes((kit / "deit.tar.zst").read_bytes())
    foreign = ["ssh-keygen", "-Y", "sign", "-f", str(kit / "release"), "-n", "file"]
    with open(file, "rb") as data:
        signature.write_bytes(subprocess.run(foreign, stdin=data, capture_output=True, check=True).stdout)
    assert f"does not match its signature by {SIGNER}" in refused("unpack", file, out, *signed), (
        "signed for another purpose"
    )
    signature.write_bytes(b"scribble")
    assert "by none of the signers" in refused("unpack", file, out, *signed)


def test_without_ssh_keygen(
    kit: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused("unpack", kit / "deit.tar.zst", tmp_path / "place" / "x", "--allowed-signers", kit / "signers")
    assert "install the OpenSSH client" in line


def test_an_existing_target_is_kept(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for target in (tmp_path / "mine", tmp_path / "mine" / "file"):
        code, _, err = call(capsys, "unpack", kit / "deit.tar.zst", target, "--unsigned")
        assert code == 1 and "exists already" in err
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_what_is_cut_short_or_no_archive(kit: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    file, out = tmp_path / "cut.tar.zst", tmp_path / "place" / "deit"
    whole = (kit / "deit.tar.zst").read_bytes()
    for length in (0, 3, 20, 1000, len(whole) // 2, len(whole) - 300):
        file.write_bytes(whole[:length])
        assert "damaged or was not written" in refused("unpack", file, out, "--unsigned")
    for content in (b"PK\3\4 something else" * 100, zstandard.compress(b"no tar" * 1000)):
        file.write_bytes(content)
        assert "damaged or was not written" in refused("unpack", file, out, "--unsigned")
    assert "cannot be read" in refused("unpack", tmp_path / "nowhere.tar.zst", out, "--unsigned")
    assert "cannot be read" in refused("unpack", tmp_path, out, "--unsigned")


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def hostile(bundle: Path) -> Iterator[tuple[str, str, list[tuple[tarfile.TarInfo, bytes]]]]:
    """Name, words of the error, and what is in the archive: a good bundle with one thing wrong."""
    manifest = entry("manifest.json", (bundle / "manifest.json").read_bytes())
    others = [entry(p.name, p.read_bytes()) for p in sorted(bundle.iterdir()) if p.name != "manifest.json"]
    good = [manifest, *others]
    yield "escape", "'../escaped' is not in the manifest", [manifest, entry("../escaped", b"x"), *others]
    yield "absolute", "'/tmp/escaped' is not in the manifest", [manifest, entry("/tmp/escaped", b"x"), *others]
    yield "hidden", "is not in the manifest", [manifest, entry(".profile", b"x"), *others]
    yield "twice", "or appears twice", [*good, others[0]]
    yield "second manifest", "or appears twice", [*good, manifest]
    yield (
        "symlink",
        "not a regular file",
        [manifest, entry("model.onnx", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    )
    yield (
        "hard link",
        "not a regular file",
        [manifest, entry("model.onnx", type=tarfile.LNKTYPE, linkname="manifest.json")],
    )
    yield "device", "not a regular file", [manifest, entry("model.onnx", type=tarfile.BLKTYPE)]
    yield "pipe", "not a regular file", [manifest, entry("model.onnx", type=tarfile.FIFOTYPE)]
    yield "folder", "not a regular file", [entry("folder", type=tarfile.DIRTYPE), *good]
    yield "long name", "not a regular file", [manifest, entry("x" * 300, b"x")]
    yield "order", "does not begin with manifest.json", [*others, manifest]
    yield "no manifest", "does not begin with manifest.json", others
    yield "bad manifest", "not a valid manifest", [entry("manifest.json", b"{}"), *others]
    yield "missing", "is missing", good[:-1]
    changed = [
        entry(info.name, data[:-1] + b"\0") if info.name == "model.onnx" else (info, data) for info, data in others
    ]
    yield "changed", "model.onnx has sha256", [manifest, *changed]
    bomb = [
        entry(info.name, data, size=1 << 40) if info.name == "model.onnx" else (info, data) for info, data in others
    ]
    yield "bomb", "more than its manifest allows", [manifest, *bomb]
    yield "golden bomb", "more than its manifest allows", [manifest, entry("golden_input.npy", size=1 << 33)]


def test_hostile_archives(kit: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Each is refused by name, and nothing is written, in the folder or out of it."""
    file = tmp_path / "hostile.tar.zst"
    for name, words, entries in hostile(kit / "bundle"):
        raw = b"".join(i.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512) for i, data in entries)
        file.write_bytes(zstandard.compress(raw + bytes(1024)))
        line = refused("unpack", file, tmp_path / "place" / "deit", "--unsigned")
        assert words in line, f"{name}: {line}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.tar.zst", "place"]


def test_a_killed_unpack_leaves_no_folder(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deit"
    done = subprocess.run([sys.executable, "-c", KILLED, kit / "deit.tar.zst", out], timeout=120)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    [left] = tmp_path.iterdir()
    os.utime(left, (0, 0))  # a day later
    row_of(capsys, "unpack", kit / "deit.tar.zst", out, "--unsigned")
    assert same(out, kit / "bundle") and list(tmp_path.iterdir()) == [out]


def test_a_full_disk(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small file system, where that can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", small], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: needs root")
    try:
        for command in (
            ("unpack", kit / "deit.tar.zst", small / "deit", "--unsigned"),
            ("pack", kit / "bundle", small / "deit.tar.zst"),
        ):
            code, _, err = call(capsys, *command)
            assert code == 1 and "No space left on device" in err and len(err.splitlines()) == 1
            assert not any(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)

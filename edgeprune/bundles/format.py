"""Engine, manifest and golden input as one hashed folder that appears whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import InputError
from edgeprune.io import code_key, decode, encode, load, read_bytes, sha256_file, writable
from edgeprune.records import Engine, Manifest, Preprocessing, Report, Schedule, Staircase, Vit
from edgeprune.version import __version__

if TYPE_CHECKING:
    from numpy.typing import NDArray

MANIFEST = "manifest.json"
STAIRCASE = "staircase.json"
DEVICE = "device.json"
ONNX = "model.onnx"
BUILD_LOG = "build.log"
TRACE = "story.json"
PAGE = "report.html"
PLOT = "staircase.svg"
GOLDEN = ("golden_input.npy", "golden_output.npy")
TOLERANCE = 1e-3
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
STALE_S = 86400  # age at which the traces of a killed build are removed


def write_bundle(
    out: Path,
    *,
    vit: Vit,
    files: dict[str, Path],
    engine: Engine,
    schedule: Schedule,
    staircase: Staircase | None,
    report: Report,
    preprocessing: Preprocessing,
    labels: tuple[str, ...],
    golden: tuple[NDArray[np.float32], NDArray[np.float32]],
    extra: dict[str, bytes] | None = None,
) -> Manifest:
    """Write the folder `out`; an earlier bundle there is replaced only when the new one is complete.

    `files` are copied under their new names: the engine, and the ONNX that it can be built from again.
    `golden` is one batch of real input and its output. Raises OutputError.
    """
    check_out(out)
    with writable(out):
        fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
        try:
            for name, file in files.items():
                shutil.copyfile(file, fresh / name)
            for name, array in zip(GOLDEN, golden, strict=True):
                np.save(fresh / name, array, allow_pickle=False)
            if staircase is not None:
                (fresh / STAIRCASE).write_bytes(encode(staircase))
            for name, data in (extra or {}).items():
                (fresh / name).write_bytes(data)
            manifest = Manifest(
                edgeprune=__version__,
                code=code_key(),
                vit=vit,
                engine=engine,
                schedule=schedule,
                report=report,
                preprocessing=preprocessing,
                labels=labels,
                files={p.name: sha256_file(p) for p in sorted(fresh.iterdir())},
                tolerance=TOLERANCE,
            )
            (fresh / MANIFEST).write_bytes(encode(manifest))
            os.chmod(fresh, 0o755)
            _take_place(fresh, out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return manifest


def check_out(out: Path) -> None:
    """Raise InputError where `out` holds something else than a bundle, OutputError where none can be written.

    Makes the folder above `out`.
    """
    with writable(out):
        if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is no bundle: choose another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
        for old in out.parent.glob(f".{out.name}.*.old"):  # what stood here when a build was killed as it took over
            shutil.rmtree(old) if out.exists() else os.rename(old, out)
        for left in out.parent.glob(f".{out.name}.*.tmp"):
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def _take_place(fresh: Path, out: Path) -> None:
    """Put `fresh` where `out` is, in one step: what was there is then where `fresh` was, and goes with it."""
    if not out.exists():
        os.rename(fresh, out)
    elif not _exchanged(fresh, out):  # a file system without that: a kill between these two leaves `.old`
        old = fresh.with_suffix(".old")
        os.rename(out, old)
        try:
            os.rename(fresh, out)
        except BaseException:
            os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Swap two folders by renameat2(2), Linux 3.15 and glibc 2.28; False where that is not to be had."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return int(swap(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)) == 0


def load_bundle(path: Path) -> Manifest:
    """The manifest of a bundle whose files are all there and unchanged. Raises InputError, RecordError."""
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path}: no bundle ({MANIFEST} is missing): make one with edgeprune build")
    manifest = decode(read_bytes(path / MANIFEST), Manifest, str(path / MANIFEST))
    for name, digest in manifest.files.items():
        file = path / name
        if not file.is_file() or file.is_symlink():  # that a name stays in the folder, Manifest sees to
            raise InputError(f"{path}: {name} is missing: build the bundle again")
        found = sha256_file(file)
        if found != digest:
            raise InputError(
                f"{path}: {name} has sha256 {found[:12]}…, the manifest says {digest[:12]}…: it was changed "
                "or cut short, copy or build the bundle again"
            )
    if manifest.engine.path not in manifest.files:
        raise InputError(f"{path}: the engine {manifest.engine.path} is not in the manifest: build it again")
    return manifest


def staircase_of(path: Path) -> Staircase:
    """The staircase in a bundle. Raises RecordError."""
    return load(path / STAIRCASE, Staircase)

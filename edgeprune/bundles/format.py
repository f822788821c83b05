"""The folder of a bundle: engine, manifest with hashes, golden input and output; written completely or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.defaults import ENGINES
from edgeprune.errors import InputError
from edgeprune.io import code_key, decode, encode, load, read_bytes, sha256_file, writable
from edgeprune.records import Engine, Manifest, Preprocessing, Recovery, Report, Schedule, Setup, Staircase, Vit
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


def default_folder(setup: Setup, vit: Vit, method: str) -> Path:
    """Where the bundle of a model goes unless the user names a folder."""
    name = f"{method}-{setup.precision}-b{setup.batch}" + ("-simulated" if setup.simulated else "")
    return ENGINES / setup.device / vit.name / name


def write_bundle(
    out: Path,
    *,
    task: str = "classify",
    vit: Vit,
    files: dict[str, Path],
    engine: Engine,
    schedule: Schedule,
    staircase: Staircase | None,
    report: Report,
    preprocessing: Preprocessing,
    labels: tuple[str, ...],
    recovery: Recovery | None = None,
    golden: tuple[NDArray[np.float32], NDArray[np.float32]],
    extra: dict[str, bytes] | None = None,
) -> Manifest:
    """Write the folder `out`; an earlier bundle there is replaced only when the new one is complete.

    `files` maps names in the bundle to the files copied there: the engine, and the ONNX that it can be compiled from.
    `golden` is one batch of real input, (B, 3, H, W), and its output, (B, values), both fp32. `extra` holds the
    content of further files by name. Returns the manifest. Raises InputError, OutputError.
    """
    out = out.resolve()  # a link stays, and points at the new bundle
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
                task=task,
                vit=vit,
                engine=engine,
                schedule=schedule,
                report=report,
                preprocessing=preprocessing,
                labels=labels,
                recovery=recovery,
                files={p.name: sha256_file(p) for p in sorted(fresh.iterdir())},
                tolerance=TOLERANCE,
            )
            (fresh / MANIFEST).write_bytes(encode(manifest))
            os.chmod(fresh, 0o755)
            _replace(fresh, out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return manifest


def check_out(out: Path, work: Path | None = None) -> None:
    """Raise InputError where `out` cannot become a bundle, OutputError where it cannot be written.

    It must be a new or an empty folder or a bundle, neither the current folder nor around the folder `work`.

    Creates the parent folder, and cleans up after builds that were killed.
    """
    with writable(out):
        if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not a bundle: choose another --out")
        if (place := out.resolve()) == Path.cwd():
            raise InputError(f"{out} is the current folder, which cannot be replaced: choose another --out")
        if work is not None and work.resolve().is_relative_to(place):
            raise InputError(f"{out} is the bundle's folder and holds the work folder {work}: choose another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
        for old in out.parent.glob(
            f".{out.name}.*.old"
        ):  # the earlier bundle, where a build was killed while replacing it
            shutil.rmtree(old) if out.exists() else os.rename(old, out)
        remove_stale(out)


def remove_stale(out: Path) -> None:
    """Remove the temporary folders that killed processes left beside `out` a day ago or earlier."""
    for left in out.parent.glob(f".{out.name}.*.tmp"):
        if time.time() - left.stat().st_mtime > STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def _replace(fresh: Path, out: Path) -> None:
    """Move `fresh` to `out` in one step; an earlier folder there ends up at the place of `fresh`, or is removed."""
    if not out.exists():
        os.rename(fresh, out)
    elif not _swapped(fresh, out):  # unsupported here; a kill between the two renames leaves `.old`
        old = fresh.with_suffix(".old")
        os.rename(out, old)
        try:
            os.rename(fresh, out)
        except BaseException:
            os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _swapped(a: Path, b: Path) -> bool:
    """Swap two folders with renameat2(2), Linux 3.15 and glibc 2.28; False where it is not supported."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return int(swap(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)) == 0


def check_engine(path: Path, setup: Setup) -> None:
    """Raise InputError for a simulated bundle, which is for no device."""
    if setup.simulated:
        raise InputError(f"{path} is simulated and has no engine for a device: build it on the device first")


def version_name(path: Path, manifest: Manifest) -> str:
    """The name of a bundle's folder on a device: <model>-<method>-<precision>-b<batch>-<hash of the manifest>.

    It has ASCII letters and digits, `_`, `.` and `-`; anything else in the model's name becomes `-`.
    Raises InputError for a simulated bundle, which is for no device.
    """
    setup = manifest.engine.setup
    check_engine(path, setup)
    digest = sha256_file(path / MANIFEST)
    name = f"{manifest.vit.name}-{manifest.schedule.method}-{setup.precision}-b{setup.batch}-{digest[:12]}"
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII).lstrip(".-")


def load_bundle(path: Path) -> Manifest:
    """The manifest of a bundle, whose files are checked by their hashes. Raises InputError, RecordError."""
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path}: not a bundle ({MANIFEST} is missing): make one with edgeprune build")
    manifest = decode(read_bytes(path / MANIFEST), Manifest, str(path / MANIFEST))
    check_files(path, manifest, path)
    return manifest


def check_files(path: Path, manifest: Manifest, named: Path) -> None:
    """Check the files in the folder `path` by their hashes. Raises InputError, which calls the bundle `named`."""
    for name, digest in manifest.files.items():
        file = path / name
        if not file.is_file() or file.is_symlink():  # Manifest has checked that names stay in the folder
            raise InputError(f"{named}: {name} is missing: build the bundle again")
        found = sha256_file(file)
        if found != digest:
            raise InputError(
                f"{named}: {name} has sha256 {found[:12]}…, not {digest[:12]}… as in the manifest: it was "
                "changed or truncated, copy or build the bundle again"
            )
    if manifest.engine.path not in manifest.files:
        raise InputError(f"{named}: the engine {manifest.engine.path} is not in the manifest: build the bundle again")


def staircase_of(path: Path) -> Staircase:
    """The staircase in a bundle. Raises RecordError."""
    return load(path / STAIRCASE, Staircase)

"""A bundle on this machine: its device, runtime and engine; refused by name where they do not belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeprune.bundles.format import DEVICE, ONNX, load_bundle
from edgeprune.devices import check_is_here, load_device
from edgeprune.errors import DeviceError
from edgeprune.io import load
from edgeprune.records import Device, Manifest, Setup
from edgeprune.runtimes import Runtime, Session, runtime_for

MUST_MATCH = ("runtime", "runtime_version", "machine", "compute_capability")  # of an engine that was compiled


@dataclass(frozen=True)
class Local:
    """A bundle whose files are whole and whose device is this machine."""

    path: Path
    manifest: Manifest
    device: Device
    runtime: Runtime
    setup: Setup  # of this machine, now

    @property
    def compiled(self) -> bool:
        """Is the engine more than the ONNX, and so bound to a version and a machine?"""
        return self.manifest.engine.path != ONNX

    def open(self) -> Session:
        """Load its engine. Raises EngineError."""
        return self.runtime.open(self.path / self.manifest.engine.path, self.setup)

    def mismatch(self) -> str | None:
        """Which part of the setup an engine was not made for, with what it takes and what is here."""
        for field in MUST_MATCH if self.compiled else ("runtime",):
            wanted, found = getattr(self.manifest.engine.setup, field), getattr(self.setup, field)
            if wanted != found:
                return f"{field} {wanted!r}, here it is {found!r}"
        return None


def device_of(path: Path, manifest: Manifest) -> Device:
    """The device that a bundle was built for, as it was then."""
    if DEVICE in manifest.files:
        return load(path / DEVICE, Device)
    return load_device(manifest.engine.setup.device)


def found(path: Path, manifest: Manifest) -> Local:
    """A loaded bundle on this machine. Raises DeviceError where its device is another, MissingError."""
    device, built = device_of(path, manifest), manifest.engine.setup
    if not built.simulated:
        check_is_here(device)
    runtime = runtime_for(device, built.simulated)
    return Local(path, manifest, device, runtime, runtime.setup(device, built.precision, built.batch))


def local(path: Path, manifest: Manifest | None = None) -> Local:
    """A bundle that can run here. Raises InputError, DeviceError, MissingError."""
    here = found(path, manifest or load_bundle(path))
    if (wrong := here.mismatch()) is not None:
        raise DeviceError(f"{path}: its engine was built for {wrong}: {rebuild(path, here.manifest)}")
    return here


def rebuild(path: Path, manifest: Manifest) -> str:
    """What to do with an engine that does not fit."""
    return f"rebuild it here with edgeprune compile {path / ONNX} --device {manifest.engine.setup.device}"

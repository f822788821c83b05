"""A bundle on this machine: its device, runtime and engine; refused where they do not fit together."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from edgeprune.bundles.format import DEVICE, ONNX, load_bundle
from edgeprune.devices import check_is_here, load_device
from edgeprune.errors import DeviceError
from edgeprune.io import load
from edgeprune.latency.timing import latency_of
from edgeprune.records import Device, Latency, Manifest, Setup
from edgeprune.runtimes import Runtime, Session, runtime_for
from edgeprune.runtimes.quiet import timing

log = logging.getLogger(__name__)

# What a compiled engine is bound to; of the rest of the setup a warning is logged where it differs.
MUST_MATCH = ("runtime", "runtime_version", "compute_capability", "sm_count", "gpu")
SHOULD_MATCH = ("machine", "power_mode")


@dataclass(frozen=True)
class LocalBundle:
    """A bundle with unchanged files whose device is this machine."""

    path: Path
    manifest: Manifest
    device: Device
    runtime: Runtime
    setup: Setup  # of this machine, now

    @property
    def compiled(self) -> bool:
        """Is the engine a compiled file, bound to a version and a machine? False where it is the ONNX itself."""
        return self.manifest.engine.path != ONNX

    def open_engine(self) -> Session:
        """Load its engine. Raises EngineError."""
        return self.runtime.open(self.path / self.manifest.engine.path, self.setup)

    def latency(self, session: Session, count: int) -> Latency:
        """`count` timings of its engine while nothing else on this machine is timed or evaluated."""
        with nullcontext() if self.setup.noiseless else timing():
            return latency_of(session, count)

    def warnings(self) -> list[str]:
        """Parts of the setup that differ from those of a compiled engine, but on which it runs."""
        pairs = [(f, getattr(self.manifest.engine.setup, f), getattr(self.setup, f)) for f in SHOULD_MATCH]
        return [f"{f} {built!r}, here it is {here!r}" for f, built, here in pairs if self.compiled and built != here]

    def mismatch(self) -> str | None:
        """The first part of the setup that does not fit the engine, with both values; None where all fit."""
        for field in MUST_MATCH if self.compiled else ("runtime",):
            wanted, here = getattr(self.manifest.engine.setup, field), getattr(self.setup, field)
            if wanted != here:
                return f"{field} {wanted!r}, here it is {here!r}"
        return None


def device_of(path: Path, manifest: Manifest) -> Device:
    """The device that a bundle was built for, as its file was at that time. Raises RecordError, DeviceError."""
    if DEVICE in manifest.files:
        return load(path / DEVICE, Device)
    return load_device(manifest.engine.setup.device)


def local_bundle(path: Path, manifest: Manifest) -> LocalBundle:
    """A loaded bundle on this machine. Raises DeviceError where its device is another, MissingError."""
    device, built = device_of(path, manifest), manifest.engine.setup
    if not built.simulated:
        check_is_here(device)
    runtime = runtime_for(device, built.simulated)
    return LocalBundle(path, manifest, device, runtime, runtime.setup(device, built.precision, built.batch))


def open_bundle(path: Path, manifest: Manifest | None = None) -> LocalBundle:
    """A bundle whose engine can run here. Raises InputError, RecordError, DeviceError, MissingError."""
    bundle = local_bundle(path, manifest or load_bundle(path))
    if (wrong := bundle.mismatch()) is not None:
        advice = compile_again(path, bundle.manifest)
        raise DeviceError(f"{path}: its engine was built for {wrong}: {advice}")
    for other in bundle.warnings():
        log.warning("%s: its engine was built with %s: latencies may differ", path, other)
    return bundle


def compile_again(path: Path, manifest: Manifest) -> str:
    """The advice for an engine that does not fit."""
    return f"compile it here with edgeprune compile {path / ONNX} --device {manifest.engine.setup.device} --out DIR"

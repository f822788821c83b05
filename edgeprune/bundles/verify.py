"""Checks of a bundle: are its files complete, is this its machine, are its outputs and latency still the same?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edgeprune.bundles.format import GOLDEN, load_bundle
from edgeprune.bundles.open import MUST_MATCH, SHOULD_MATCH, LocalBundle, compile_again, local_bundle
from edgeprune.errors import EdgepruneError
from edgeprune.io import load_array
from edgeprune.records import Latency
from edgeprune.tasks import task_of, typically_off
from edgeprune.version import __version__

MIB = 1 << 20
SIMULATED = "simulated"
TIMED = 40
MEMORY_OF_SIZE = 2  # memory of a loaded engine as a multiple of its file: the engine and its working memory
LEAST_ROUNDS = 5  # below it samples give no interval to compare with


NOT_COMPARABLE = "latencies of the two are not comparable: measure again with edgeprune bench"


class Check(NamedTuple):
    """One line: `status` is ok, warning or failed; the last two say what to do."""

    name: str
    status: str
    expected: str
    found: str
    advice: str = ""


def verify(path: Path) -> list[Check]:
    """The checks in order, up to the first that fails. Raises nothing but OSError."""
    checks: list[Check] = []
    for check in _checks(path):
        checks.append(check)
        if check.status == "failed":
            break
    return checks


def _checks(path: Path) -> Iterator[Check]:
    try:
        manifest = load_bundle(path)
    except EdgepruneError as error:
        yield Check("files", "failed", "a complete bundle", str(error))
        return
    yield Check("files", "ok", f"{len(manifest.files)} files by sha256", "all present and unchanged")
    advice = compile_again(path, manifest)
    if manifest.engine.setup.simulated:
        yield Check(SIMULATED, "warning", "measured latencies", "simulated ones", "build it on the device")
    if manifest.edgeprune != __version__:
        yield Check("edgeprune", "warning", manifest.edgeprune, __version__, "install the version that built it")
    try:
        bundle = local_bundle(path, manifest)
    except EdgepruneError as error:
        yield Check("device", "failed", manifest.engine.setup.machine, str(error), advice)
        return
    yield from _setup(bundle, advice)
    free, needed = bundle.runtime.free_bytes(), MEMORY_OF_SIZE * manifest.engine.size_bytes
    if free is not None:
        what = f"at least {needed // MIB} MiB free", f"{free // MIB} MiB"
        yield (
            Check("memory", "ok", *what)
            if free >= needed
            else Check("memory", "failed", *what, "close other programs")
        )
    try:
        yield from _run(bundle, advice)
    except EdgepruneError as error:
        yield Check("engine", "failed", "loads and runs", str(error), advice)


def _setup(bundle: LocalBundle, advice: str) -> Iterator[Check]:
    """The setup that a compiled engine is bound to; an engine that is the ONNX itself only loses comparability."""
    built = bundle.manifest.engine.setup
    for field in MUST_MATCH:
        wanted, now = getattr(built, field), getattr(bundle.setup, field)
        if wanted is None and now is None:
            continue
        if wanted == now:
            yield Check(field, "ok", str(wanted), str(now))
        elif bundle.compiled or field == "runtime":
            yield Check(field, "failed", str(wanted), str(now), advice)
        else:
            yield Check(field, "warning", str(wanted), str(now), NOT_COMPARABLE)
    for field in SHOULD_MATCH:
        wanted, now = getattr(built, field), getattr(bundle.setup, field)
        name = field.replace("_", " ")
        if wanted != now:
            yield Check(name, "warning", str(wanted), str(now), NOT_COMPARABLE)
        elif field == "machine":
            yield Check(name, "ok", str(wanted), str(now))


def _run(bundle: LocalBundle, advice: str) -> Iterator[Check]:
    """Golden input against golden output, then the latency."""
    manifest, report = bundle.manifest, bundle.manifest.report
    images, wanted = (load_array(bundle.path / name) for name in GOLDEN)
    with bundle.open_engine() as session:
        output = session.infer(images)
        if output.shape != wanted.shape or output.shape[1:] != (manifest.vit.values,):
            yield Check("output", "failed", f"shape {wanted.shape}", f"shape {output.shape}", advice)
            return
        typical = typically_off(task_of(manifest.task, manifest.vit), output, wanted)
        what = f"within {manifest.tolerance:g} of the golden output", f"{typical:.2g} from it"
        good = typical <= manifest.tolerance  # NaN is not
        yield Check("output", "ok", *what) if good else Check("output", "failed", *what, advice)
        latency = bundle.latency(session, TIMED)
    yield _latency(report.latency, latency, bundle.setup.noiseless)


def _latency(stored: Latency, now: Latency, noiseless: bool) -> Check:
    """Do the 95 % intervals of the bundle's latency and of the one measured now overlap?"""
    (low, high), (now_low, now_high) = stored.interval_ms, now.interval_ms
    figures = f"{low:.3f} to {high:.3f} ms", f"{now_low:.3f} to {now_high:.3f} ms"
    if len(stored.samples_ms) < LEAST_ROUNDS and not noiseless:
        return Check(
            "latency", "warning", *figures, f"measured in too few rounds: build it with {LEAST_ROUNDS} or more"
        )
    if now_low <= high and low <= now_high:
        return Check("latency", "ok", *figures)
    return Check("latency", "warning", *figures, "see edgeprune doctor, or build it again")

"""Is a bundle whole, does it belong here, does it still compute and time what it did? Every mismatch by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edgeprune import __version__
from edgeprune.bundles.format import GOLDEN, load_bundle
from edgeprune.bundles.open import MUST_MATCH, Local, found, rebuild
from edgeprune.errors import EdgepruneError
from edgeprune.io import load_array
from edgeprune.latency.timing import latency_of
from edgeprune.stats import typical_difference

MIB = 1 << 20
SIMULATED = "simulated"
TIMED, WARMUP = 40, 10
MEMORY_OF_SIZE = 2  # bytes that a loaded engine takes, by byte of its file: itself, and what it works in


class Check(NamedTuple):
    """One line: `status` is ok, warning or failed; the last two say what to do."""

    name: str
    status: str
    expected: str
    found: str
    advice: str = ""


def verify(path: Path) -> list[Check]:
    """All checks that could be made, in order; the first that fails ends it. Raises nothing but OSError."""
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
        yield Check("files", "failed", "a whole bundle", str(error))
        return
    yield Check("files", "ok", f"{len(manifest.files)} files by sha256", "all there and unchanged")
    again = rebuild(path, manifest)
    if manifest.engine.setup.simulated:
        yield Check(SIMULATED, "warning", "measured latencies", "those of a model", "build it on the device")
    if manifest.edgeprune != __version__:
        yield Check("edgeprune", "warning", manifest.edgeprune, __version__, "install the version that built it")
    try:
        here = found(path, manifest)
    except EdgepruneError as error:
        yield Check("device", "failed", manifest.engine.setup.machine, str(error), again)
        return
    yield from _setup(here, again)
    free, needed = here.runtime.free_bytes(), MEMORY_OF_SIZE * manifest.engine.size_bytes
    if free is not None:
        what = f"at least {needed // MIB} MiB free", f"{free // MIB} MiB"
        yield (
            Check("memory", "ok", *what)
            if free >= needed
            else Check("memory", "failed", *what, "close other programs")
        )
    try:
        yield from _run(here, again)
    except EdgepruneError as error:
        yield Check("engine", "failed", "loads and runs", str(error), again)


def _setup(here: Local, again: str) -> Iterator[Check]:
    """What an engine that was compiled is bound to; for one that is ONNX only the latency depends on it."""
    built = here.manifest.engine.setup
    for field in MUST_MATCH:
        wanted, now = getattr(built, field), getattr(here.setup, field)
        if wanted is None and now is None:
            continue
        if wanted == now:
            yield Check(field, "ok", str(wanted), str(now))
        elif here.compiled or field == "runtime":
            yield Check(field, "failed", str(wanted), str(now), again)
        else:
            yield Check(field, "warning", str(wanted), str(now), "latencies of the two do not compare")
    if built.power_mode != here.setup.power_mode:
        advice = "latencies of the two do not compare"
        yield Check("power mode", "warning", str(built.power_mode), str(here.setup.power_mode), advice)


def _run(here: Local, again: str) -> Iterator[Check]:
    """Golden input to golden output, then the latency."""
    manifest, report = here.manifest, here.manifest.report
    images, wanted = (load_array(here.path / name) for name in GOLDEN)
    with here.open() as session:
        output = session.infer(images)
        if output.shape != wanted.shape:
            yield Check("output", "failed", f"shape {wanted.shape}", f"shape {output.shape}", again)
            return
        typical = typical_difference(output, wanted)
        what = f"within {manifest.tolerance:g} of the golden output", f"{typical:.2g} away"
        good = typical <= manifest.tolerance  # NaN is not
        yield Check("output", "ok", *what) if good else Check("output", "failed", *what, again)
        latency = latency_of(session, TIMED, WARMUP)
    (low, high), (now_low, now_high) = report.latency.interval_ms, latency.interval_ms
    what = f"{low:.3f} to {high:.3f} ms", f"{now_low:.3f} to {now_high:.3f} ms"
    meets = now_low <= high and low <= now_high
    advice = "see edgeprune doctor, or build it again"
    yield Check("latency", "ok", *what) if meets else Check("latency", "warning", *what, advice)

"""Bundles side by side on this machine: interleaved, so that drift hits all alike; beside them its measured peak."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeprune import __version__
from edgeprune.benchmark.baseline import Baseline, add_ratios, check_comparable, drift
from edgeprune.benchmark.peak import Gemm, largest_useful
from edgeprune.bundles.format import ONNX, load_bundle
from edgeprune.bundles.open import Local, device_of, local
from edgeprune.devices.power import locked_clocks
from edgeprune.devices.sensors import Meter, PeakMemory, rails_w, total_w
from edgeprune.errors import EngineError, InputError
from edgeprune.latency.timing import WARMUP, interleave
from edgeprune.onnx_graph.matmuls import flops_of_onnx
from edgeprune.records import SCHEMA, Latency, Manifest, Progress, Setup, silent
from edgeprune.runtimes import OnDevice, Session
from edgeprune.runtimes.inference import Open
from edgeprune.stats import bootstrap_ratio

log = logging.getLogger(__name__)

SETTLE = 200  # inferences within which a bundle settles, or a warning says that it has not
ENERGY_S = 2.0  # at full rate, after a quarter of it for the sensors to follow


def bench_bundles(
    bundles: Sequence[Path],
    rounds: int,
    progress: Progress = silent,
    baseline: Path | None = None,
    lock_clocks: bool = False,
) -> dict[str, Any]:
    """{"rows": one per bundle, "probes": matrix products measured in the same rounds}; a baseline for another bench.

    Raises InputError for a bundle that is incomplete, given twice, or a baseline of another setup; DeviceError for a
    bundle of another device, or whose engine belongs to another machine or version.
    """
    manifests = _loaded(bundles)
    devices = {path: device_of(path, manifest) for path, manifest in manifests.items()}
    simulated = all(manifest.engine.setup.simulated for manifest in manifests.values())
    with ExitStack() as stack:
        for device in {device.name: device for device in devices.values()}.values() if lock_clocks else ():
            stack.enter_context(locked_clocks(device))
        candidates = [local(path, manifest) for path, manifest in manifests.items()]
        named = [(str(c.path), c.manifest.vit.name, c.setup) for c in candidates]
        then = check_comparable(baseline, named) if baseline is not None else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gemms = _gemms(candidates, folder, then, progress)
        costs = [_costs(candidate) for candidate in candidates]
        opened: dict[str, Open] = {str(c.path): c.open for c in candidates}
        opened |= {_name(gemm): gemm.open for gemm in gemms.values()}
        how = (1, WARMUP) if simulated else (rounds, SETTLE)
        samples = interleave(opened, how[0], progress=progress, what="bundles", warmup=how[1])
    probes = {setup: _probe(gemm, samples[_name(gemm)]) for setup, gemm in gemms.items()}
    first = samples[str(bundles[0])]
    rows = [
        _row(c, samples[str(c.path)], first, probes[_probe_setup(c)]) | cost
        for c, cost in zip(candidates, costs, strict=True)
    ]
    if then is not None:
        add_ratios(then, rows, list(probes.values()))
        if (changed := drift(list(probes.values()))) is not None:
            log.warning("%s", changed)
    return {"schema": SCHEMA, "edgeprune": __version__, "rows": rows, "probes": list(probes.values())}


def _loaded(bundles: Sequence[Path]) -> dict[Path, Manifest]:
    """Manifests by bundle. Raises InputError."""
    for path in bundles:
        if bundles.count(path) > 1:
            raise InputError(f"{path} is given twice: name each bundle once")
    manifests = {path: load_bundle(path) for path in bundles}
    if len({manifest.engine.setup.simulated for manifest in manifests.values()}) > 1:
        raise InputError("simulated and measured latencies do not compare: bench bundles of one kind")
    return manifests


def _probe_setup(candidate: Local) -> Setup:
    """What its peak is measured under; INT8 on hardware has no probe of its own, fp32 tells drift alone."""
    setup = candidate.setup
    known = setup.simulated or setup.precision != "int8"
    return msgspec.structs.replace(setup, precision=setup.precision if known else "fp32", batch=1)


def _gemms(
    candidates: Sequence[Local], folder: Path, baseline: Baseline | None, progress: Progress
) -> dict[Setup, Gemm]:
    """A matrix product for each setup; as large as the baseline's, so that both tell how the machine has changed."""
    gemms: dict[Setup, Gemm] = {}
    for index, candidate in enumerate(candidates):
        progress("matrix products", index, len(candidates))
        setup = _probe_setup(candidate)
        if setup not in gemms:
            known = baseline.probe(setup) if baseline is not None else None
            gemms[setup] = largest_useful(
                candidate.runtime, setup, folder / str(index), known.size if known is not None else None
            )
    return gemms


def _costs(candidate: Local) -> dict[str, Any]:
    """Memory and energy of a bundle that runs alone; None where nothing tells.

    Memory is the engine's on its device where the session knows it; of ONNX Runtime on a CPU the resident memory that
    loading and running adds to this process at its peak.
    """
    with PeakMemory() as resident, candidate.open() as session:
        for _ in range(WARMUP):
            session.time_ms()
        on_device = session.memory_bytes() if isinstance(session, OnDevice) else None
        energy_mj = None if candidate.setup.simulated else _energy_mj(session, candidate.setup.batch)
    used = resident.bytes if candidate.setup.runtime == "ort-cpu" else on_device
    return {"peak_memory_mib": None if used is None else used / 2**20, "energy_per_image_mj": energy_mj}


def _energy_mj(session: Session, batch: int) -> float | None:
    """Energy that the whole board takes for one image at full rate, mJ; None where no sensor answers."""
    if total_w(rails_w()) is None:
        return None
    _inferences(session, ENERGY_S / 4)
    with Meter() as meter:
        count = _inferences(session, ENERGY_S)
    joules = meter.energy_j
    return None if joules is None else 1e3 * joules / (count * batch)


def _inferences(session: Session, seconds: float) -> int:
    """One after the other for so long; how many."""
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        session.time_ms()
        count += 1
    return count


def _row(candidate: Local, mine: Sequence[float], first: Sequence[float], probe: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle is, its latency, its speed-up against the first with the bootstrap interval, and its rates."""
    manifest, setup = candidate.manifest, candidate.setup
    latency = Latency(samples_ms=tuple(mine))
    speedup, interval = bootstrap_ratio(first, mine, paired=True)
    return {
        "bundle": str(candidate.path),
        "model": manifest.vit.name,
        "device": setup.device,
        "runtime": setup.runtime,
        "runtime_version": setup.runtime_version,
        "precision": setup.precision,
        "batch": setup.batch,
        "method": manifest.schedule.method,
        "policy": manifest.schedule.policy,
        "tokens": list(manifest.schedule.tokens),
        "simulated": setup.simulated,
        "setup": msgspec.structs.asdict(setup),
        "latency_ms": {**latency.summary(), "p90": float(np.percentile(mine, 90))},
        "speedup_to_first": speedup,
        "speedup_interval": list(interval),
        "images_per_s": 1e3 * setup.batch / latency.median_ms,
        **_work(candidate, latency.median_ms, probe),
        "samples_ms": list(mine),
    }


def _work(candidate: Local, median_ms: float, probe: Mapping[str, Any]) -> dict[str, float | None]:
    """Operations of the ONNX in a bundle, the rate they are done at, and its share of the measured peak."""
    try:
        gflop = flops_of_onnx(candidate.path / ONNX) / 1e9
    except EngineError as error:  # an operator that it cannot count
        log.warning("no GFLOP/s: %s", error)
        gflop = None
    rate = None if gflop is None else 1e3 * gflop / median_ms
    peak = probe["peak_gflop_per_s"] if probe["setup"]["precision"] == candidate.setup.precision else None
    share = None if rate is None or peak is None else rate / peak
    return {"gflop": gflop, "gflop_per_s": rate, "peak_gflop_per_s": peak, "peak_share": share}


def _name(gemm: Gemm) -> str:
    setup = gemm.setup
    what = (setup.device, setup.runtime, setup.precision, setup.options or "default options")
    return f"product of {gemm.size} x {gemm.size} ({', '.join(what)})"


def _probe(gemm: Gemm, samples: Sequence[float]) -> dict[str, Any]:
    """The best median of a matrix product as a rate, and the samples that tell how the machine drifts."""
    best_ms = min(gemm.searched_ms, float(np.median(samples)))
    return {
        "setup": msgspec.structs.asdict(gemm.setup),
        "size": gemm.size,
        "peak_gflop_per_s": 1e3 * gemm.gflop / best_ms,
        "samples_ms": list(samples),
    }

"""Bundles side by side on this machine: interleaved, so that drift hits all alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.bundle import DEVICE, load_bundle
from edgeprune.devices import check_is_here, load_device
from edgeprune.errors import InputError
from edgeprune.measure import WARMUP, Open, interleave, ratio
from edgeprune.records import Device, Latency, Progress, load, silent
from edgeprune.runtimes import runtime_for


def bench_bundles(bundles: Sequence[Path], rounds: int, progress: Progress = silent) -> list[dict[str, Any]]:
    """One row per bundle: latency, and speed-up against the first with its interval.

    Raises InputError for a bundle that is incomplete or given twice, DeviceError for one of another machine.
    """
    candidates: dict[str, Open] = {}
    rows = []
    for path in bundles:
        manifest = load_bundle(path)
        setup = manifest.engine.setup
        device = load(path / DEVICE, Device) if DEVICE in manifest.files else load_device(setup.device)
        if not setup.simulated:
            check_is_here(device)
        runtime = runtime_for(device, setup.simulated)
        here = runtime.setup(device, setup.precision, setup.batch)
        name = str(path)
        if name in candidates:
            raise InputError(f"{path} is given twice: name each bundle once")
        file = path / manifest.engine.path
        candidates[name] = lambda runtime=runtime, file=file, here=here: runtime.open(file, here)  # type: ignore[misc]
        rows.append(
            {
                "bundle": name,
                "model": manifest.vit.name,
                "device": setup.device,
                "runtime": here.runtime,
                "runtime_version": here.runtime_version,
                "precision": setup.precision,
                "batch": setup.batch,
                "method": manifest.schedule.method,
                "policy": manifest.schedule.policy,
                "tokens": list(manifest.schedule.tokens),
                "simulated": setup.simulated,
            }
        )
    simulated = all(row["simulated"] for row in rows)
    samples = interleave(candidates, 1 if simulated else rounds, progress=progress, what="bundles")
    first = samples[str(bundles[0])]
    for row in rows:
        mine = samples[str(row["bundle"])]
        row["latency_ms"] = Latency(samples_ms=tuple(mine), warmup=WARMUP).summary()
        row["speedup_to_first"], interval = ratio(first, mine)
        row["speedup_interval"] = list(interval)
    return rows

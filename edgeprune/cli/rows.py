"""The JSON rows of the command contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeprune.latency.depth import PAIR_BLOCKS
from edgeprune.latency.probing import confirmed_edges
from edgeprune.records import SCHEMA, PrecisionResult, Recovery, Report, Schedule, Setup, Staircase
from edgeprune.version import __version__

if TYPE_CHECKING:
    from edgeprune.benchmark.result import Bench, BenchRow, Peak, Ratio
    from edgeprune.bundles.predict import Prediction, Predictions
    from edgeprune.pipeline.compare import Comparison
    from edgeprune.sweeps.run import Outcome

# The keys of the command contract that a build of a sweep lacks where it failed.
UNKNOWN_OF_FAILURES = (
    "bundle", "runtime", "tokens", "latency_ms", "dense_latency_ms", "speedup", "predicted_ms", "agreement", "kl",
    "top1", "dense_top1", "images", "probes",
)  # fmt: skip


def row_of(
    setup: Setup, schedule: Schedule, report: Report, bundle: Path | None, recovery: Recovery | None = None
) -> dict[str, Any]:
    """A measured schedule as the JSON row of the command contract; an unknown figure is None."""
    row: dict[str, Any] = {
        "bundle": str(bundle) if bundle else None,
        **_measured(setup, schedule),
        "prefix_last": schedule.prefix_last,
        "latency_ms": report.latency.summary(),
        "dense_latency_ms": report.dense_latency.summary() if report.dense_latency else None,
        "speedup": report.speedup,
        "speedup_interval": list(report.speedup_interval) if report.speedup_interval else None,
        "predicted_ms": report.predicted_ms,
        "agreement": report.agreement,
        "kl": report.kl,
        "top1": report.top1,
        "dense_top1": report.dense_top1,
        "fidelity": msgspec.to_builtins(report.fidelity),
        "images": report.images,
        "held_out": report.held_out,
        "probes": report.probes,
        "fusable_attention": report.fusable_attention,
        "fused_attention": report.fused_attention,
        "cuda_graph": report.latency.cuda_graph,
        "recovery": msgspec.structs.asdict(recovery) if recovery else None,
        "unrecovered": msgspec.to_builtins(report.unrecovered) if report.unrecovered else None,
    }
    if setup.simulated:
        row["simulated"] = True
    return row


def _measured(setup: Setup, schedule: Schedule) -> dict[str, Any]:
    """What was measured, and where."""
    return {
        "model": schedule.vit.name,
        "device": setup.device,
        "runtime": setup.runtime,
        "runtime_version": setup.runtime_version,
        "precision": setup.precision,
        "batch": setup.batch,
        "method": schedule.method,
        "policy": schedule.policy,
        "tokens": list(schedule.tokens),
    }


def precision_rows(results: Sequence[PrecisionResult]) -> list[dict[str, Any]]:
    """What `--precision auto` tried, as rows."""
    rows = []
    for result in results:
        row = msgspec.structs.asdict(result)
        latency = row.pop("latency")
        rows.append({"precision": row.pop("precision"), "latency_ms": latency.summary() if latency else None, **row})
    return rows


def profile_row(staircase: Staircase, path: Path) -> dict[str, Any]:
    """A staircase as the JSON object of `profile --json`."""
    points = []
    for point in staircase.points:
        low, high = point.latency.interval_ms
        points.append({"tokens": point.tokens, "median_ms": point.latency.median_ms, "low": low, "high": high})
    return {
        "device": staircase.setup.device,
        "model": staircase.vit.name,
        "runtime": staircase.setup.runtime,
        "simulated": staircase.setup.simulated,
        "precision": staircase.setup.precision,
        "batch": staircase.setup.batch,
        "probes": staircase.probes,
        "throttled": staircase.throttled,
        "points": points,
        "treads": list(confirmed_edges(staircase)),
        "fixed_ms": staircase.fixed.median_ms,
        "dense_ms": staircase.dense.median_ms,
        "trunk_blocks": PAIR_BLOCKS if staircase.depth else staircase.vit.depth,  # that were timed at each count
        "path": str(path),
    }


def device_rows() -> list[dict[str, Any]]:
    """Every device file as a row."""
    from edgeprune.devices import load_device, names

    fields = ("title", "runtime", "build", "compute_capability", "sm_count", "memory_gib", "tensorrt", "jetpack")
    rows = []
    for name in names():
        device = load_device(name)
        row = {"name": name} | {field: getattr(device, field) for field in fields}
        rows.append(row | {"reason": device.reason or None, "simulation": device.simulation is not None})
    return rows


def compare_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Entries of a comparison as rows of the contract, with the target speed-up of each."""
    rows = []
    for entry in comparison.entries:
        assert entry.report is not None
        row = row_of(comparison.setup, entry.schedule, entry.report, None, entry.recovery)
        rows.append({"target": entry.target, **row})
    return rows


def sweep_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Builds of a sweep as rows of the contract, with `job`, `label`, `goal`, `board` and `error`.

    The label is the model with what tells it from others of its name. A failure has no figures.

    Raises InputError where a bundle has been removed or damaged in the meantime.
    """
    from edgeprune.bundles.format import load_bundle

    rows = []
    for outcome in outcomes:
        job = outcome.job
        about = {
            "job": job.name,
            "label": job.label,
            "goal": str(job.goal),
            "board": job.board,
            "error": outcome.error,
        }
        if outcome.bundle is not None:
            path = Path(outcome.bundle)
            found = load_bundle(path)
            rows.append(about | row_of(found.engine.setup, found.schedule, found.report, path, found.recovery))
            continue
        known = {"model": job.model.name, "device": job.device, "precision": job.precision, "batch": job.batch}
        known |= {"method": job.method, "policy": job.policy} | ({"simulated": True} if job.simulate else {})
        rows.append(about | dict.fromkeys(UNKNOWN_OF_FAILURES) | known)
    return rows


def bench_row(bench: Bench) -> dict[str, Any]:
    """A bench as the JSON object of `bench --json`, which is also a baseline; matrix products are its "probes"."""
    return {
        "schema": SCHEMA,
        "edgeprune": __version__,
        "end_to_end": bench.end_to_end,
        "rows": [_bundle_row(row) for row in bench.rows],
        "probes": [_peak_row(peak) for peak in bench.peaks],
    }


def _bundle_row(row: BenchRow) -> dict[str, Any]:
    return {
        "bundle": row.bundle,
        **_measured(row.setup, row.schedule),
        "simulated": row.setup.simulated,
        "setup": msgspec.structs.asdict(row.setup),
        "latency_ms": {**row.latency.summary(), "p90": row.p90_ms},
        "cuda_graph": row.latency.cuda_graph,
        "speedup_to_first": row.speedup.value,
        "speedup_interval": list(row.speedup.interval),
        "images_per_s": row.images_per_s,
        "gflop": row.gflop,
        "gflop_per_s": row.gflop_per_s,
        "peak_gflop_per_s": row.peak_gflop_per_s,
        "peak_share": row.peak_share,
        "samples_ms": list(row.latency.samples_ms),
        "peak_memory_mib": row.peak_memory_mib,
        "energy_per_image_mj": row.energy_per_image_mj,
        **_baseline_figures(row.to_baseline),
    }


def _peak_row(peak: Peak) -> dict[str, Any]:
    return {
        "setup": msgspec.structs.asdict(peak.setup),
        "size": peak.size,
        "peak_gflop_per_s": peak.gflop_per_s,
        "samples_ms": list(peak.latency.samples_ms),
        **_baseline_figures(peak.to_baseline),
    }


def _baseline_figures(ratio: Ratio | None) -> dict[str, Any]:
    """Absent where nothing was compared."""
    return {} if ratio is None else {"baseline_ratio": ratio.value, "baseline_interval": list(ratio.interval)}


def _prediction(row: Prediction) -> dict[str, Any]:
    saved = {"file": str(row.file)} if row.file else {}
    if row.embedding is not None:
        return {"norm": row.norm, "embedding": row.embedding, **_shapes(row), **saved}
    return saved | {"top": [{"class": c.index, "label": c.label, "percent": c.percent} for c in row.top]}


def _shapes(row: Prediction) -> dict[str, Any]:
    """Shapes of dense features, which are too large for JSON: `run --out` saves them."""
    return {"features": {name: list(array.shape) for name, array in row.features.items()}} if row.features else {}


def predictions_row(found: Predictions) -> dict[str, Any]:
    """Predictions as the JSON object of `run --json`."""
    row: dict[str, Any] = {
        "bundle": str(found.bundle),
        "model": found.model,
        "device": found.setup.device,
        "runtime": found.setup.runtime,
        "batch": found.setup.batch,
        "task": found.task,
        "rows": [{"image": str(row.image), **_prediction(row)} for row in found.rows],
        "latency_ms": found.latency.summary() if found.latency else None,
    }
    return row | ({"simulated": True} if found.setup.simulated else {})

"""Steps 5 to 7: staircases of one block, measured against simulated ones, and methods at equal tokens and latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeprune import stats
from edgeprune.defaults import REDUCERS
from edgeprune.devices import load_device
from edgeprune.errors import EngineError, InputError
from edgeprune.latency.staircase import attention_share, exceeds
from edgeprune.records import Latency, Vit
from edgeprune.runtimes import Observed
from edgeprune.runtimes.kernel_times import latency_ms
from edgeprune.runtimes.simulated import operations_of_trunk
from gpu_steps.kit import LATENCY, models_for, read_json, vit_of
from gpu_steps.precisions import precisions
from gpu_steps.run import EngineSpec, Parts, Run, Skipped

PRECISION = "fp16"
STRIDE = 8  # between measured counts
TILE = 32  # where one count less and one more are measured, too
RISE = 0.01  # least relative step that counts as an edge
NEAR = 2  # tokens within which a measured and a simulated edge are the same
REFERENCE = 50  # percent: methods are compared at the median latency of their models with half of the tokens


def batches_of(folder: Path) -> list[int]:
    """Batch sizes for which a model was prepared."""
    return sorted(int(path.stem.rpartition("-b")[2]) for path in folder.glob("block-b*.onnx"))


def counts_of(vit: Vit) -> list[int]:
    """Multiples of STRIDE, one less and one more at multiples of TILE, and the unpruned count."""
    lowest = max(2 * STRIDE, vit.prefix + 2) if vit.tokens > 4 * STRIDE else vit.prefix + 2
    counts = {n for n in range(lowest, vit.tokens) if n % STRIDE == 0 or n % TILE in (1, TILE - 1)}
    return sorted(counts | {vit.tokens, min(lowest, vit.tokens)})


def staircases(run: Run) -> Parts:
    """Step 5."""
    parts: Parts = {}
    for folder in models_for(run.kit, LATENCY):
        for batch in batches_of(folder):
            parts[f"{folder.name} b{batch}"] = lambda f=folder, b=batch: staircase(run, f, b)  # type: ignore[misc]
    return parts


def staircase(run: Run, folder: Path, batch: int) -> Any:
    """Latency of one block at each count, all in the same rounds; ms of every round are kept."""
    vit = vit_of(folder)
    specs = {n: EngineSpec(folder, f"block-b{batch}", PRECISION, batch, n) for n in counts_of(vit)}
    errors = run.build(list(specs.values()), timed=True)
    there = built(specs, errors)
    runtime = run.target(PRECISION, batch).runtime
    before = runtime.gpu_state() if isinstance(runtime, Observed) else None
    samples, graphs = run.interleaved(there, run.stairs)
    after = runtime.gpu_state() if isinstance(runtime, Observed) else None
    return {
        "model": folder.name,
        "batch": batch,
        "precision": PRECISION,
        "errors": {spec.tokens: text for spec, text in errors.items()},
        "gpu": [msgspec.to_builtins(state) for state in (before, after)],
        "cuda_graph": graphs,
        "samples_ms": samples,
    }


def built(specs: Mapping[Any, EngineSpec], errors: Mapping[EngineSpec, str]) -> dict[Any, EngineSpec]:
    """The engines that were built. Raises EngineError where none was."""
    found = {key: spec for key, spec in specs.items() if spec not in errors}
    if not found:
        raise EngineError(
            f"no engine could be built ({next(iter(errors.values()), 'none is wanted')}): see their logs"
        )
    return found


def against_simulation(run: Run) -> Parts:
    """Step 6: from the figures of step 5, no GPU needed."""
    measured = run.out / "step-5.json"
    if not measured.exists():
        return {"all": lambda: _no_step_5(measured)}
    parts: Parts = {}
    for name, row in read_json(measured)["parts"].items():
        parts[name] = lambda r=row: compared_with_simulation(run, r)  # type: ignore[misc]
    return parts


def _no_step_5(path: Path) -> Any:
    raise InputError(f"{path} is missing: run --step 5 first")


def compared_with_simulation(run: Run, row: Mapping[str, Any]) -> Any:
    """Edges and the order of latencies in a measured staircase and in the simulated one at the same counts."""
    device = load_device(run.simulated)
    if run.sm_limit:
        device = msgspec.structs.replace(device, sm_count=run.sm_limit)
    measured = {int(n): Latency(samples_ms=tuple(ms)) for n, ms in row["samples_ms"].items()}
    block = msgspec.structs.replace(vit_of(run.kit / row["model"]), depth=1)
    simulated = {
        n: latency_ms(operations_of_trunk(block, n, row["batch"]), device, row["precision"]) for n in measured
    }
    pairs = list(pairwise(sorted(measured)))
    found = [
        a for a, b in pairs
        if exceeds(measured[b], measured[a]) and measured[b].median_ms > (1 + RISE) * measured[a].median_ms
    ]  # fmt: skip
    said = [a for a, b in pairs if simulated[b] > (1 + RISE) * simulated[a]]
    medians = [measured[n].median_ms for n in simulated]
    return {
        "counts": len(measured),
        "measured_edges": found,
        "simulated_edges": said,
        "recall": near_share(found, said),
        "precision": near_share(said, found),
        "chance_recall": near_share([a for a, _ in pairs], said),
        "rank_correlation": rank_correlation(medians, list(simulated.values())),
        "measured_over_simulated": float(np.median(np.array(medians) / list(simulated.values()))),
    }


def near_share(edges: Sequence[int], others: Sequence[int]) -> float | None:
    """Share of edges with another within NEAR tokens; None without edges."""
    return float(np.mean([any(abs(a - b) <= NEAR for b in others) for a in edges])) if edges else None


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's coefficient, ties with their mean rank; None where either is constant."""
    ranks = []
    for values in (a, b):
        _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(ties) - (ties - 1) / 2)[place])
    if any(np.ptp(each) == 0 for each in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def methods(run: Run) -> Parts:
    """Step 7."""
    parts: Parts = {}
    for folder in models_for(run.kit, LATENCY):
        for batch in batches_of(folder):
            parts[f"{folder.name} b{batch} methods"] = lambda f=folder, b=batch: equal(run, f, b)  # type: ignore[misc]
            parts[f"{folder.name} b{batch} cuts"] = lambda f=folder, b=batch: cuts(run, f, b)  # type: ignore[misc]
            parts[f"{folder.name} b{batch} precisions"] = (  # type: ignore[misc]
                lambda f=folder, b=batch: precisions(run, f, b)
            )
    return parts


def equal(run: Run, folder: Path, batch: int) -> Any:
    """Every method at equal tokens, in the same rounds as the unpruned model, and the tokens for equal latency."""
    names = [path.stem for path in sorted(folder.glob(f"*-r*-b{batch}.onnx"))]
    specs = {name: EngineSpec(folder, name, PRECISION, batch) for name in (f"dense-b{batch}", *names)}
    errors = run.build(list(specs.values()), timed=True)
    samples, graphs = run.interleaved(built(specs, errors), run.rounds)
    unpruned = samples.get(f"dense-b{batch}")
    if unpruned is None:
        raise InputError(f"the unpruned model could not be built ({errors}): see its log in the work folder")
    rows, share_at = [], {}
    for name in (name for name in names if name in samples):
        method, percent = name.split("-")[0], int(name.split("-")[1][1:])
        speedup, interval = stats.ratio(unpruned, samples[name])
        latency = Latency(samples_ms=tuple(samples[name]))
        row = {"method": method, "percent": percent, "speedup": speedup, "interval": interval}
        rows.append(row | _ms(latency) | {"cuda_graph": graphs.get(name)})
        share_at.setdefault(method, {100: 1.0})[percent] = 1 / speedup
    reference = [points[REFERENCE] for points in share_at.values() if REFERENCE in points]
    share = float(np.median(reference)) if reference else None
    return {
        "unpruned": _ms(Latency(samples_ms=tuple(unpruned))) | {"cuda_graph": graphs.get(f"dense-b{batch}")},
        "rounds": run.rounds,
        "rows": rows,
        "equal_latency": {
            "share_of_unpruned": share,
            "percent_of_tokens": {m: tokens_at(points, share) for m, points in share_at.items()} if share else {},
        },
        "errors": {spec.name: text for spec, text in errors.items()},
    }


def _ms(latency: Latency) -> dict[str, Any]:
    return {"ms": latency.summary()}


def tokens_at(points: Mapping[int, float], share: float) -> float | None:
    """Percent of the tokens at which a latency is reached, linear between what was measured; None outside of it.

    `points` are latencies as shares of the unpruned one, by percent of the tokens.
    """
    percents = sorted(points)
    latencies = [points[percent] for percent in percents]
    if any(a >= b for a, b in pairwise(latencies)) or not latencies[0] <= share <= latencies[-1]:
        return None
    return float(np.interp(share, latencies, percents))


def cuts(run: Run, folder: Path, batch: int) -> Any:
    """What one cut adds to a block, as edgeprune's profiling measures it (staircase.py), µs with intervals."""
    vit = vit_of(folder)
    found = [path.stem for path in sorted(folder.glob(f"cut-*-b{batch}.onnx"))]
    pairs = {name: (name.split("-")[1], int(name.split("-")[2]), int(name.split("-")[3])) for name in found}
    blocks = {n for _, entering, leaving in pairs.values() for n in (entering, leaving)}
    specs: dict[Any, EngineSpec] = {name: EngineSpec(folder, name, PRECISION, batch) for name in found}
    specs |= {n: EngineSpec(folder, f"block-b{batch}", PRECISION, batch, n) for n in sorted(blocks)}
    errors = run.build(list(specs.values()), timed=True)
    if any(specs[n] in errors for n in blocks) or not found:
        raise Skipped(f"needs blocks without a cut, and one cannot be built: {[*errors.values()][:1]}")
    samples, graphs = run.interleaved(built(specs, errors), run.rounds)
    rows = []
    for name, (method, entering, leaving) in pairs.items():
        if name not in samples:
            continue
        share = attention_share(vit, entering)
        together = zip(samples[name], samples[entering], samples[leaving], strict=True)
        added = [1e3 * (c - share * full - (1 - share) * less) for c, full, less in together]
        row = {"method": method, "entering": entering, "leaving": leaving, "added_us": float(np.median(added))}
        rows.append(
            row
            | {"interval_us": stats.median_interval(added), "block_us": 1e3 * float(np.median(samples[entering]))}
            | {"cuda_graph": [graphs.get(key) for key in (name, entering, leaving)]}
        )
    order = {method: place for place, method in enumerate(REDUCERS)}
    rows.sort(key=lambda row: (-int(str(row["entering"])), order.get(str(row["method"]), 99)))
    return {"rows": rows, "errors": {spec.name: text for spec, text in errors.items()}}

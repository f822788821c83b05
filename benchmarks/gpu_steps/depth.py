"""Step 9: does the latency of two blocks tell that of the trunk, as edgeprune/latency/depth.py assumes?"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import stats
from edgeprune.errors import InputError
from edgeprune.latency.depth import CHECKED, FITTED, MOST_OFF, counts_at, fit
from edgeprune.latency.probing import all_counts
from gpu_steps.kit import LATENCY, models_for, vit_of, weights_key
from gpu_steps.run import EngineSpec, OutOfTime, Parts, Run

PRECISION = "fp16"
PLACES = 9  # counts that are timed, evenly spaced; three are fitted, two decide, as in a build
NAMES = ("trunk", "pair")


def two_blocks(run: Run) -> Parts:
    """Step 9, at the first batch of each model."""
    parts: Parts = {}
    for folder in models_for(run.kit, LATENCY):
        for path in sorted(folder.glob("pair-b*.onnx")):
            batch = int(path.stem.rpartition("-b")[2])
            parts[f"{folder.name} b{batch}"] = lambda f=folder, b=batch: predicted(run, f, b)  # type: ignore[misc]
    return parts or {"all": lambda: _no_pairs(run.kit)}


def _no_pairs(kit: Path) -> Any:
    raise InputError(f"{kit} has no pair-b*.onnx: prepare it with this version")


def predicted(run: Run, folder: Path, batch: int) -> Any:
    """Error of the trunk's latency as two blocks tell it, at each count, and seconds to compile either.

    Compiling is timed at the highest count, each in a new work folder, so that no tactics are known already.
    """
    counts = all_counts(vit_of(folder))
    places = sorted({*counts_at(counts, [i / (PLACES - 1) for i in range(PLACES)])})

    def spec(name: str, tokens: int) -> EngineSpec:
        return EngineSpec(folder, f"{name}-b{batch}", PRECISION, batch, tokens)

    specs = {(name, n): spec(name, n) for n in places for name in NAMES}
    errors = run.build(list(specs.values()), timed=True)
    if errors:
        raise InputError(f"{len(errors)} engines could not be built ({next(iter(errors.values()))}): see their logs")
    seconds_to_build(run, spec("pair", counts[0]))  # the first build of a process also loads the builder's kernels
    build_s = {name: seconds_to_build(run, spec(name, counts[-1])) for name in NAMES}
    samples, graphs = run.interleaved(specs, run.stairs)
    whole, part = ({n: float(np.median(samples[name, n])) for n in places} for name in NAMES)
    check = fit(whole, part, counts_at(counts, FITTED), counts_at(counts, CHECKED))
    rows = []
    for n in places:
        row: dict[str, Any] = {
            "tokens": n,
            "trunk_ms": whole[n],
            "interval_ms": stats.median_interval(samples["trunk", n]),
        }
        row |= {"pair_ms": part[n], "predicted_ms": check.trunk_ms(part[n])}
        rows.append(row | {"error": row["predicted_ms"] / whole[n] - 1})
    return {
        "model": folder.name,
        "batch": batch,
        "precision": PRECISION,
        "check_off": check.off,
        "allowed": MOST_OFF,
        "build_s": build_s,
        "cuda_graph": sorted({str(ran) for ran in graphs.values()}),
        "rows": rows,
    }


def seconds_to_build(run: Run, spec: EngineSpec) -> float | None:
    """How long compiling takes while nothing else is compiled; None where nothing is compiled. Raises OutOfTime."""
    onnx = run.onnx(spec)
    with tempfile.TemporaryDirectory() as folder:
        target = replace(run, work=Path(folder)).target(spec.precision, spec.batch)
        if (before := time.time()) > run.until:
            raise OutOfTime
        engine = target.engine(onnx, weights_key(spec.folder))
        return round(time.time() - before, 2) if engine != onnx else None

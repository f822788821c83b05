"""Part of step 7: what each precision gains over fp16, and INT8 in the two forms that TensorRT 10 reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune import stats
from edgeprune.errors import DeviceError, InputError
from edgeprune.records import Latency
from gpu_steps.kit import FP16_SCALES, pruned
from gpu_steps.run import EngineSpec, Run

REFERENCE, METHOD, PERCENT = "fp16", "fold", 50
# By name: precision and form. "int8" is what edgeprune exports: fp32 scales, and a cast after each DQ.
KINDS = {"fp16": ("fp16", ""), "int8": ("int8", ""), FP16_SCALES: ("int8", FP16_SCALES), "fp8": ("fp8", "")}


def precisions(run: Run, folder: Path, batch: int) -> Any:
    """The unpruned model and one with half of the tokens in every precision that is here, in the same rounds."""
    graphs = [
        name for name in (f"dense-b{batch}", pruned(METHOD, PERCENT, batch)) if (folder / f"{name}.onnx").exists()
    ]
    specs, lacking = {}, {}
    for kind, (precision, form) in KINDS.items():
        try:
            run.target(precision, batch)
        except DeviceError as error:
            lacking[kind] = str(error)
            continue
        specs |= {(graph, kind): EngineSpec(folder, graph, precision, batch, form=form) for graph in graphs}
    errors = run.build(list(specs.values()), timed=True)
    there = {key: spec for key, spec in specs.items() if spec not in errors}
    if any((graph, REFERENCE) not in there for graph in graphs):
        raise InputError(f"no fp16 engine to compare with ({[*errors.values()][:1]}): see its log in the work folder")
    samples, cuda_graphs = run.interleaved(there, run.rounds)
    rows = []
    for (graph, kind), times in samples.items():
        speedup, interval = stats.ratio(samples[graph, REFERENCE], times)
        row = {"graph": graph, "precision": kind, "ms": Latency(samples_ms=tuple(times)).summary()}
        ran = {"cuda_graph": cuda_graphs.get((graph, kind))}
        rows.append(row | {"over_fp16": speedup, "interval": interval} | ran)
    failed = {f"{graph} {kind}": errors[spec] for (graph, kind), spec in specs.items() if spec in errors}
    return {"precisions": rows, "lacking": lacking, "errors": failed}

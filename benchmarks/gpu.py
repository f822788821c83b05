"""A GPU's staircase, and a model unpruned, with POMT and folded in fp32 and fp16 side by side, with intervals.

python benchmarks/gpu.py [--fixtures DIR] [--device cuda] [--rounds 100]
DIR was written by tests/gpu/prepare.py, for machines without torch; by default that script is run with --model,
--weights and --batch. All candidates are timed in the same rounds. --device cpu tries everything but the GPU.
Prints Markdown tables and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.cli import output
from edgeprune.devices import run
from edgeprune.devices.power import clocks
from edgeprune.latency.profiling import staircase_of_folder
from edgeprune.latency.staircase import treads
from edgeprune.latency.timing import interleave
from edgeprune.onnx_graph.attention_fusion import expected
from edgeprune.onnx_graph.graph import input_shape, load_graph, metadata_in
from edgeprune.records import Latency, Staircase
from edgeprune.runtimes import Inspected
from edgeprune.runtimes.target import Target, target_for
from edgeprune.stats import ratio

ROOT = Path(__file__).parents[1]
PRECISIONS = ("fp32", "fp16")
CANDIDATES = ("dense", "pomt", "fold")
SMI = "nvidia-smi --query-gpu=name,driver_version,power.limit,temperature.gpu --format=csv,noheader"
HEAD = "| precision | model | median, ms (95 %) | against unpruned (95 %) | against fp32 (95 %) | fused, expected |"
Row = dict[str, Any]


def prepared(folder: Path, args: argparse.Namespace) -> Path:
    """The folder passed, or one made here, which needs torch."""
    if args.fixtures is not None:
        return args.fixtures
    script = [sys.executable, str(ROOT / "tests/gpu/prepare.py"), str(folder)]
    given = [
        "--model",
        args.model,
        "--batch",
        str(args.batch),
        *(["--weights", args.weights] if args.weights else []),
    ]
    subprocess.run([*script, *given], check=True)
    return folder


def staircase_row(target: Target, folder: Path, exhaustive: bool) -> Row:
    """A staircase as figures: every count probed, with its interval, and the treads' ends."""
    found: Staircase = staircase_of_folder(target, folder / "trunk.onnx", ("pomt", "fold"), exhaustive)
    points = [{"tokens": p.tokens, **p.latency.summary()} for p in found.points]
    cuts = {method: [c.cost_ms for c in costs] for method, costs in found.cuts.items()}
    return {
        "precision": target.setup.precision,
        "points": points,
        "treads": list(treads(found)),
        "probes": found.probes,
        "fixed_ms": found.fixed.median_ms,
        "cut_ms": cuts,
    }


def fused(target: Target, onnx: Path) -> tuple[int | None, int | None]:
    """Attention layers that the engine runs as one kernel, and those expected from its ONNX; None is unknown."""
    metadata = metadata_in(onnx)
    assert metadata is not None, f"{onnx} was not written by prepare.py"
    with target.opener(onnx)() as session:
        counted = session.fused_attention() if isinstance(session, Inspected) else None
    return counted, expected(onnx, metadata.schedule, target.setup)


def latency_rows(targets: dict[str, Target], folder: Path, rounds: int) -> list[Row]:
    """Every candidate in every precision, in the same rounds."""
    names = [(precision, name) for precision in targets for name in CANDIDATES]
    files = {key: folder / key[0] / f"{key[1]}.onnx" for key in names}
    openers = {" ".join(key): targets[key[0]].opener(file) for key, file in files.items()}
    progress = targets["fp32"].progress
    samples = interleave(openers, rounds, progress=progress, what="candidates", stable=True)
    rows = []
    for precision, name in names:
        mine, metadata = samples[f"{precision} {name}"], metadata_in(files[precision, name])
        assert metadata is not None
        speedup, interval = ratio(samples[f"{precision} dense"], mine)
        gain, gain_interval = ratio(samples[f"fp32 {name}"], mine)
        counted, expected = fused(targets[precision], files[precision, name])
        rows.append(
            {"precision": precision, "name": name, "tokens": list(metadata.schedule.tokens)}
            | {"latency_ms": Latency(samples_ms=tuple(mine)).summary(), "speedup": speedup, "interval": interval}
            | {"against_fp32": gain, "against_fp32_interval": gain_interval}
            | {"fused": counted, "fusable": expected, "samples_ms": mine}
        )
    return rows


def markdown(staircases: list[Row], rows: list[Row], about: Row) -> str:
    """Tables for docs/benchmarks.md."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items() if value is not None)]
    for stairs in staircases:
        ends = set(stairs["treads"])
        lines += ["", f"Staircase in {stairs['precision']}, {stairs['probes']} probes", ""]
        lines += ["| tokens | trunk, ms (95 %) | end of a tread |", "| ---: | ---: | --- |"]
        for p in stairs["points"]:
            mark = "yes" if p["tokens"] in ends else ""
            lines.append(f"| {p['tokens']} | {p['median']:.4f} ({p['low']:.4f}–{p['high']:.4f}) | {mark} |")
    lines += ["", HEAD, "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        ms, (low, high), (least, most) = row["latency_ms"], row["interval"], row["against_fp32_interval"]
        counts = ["–" if row[key] is None else str(row[key]) for key in ("fused", "fusable")]
        lines.append(
            f"| {row['precision']} | {row['name']} | {ms['median']:.4f} ({ms['low']:.4f}–{ms['high']:.4f}) "
            f"| {row['speedup']:.3f}× ({low:.3f}–{high:.3f}) | {row['against_fp32']:.3f}× ({least:.3f}–{most:.3f}) "
            f"| {', '.join(counts)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", type=Path)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--weights", help="random by default with --model: latency does not depend on them")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--exhaustive", action="store_true")
    parser.add_argument("--work", type=Path, help="keeps engines and samples of an interrupted run")
    args = parser.parse_args()
    args.weights = args.weights or (None if args.model == "vit_digits" else "random")
    with tempfile.TemporaryDirectory() as scratch, output.progress() as progress:
        folder = prepared(Path(scratch) / "fixtures", args)
        batch = input_shape(load_graph(folder / "fp32/dense.onnx"))[0]
        work = args.work or Path(scratch) / "work"
        targets = {p: target_for(args.device, p, batch, False, work, progress) for p in PRECISIONS}
        staircases = [staircase_row(targets[p], folder / p / "probes", args.exhaustive) for p in PRECISIONS]
        rows = latency_rows(targets, folder, args.rounds)
    setup = targets["fp32"].setup
    about: Row = {"machine": setup.machine, "runtime": f"{setup.runtime} {setup.runtime_version}", "batch": batch}
    about |= {"options": setup.options, "compute capability": setup.compute_capability, "nvidia-smi": run(SMI)}
    about |= {"clocks": clocks(targets["fp32"].device), "numpy": np.__version__, "rounds": args.rounds}
    print(markdown(staircases, rows, about))
    print(json.dumps(about | {"staircases": staircases, "rows": rows}))


if __name__ == "__main__":
    main()

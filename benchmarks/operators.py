"""Where the time goes on a CPU, by operator, unpruned and at 2×: ONNX Runtime's profiler.

python benchmarks/operators.py [--runs 60]
Weights are random: latency does not depend on them. The profiler itself slows small operators down, so the sum of
operators is compared with the time without it. "Above its share of work" is the time at 2× minus the time unpruned
times the share of the linear layers' multiplications that is left. Prints two Markdown tables and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from recovery import FOLD

from edgeprune.onnx_graph.onnx_runtime import SLOW_OPTIMIZERS, threads
from edgeprune.vit.export import onnx_from_module
from edgeprune.vit.fidelity import pruned_module
from edgeprune.vit.models import load_model

MODEL, SPEEDUP = "vit_tiny_patch16_224", "2.0"
SHAPED = ("Transpose", "Split", "Squeeze", "Reshape", "Unsqueeze")
GROUPS = (
    "linear layers", "attention products and softmax", "bias and GELU", "biases and residuals", "LayerNorm",
    "separating and joining heads", "cuts", "patch embedding and head",
)  # fmt: skip


def session(path: Path, profile: Path | None) -> ort.InferenceSession:
    """As edgeprune opens it, with or without the profiler."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads(), 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_OPTIMIZERS
    )


def group_of(operator: str, shapes: list[list[int]]) -> str:
    """The group of an operator by its name and the shapes of its inputs; packed weights have none."""
    if operator in ("Conv", "ReorderOutput", "Gemm", "Concat") or shapes[:1] == [[1, 192, 197]]:
        return "patch embedding and head"
    if operator == "MatMul" and len(shapes) == 1:
        return "linear layers"
    if operator in ("LayerNormalization", "SkipLayerNormalization"):
        return "LayerNorm"
    if operator in ("BiasGelu", "Gelu"):
        return "bias and GELU"
    four = bool(shapes) and len(shapes[0]) == 4
    if operator == "Softmax" or (operator in ("MatMul", "FusedMatMul", "Add") and four):
        return "attention products and softmax"
    if operator == "Add" and shapes[0][-1] >= 192 and shapes[-1] in (shapes[0], shapes[0][-1:]):
        return "biases and residuals"
    return "separating and joining heads" if operator in SHAPED else "cuts"


def profiled(path: Path, folder: Path, runs: int) -> list[tuple[str, list[list[int]], list[int], float]]:
    """Every operator of a run: name, input shapes, output shape, median ms."""
    opened = session(path, folder / path.stem)
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    for _ in range(runs):
        opened.run(None, {"images": image})
    times: dict[str, list[float]] = defaultdict(list)
    found: dict[str, Any] = {}
    for event in json.loads(Path(opened.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"]].append(event["dur"] / 1000)
            found[event["name"]] = event["args"]
    return [
        (
            args["op_name"], [next(iter(each.values())) for each in args["input_type_shape"]],
            next(iter(args["output_type_shape"][0].values())), float(np.median(times[name])),
        )
        for name, args in found.items()
    ]  # fmt: skip


def timed(files: dict[str, Path], runs: int) -> dict[str, float]:
    """Median ms without the profiler, interleaved."""
    opened = {name: session(path, None) for name, path in files.items()}
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    samples: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(runs):
        for name, each in opened.items():
            each.run(None, {"images": image})
            start = time.perf_counter()
            each.run(None, {"images": image})
            samples[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in samples.items()}


def main() -> None:
    """Export, profile, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    args = parser.parse_args()
    model = load_model(MODEL, "random")
    schedules = {"unpruned": ("none", (model.vit.tokens,) * model.vit.depth), "2×": ("fold", FOLD[SPEEDUP])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {key: folder / f"{place}.onnx" for place, key in enumerate(schedules)}
        for key, (method, tokens) in schedules.items():
            module = pruned_module(model, method, tokens, method != "none")
            onnx_from_module(module, torch.zeros(1, 3, 224, 224), files[key])
        whole = timed(files, args.runs)
        operators = {key: profiled(path, folder, args.runs) for key, path in files.items()}
    groups = {key: dict.fromkeys(GROUPS, 0.0) for key in files}
    linear: dict[str, dict[int, list[float]]] = {key: defaultdict(lambda: [0.0, 0.0, 0.0]) for key in files}
    for key, rows in operators.items():
        for operator, inputs, output, ms in rows:
            group = group_of(operator, inputs)
            groups[key][group] += ms
            if group == "linear layers":
                entry = linear[key][inputs[0][1]]
                weights = inputs[0][-1] * output[-1]
                entry[0], entry[1], entry[2] = (
                    entry[0] + ms,
                    entry[1] + 2 * inputs[0][1] * weights,
                    entry[2] + weights,
                )
    work = {key: sum(entry[1] for entry in by_tokens.values()) for key, by_tokens in linear.items()}
    share = work["2×"] / work["unpruned"]  # of the multiplications of the linear layers
    print("| operators | unpruned, ms | 2×, ms | share at 2×, % | above its share of work, ms |")
    print("| --- | ---: | ---: | ---: | ---: |")
    sums = {key: sum(values.values()) for key, values in groups.items()}
    for group in GROUPS:
        first, second = (groups[key][group] for key in files)
        above = second - share * first
        print(f"| {group} | {first:.2f} | {second:.2f} | {100 * second / sums['2×']:.0f} | {above:.2f} |")
    above = sums["2×"] - share * sums["unpruned"]
    print(f"| sum | {sums['unpruned']:.2f} | {sums['2×']:.2f} | 100 | {above:.2f} |")
    print(f"| a run without the profiler | {whole['unpruned']:.2f} | {whole['2×']:.2f} | | |")
    print(f"| operators in a run | {len(operators['unpruned'])} | {len(operators['2×'])} | | |\n")
    print("| tokens | model | linear layers, ms | GFLOP/s | weights read, MB |\n| ---: | --- | ---: | ---: | ---: |")
    for key, by_tokens in linear.items():
        for tokens, (ms, flops, weights) in sorted(by_tokens.items(), reverse=True):
            print(f"| {tokens} | {key} | {ms:.2f} | {flops / ms / 1e6:.0f} | {4 * weights / 1e6:.1f} |")
    print(json.dumps({"groups": groups, "whole": whole, "linear": linear, "operators": {
        key: len(rows) for key, rows in operators.items()}}))  # fmt: skip


if __name__ == "__main__":
    main()

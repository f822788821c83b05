"""How well two blocks predict the latency of the trunk on this CPU, and what compiling only those would save.

python benchmarks/depth.py [--model vit_digits] [--weights FILE] [--step 8] [--rounds 27]
TensorRT compiles an engine for every measured token count; there two blocks stand for the trunk where a check allows
it (edgeprune/latency/depth.py). The same check runs here on ONNX Runtime, then trunk and pair are timed in the same
rounds at every --step-th count. Prints a Markdown table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from edgeprune.latency.depth import PAIR, measured
from edgeprune.latency.probing import all_counts
from edgeprune.latency.timing import interleave
from edgeprune.onnx_graph.graph import fix_tokens
from edgeprune.runtimes.inference import Open
from edgeprune.runtimes.target import target_for
from edgeprune.vit.models import load_model
from edgeprune.vit.profiling_models import export_profiling_models


def main() -> None:
    """Export, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_digits")
    parser.add_argument("--weights")
    parser.add_argument("--step", type=int, default=8, help="token counts between two that are timed")
    parser.add_argument("--rounds", type=int, default=27)
    parser.add_argument("--work", type=Path, default=Path("engines/.work"))
    args = parser.parse_args()
    model, target = load_model(args.model, args.weights), target_for("cpu", work=args.work)
    folder = args.work / f"depth-{model.vit.name}"
    export_profiling_models(model, (), 1, folder, tensorrt=True)
    counts = all_counts(model.vit)
    opened_s = {"trunk.onnx": 0.0, PAIR: 0.0}

    def opener(name: str, tokens: int) -> Open:
        static = folder / f"{name.removesuffix('.onnx')}-{tokens}.onnx"
        if not static.exists():
            fix_tokens(folder / name, tokens, static)

        def opens():  # type: ignore[no-untyped-def]
            started = time.perf_counter()
            session = target.runtime.open(static, target.setup)
            opened_s[name] += time.perf_counter() - started
            return session

        return opens

    check = measured(target, counts, args.rounds, lambda n: opener("trunk.onnx", n), lambda n: opener(PAIR, n))
    opened_s |= dict.fromkeys(opened_s, 0.0)
    timed = counts[:: args.step]
    openers = {(name, n): opener(name, n) for n in timed for name in opened_s}
    samples = interleave(openers, args.rounds)
    print("| tokens | trunk, ms | from two blocks, ms | error |\n| ---: | ---: | ---: | ---: |")
    errors = []
    for n in timed:
        whole, pair = (float(np.median(samples[name, n])) for name in ("trunk.onnx", PAIR))
        found = check.trunk_ms(pair)
        errors.append(found / whole - 1)
        print(f"| {n} | {whole:.3f} | {found:.3f} | {100 * errors[-1]:+.1f} % |")
    sizes = {name: (folder / name).with_suffix(".weights").stat().st_size for name in opened_s}
    row = {
        "model": model.vit.name,
        "check_off": check.off,
        "counts": len(timed),
        "median_error": float(np.median(np.abs(errors))),
        "largest_error": float(np.max(np.abs(errors))),
        "load_s": opened_s,
        "weights_bytes": sizes,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()

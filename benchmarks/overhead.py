"""What each reducer costs in a whole model at the same token counts, against pomt; interleaved.

python benchmarks/overhead.py [--model vit_tiny_patch16_224] [--rounds 100]
Weights are random: latency does not depend on them. Prints a Markdown table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from edgeprune.latency.timing import interleave
from edgeprune.records import check_tokens
from edgeprune.runtimes.target import target_for
from edgeprune.stats import ratio
from edgeprune.vit.export import onnx_from_module
from edgeprune.vit.fidelity import pruned_module
from edgeprune.vit.models import load_model

METHODS = ("pomt", "fold", "tome", "topk", "evit")
SHARES = (1, 1, 1, 0.77, 0.77, 0.57, 0.57, 0.41, 0.41, 0.28, 0.28, 0.28)  # four cuts, about 2x


def main() -> None:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    model = load_model(args.model, "random")
    vit = model.vit
    tokens = [round(SHARES[block * 12 // vit.depth] * vit.tokens) for block in range(vit.depth)]
    check_tokens(tokens, vit, prefix_last=True)
    target = target_for("cpu")
    with tempfile.TemporaryDirectory() as folder:
        files = {method: Path(folder) / f"{method}.onnx" for method in METHODS}
        image = torch.zeros(1, 3, *vit.size)
        for method, path in files.items():
            onnx_from_module(pruned_module(model, method, tokens, prefix_last=True), image, path)
        samples = interleave({method: target.opener(path) for method, path in files.items()}, args.rounds)
    rows = []
    print("| method | median, ms | against pomt (95 %) |\n| --- | ---: | ---: |")
    for method in METHODS:
        share, (low, high) = ratio(samples[method], samples["pomt"])
        median = float(np.median(samples[method]))
        print(f"| {method} | {median:.2f} | {share:.3f} ({low:.3f}–{high:.3f}) |")
        rows.append({"method": method, "median_ms": median, "against_pomt": share, "interval": [low, high]})
    print(json.dumps({"model": args.model, "tokens": tokens, "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()

"""Which tokens fold should keep: scores compared at fixed schedules, without latency.

python benchmarks/scores.py --assets DIR [--images 384]
DIR holds imagenet-val-650 and the weights of ViT-Tiny and DeiT-Tiny. Prints Markdown tables of the KL to the unpruned
model and one JSON line last. Some 5 min on 2 cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from edgeprune import stats
from edgeprune.images import drawn, load_images, load_pixels
from edgeprune.vit.fidelity import logits_of_schedule
from edgeprune.vit.models import load_model
from edgeprune.vit.reducers import fold
from edgeprune.vit.tokens import Attended

WEIGHTS = {
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
    "deit_tiny_patch16_224": "deit_tiny_patch16_224.safetensors",
}
SCHEDULES = {
    "1.5×": (*(197,) * 4, 120, *(72,) * 4, *(50,) * 3),
    "2×": (197, 144, 144, 88, 88, 49, 49, 25, 25, 25, 25, 25),
    "2.5×": (160, 112, 112, 56, 56, 32, 32, 16, 16, 16, 16, 16),
}
Score = Callable[[Tensor, Attended, int], Tensor]


def score_of(attention: float, distance: float, among: str = "more attended", metric: str = "tokens") -> Score:
    """Attention and distance to the nearest other token, each to a power; prefix tokens first, as in `worth`."""

    def score(similar: Tensor, attended: Attended, prefix: int) -> Tensor:
        received = fold.attention_received(attended, prefix)
        if metric == "keys":
            keys = attended.keys.mean(dim=1)
            keys = keys / keys.norm(dim=-1, keepdim=True)
            similar = keys @ keys.transpose(1, 2)
        count = similar.shape[1]
        body = torch.arange(count) >= prefix
        may = body & ~torch.eye(count, dtype=torch.bool)
        if among == "more attended":
            may = may & (received[:, None, :] > received[:, :, None])
        nearest = (similar * may).amax(dim=-1)
        first = torch.tensor([4.0 * max(prefix - i, 0) for i in range(count)])
        found: Tensor = received**attention * (1 - nearest).clamp(min=0) ** distance + first
        return found

    return score


SCORES = {
    "attention": score_of(1, 0),
    "distance": score_of(0, 1),
    "attention · √distance": score_of(1, 0.5),
    "**attention · distance**": score_of(1, 1),
    "attention · distance²": score_of(1, 2),
    "the same, distance to any other token": score_of(1, 1, among="all"),
    "the same, distance of keys": score_of(1, 1, metric="keys"),
}


def rows_of(name: str, assets: Path, count: int) -> list[dict[str, Any]]:
    """KL and agreement of every score and schedule on `count` pictures of one model."""
    model = load_model(name, str(assets / WEIGHTS[name]))
    found = load_images(assets / "imagenet-val-650" / "labels.csv")
    pixels = load_pixels([found.paths[i] for i in drawn(len(found), count)], model.preprocessing)
    dense = logits_of_schedule(model, "none", (model.vit.tokens,) * model.vit.depth, pixels)
    rows = []
    for label, score in SCORES.items():
        row: dict[str, Any] = {"model": name, "score": label}
        with patch.object(fold, "worth", score):
            for speedup, tokens in SCHEDULES.items():
                logits = logits_of_schedule(model, "fold", tokens, pixels, prefix_last=True)
                row[speedup] = {"kl": stats.kl_divergence(dense, logits), "agreement": stats.agreement(dense, logits)}
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    cells = (f"{row[s]['kl']:.4f} ({row[s]['agreement']:.1f})" for s in SCHEDULES)
    return f"| {row['model']} | {row['score']} | {' | '.join(cells)} |"


def main() -> None:
    """Evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--images", type=int, default=384)
    args = parser.parse_args()
    print(f"| model | score | {' | '.join(f'{s}: KL (agreement, %)' for s in SCHEDULES)} |")
    print(f"| --- | --- |{' ---: |' * len(SCHEDULES)}")
    rows = [row for name in WEIGHTS for row in rows_of(name, args.assets, args.images)]
    print(json.dumps({"images": args.images, "rows": rows}))


if __name__ == "__main__":
    main()

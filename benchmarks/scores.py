"""Which tokens fold should keep: scores compared at fixed schedules, and what the score costs.

python benchmarks/scores.py --assets DIR [--images 384] [--rounds 60]
DIR holds imagenet-val-650 and the weights of ViT-Tiny and DeiT-Tiny. Prints Markdown tables of the KL to the unpruned
model and of speed-ups in ONNX Runtime, and one JSON line last. Some 6 min on 2 cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from edgeprune import stats
from edgeprune.images import drawn, load_images, load_pixels
from edgeprune.latency.timing import interleave
from edgeprune.runtimes.target import target_for
from edgeprune.tasks import CLASSIFY
from edgeprune.vit.export import onnx_of_schedule
from edgeprune.vit.fidelity import logits_of_schedule
from edgeprune.vit.models import load_model
from edgeprune.vit.reducers import fold
from edgeprune.vit.reducers.common import best, one_hot, take
from edgeprune.vit.tokens import Attended, Reduced

WEIGHTS = {
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
    "deit_tiny_patch16_224": "deit_tiny_patch16_224.safetensors",
}
SCHEDULES = {
    "A": (*(197,) * 4, 120, *(72,) * 4, *(50,) * 3),
    "B": (*(197,) * 3, 112, 112, *(64,) * 3, *(40,) * 4),
    "C": (197, *(144,) * 2, *(72,) * 3, *(24,) * 6),
    "D": (197, 144, 144, 88, 88, 49, 49, *(25,) * 5),
    "E": (160, 112, 112, 56, 56, 32, 32, *(16,) * 5),
}
OURS = "**attention · distance**"
TIMED = ("attention", OURS)
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


def by_attention(x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> Reduced:
    """fold with the attention alone as score, which needs no similarity but that of the others to the kept."""
    received = fold.attention_received(attended, prefix)
    first = torch.tensor([4.0 * max(prefix - i, 0) for i in range(x.shape[1])])
    order = best(received + first, x.shape[1])
    ranked = take(x, order)
    kept, others = ranked[:, :keep], ranked[:, keep:]
    towards = kept[:, prefix:] / kept[:, prefix:].norm(dim=-1, keepdim=True)
    closest = (others @ towards.transpose(1, 2)).argmax(dim=-1, keepdim=True)
    gathered = one_hot(closest, keep, prefix).to(x.dtype).transpose(1, 2)
    mass = torch.ones_like(x[:, :, :1]) if sizes is None else take(sizes[..., None], order)
    kept, others = kept * mass[:, :keep], others * mass[:, keep:]
    total = mass[:, :keep] + gathered @ mass[:, keep:]
    return Reduced((kept + gathered @ others) / total, total[..., 0], lambda: order[:, prefix:keep] - prefix)


SCORES: dict[str, Score | None] = {
    "attention": None,
    "distance": score_of(0, 1),
    "attention · √distance": score_of(1, 0.5),
    OURS: fold.worth,
    "attention · distance²": score_of(1, 2),
    "the same, distance to any other token": score_of(1, 1, among="all"),
    "the same, distance of keys": score_of(1, 1, metric="keys"),
}


def scored(score: Score | None) -> Any:
    """A context in which fold uses a score; None: the attention alone."""
    return patch.object(fold, "fold", by_attention) if score is None else patch.object(fold, "worth", score)


def rows_of(name: str, assets: Path, count: int) -> list[dict[str, Any]]:
    """KL and agreement of every score and schedule on `count` pictures of one model."""
    model = load_model(name, str(assets / WEIGHTS[name]))
    found = load_images(assets / "imagenet-val-650" / "labels.csv")
    pixels = load_pixels([found.paths[i] for i in drawn(len(found), count)], model.preprocessing)
    dense = logits_of_schedule(model, "none", (model.vit.tokens,) * model.vit.depth, pixels)
    rows = []
    for label, score in SCORES.items():
        row: dict[str, Any] = {"model": name, "score": label}
        with scored(score):
            for speedup, tokens in SCHEDULES.items():
                logits = logits_of_schedule(model, "fold", tokens, pixels, prefix_last=True)
                figures = CLASSIFY.fidelity(dense, logits, None)
                row[speedup] = {"kl": figures.kl, "agreement": figures.agreement}
        rows.append(row)
        print(line(row), flush=True)
    return rows


def speedups(name: str, assets: Path, rounds: int) -> list[dict[str, Any]]:
    """Measured speed-up of every schedule with the scores TIMED over the unpruned model, in the same rounds."""
    model, target = load_model(name, str(assets / WEIGHTS[name])), target_for("cpu", "fp32", 1)
    dense = (model.vit.tokens,) * model.vit.depth
    with TemporaryDirectory() as folder:
        files = {("unpruned", ""): Path(folder, "unpruned.onnx")}
        onnx_of_schedule(model, "none", dense, False, 1, files["unpruned", ""])
        for index, label in enumerate(TIMED):
            with scored(SCORES[label]):
                for letter, tokens in SCHEDULES.items():
                    files[label, letter] = file = Path(folder, f"{index}{letter}.onnx")
                    onnx_of_schedule(model, "fold", tokens, True, 1, file)
        openers = {key: partial(target.runtime.open, file, target.setup) for key, file in files.items()}
        samples = interleave(openers, rounds)
    whole, found = samples["unpruned", ""], []
    for label in TIMED:
        row: dict[str, Any] = {"model": name, "score": label}
        row |= {letter: stats.ratio(whole, samples[label, letter])[0] for letter in SCHEDULES}
        found.append(row)
        print(f"| {name} | {label} | {' | '.join(f'{row[s]:.3f}' for s in SCHEDULES)} |", flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    cells = (f"{row[s]['kl']:.4f} ({row[s]['agreement']:.1f})" for s in SCHEDULES)
    return f"| {row['model']} | {row['score']} | {' | '.join(cells)} |"


def main() -> None:
    """Evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    print(f"| model | score | {' | '.join(f'{s}: KL (agreement, %)' for s in SCHEDULES)} |")
    print(f"| --- | --- |{' ---: |' * len(SCHEDULES)}")
    rows = [row for name in WEIGHTS for row in rows_of(name, args.assets, args.images)]
    print(f"\n| model | score | {' | '.join(f'{s}: speed-up' for s in SCHEDULES)} |")
    print(f"| --- | --- |{' ---: |' * len(SCHEDULES)}")
    timed = [row for name in WEIGHTS for row in speedups(name, args.assets, args.rounds)]
    print(json.dumps({"images": args.images, "rows": rows, "speedups": timed}))


if __name__ == "__main__":
    main()

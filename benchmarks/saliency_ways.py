"""Ways to bring tokens back to the full grid, on the real saliency model with fixed schedules of fold.

python benchmarks/saliency_ways.py --assets DIR --work DIR [--images 32]
DIR holds vits14_saliency.fp16.safetensors and nips17. Measures no latency. Prints a Markdown table and one JSON line.

Every way describes a body token before a cut by shares of the tokens after it, and multiplies shares of several cuts.
"nearest" is the most similar token, "of 4" and "of all" weigh by a softmax of cosines, "position" subtracts the
distance on the grid from the cosine. A patch gets the mean of these tokens, or with "own" keeps its own stream as it
was at the cut and gets the mean of their later updates; "nearest, own" is what edgeprune does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from saliency import LAYER, SALIENT, pictures, prepared
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from edgeprune.features import Dense, packed, unpacked
from edgeprune.images import load_images, load_pixels
from edgeprune.images import normalise as as_input
from edgeprune.runtimes.head import Head
from edgeprune.vit.models import Model, load_model
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.reducers.common import take

SCHEDULES = {  # tokens per block, by how many of 257 are left on average
    "86 %": (257,) * 5 + (210,) * 2 + (190,) * 4 + (180,),
    "64 %": (257,) * 4 + (120,) * 8,
}
CHUNK = 8  # pictures at a time


class Way(NamedTuple):
    """How tokens after a cut stand for those before it."""

    few: int = 1  # 0: all
    temperature: float = 0.05
    distance: float = 0.0  # what one patch of distance takes from the cosine
    own: bool = False


WAYS = {
    "nearest": Way(), "nearest, own": Way(own=True),
    "of 4": Way(4), "of 4, own": Way(4, own=True), "of all": Way(0), "of all, own": Way(0, own=True),
    "position": Way(distance=0.02), "position, own": Way(distance=0.02, own=True),
}  # fmt: skip


def shares(before: Tensor, after: Tensor, places: Tensor, left: Tensor, way: Way) -> Tensor:
    """(B, M, K) from tokens (B, M, C) and (B, K, C) at places (B, M, 2) and (B, K, 2) of the grid."""
    similar = normalize(before, dim=-1) @ normalize(after, dim=-1).transpose(1, 2)
    similar = similar - way.distance * torch.cdist(places, left)
    if way.few == 1:
        return one_hot(similar.argmax(dim=-1), after.shape[1]).to(before.dtype)
    if way.few:
        least = similar.topk(way.few, dim=-1).values[..., -1:]
        similar = similar.masked_fill(similar < least, -torch.inf)
    return (similar / way.temperature).softmax(dim=-1)


@torch.inference_mode()
def features(model: Model, images: Tensor, tokens: tuple[int, ...], way: Way | None) -> np.ndarray:
    """Patch features (B, 16, 16, C) after the last block; unpruned without a way."""
    family, prefix, module = model.family, model.vit.prefix, model.module
    reducer, side = reducer_named("fold"), model.vit.grid[0]
    x, sizes, mix = family.embed(module, images), None, None
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).reshape(1, -1, 2).float().expand(len(images), -1, -1)
    apart: Any = 0.0
    for block, keep in zip(module.blocks, tokens, strict=True):
        if keep == x.shape[1] or way is None:
            x = family.block(block, x, sizes)
            continue
        attended = family.attend(block, x, sizes)
        assert reducer is not None
        reduced = reducer(attended.out, sizes, attended, keep, prefix)
        before, after = attended.out[:, prefix:], reduced.x[:, prefix:]
        whole = before if mix is None else mix @ before + apart
        left = take(places, reduced.kept())
        cut = shares(before, after, places, left, way)
        mix, places, sizes = cut if mix is None else mix @ cut, left, reduced.sizes
        apart = whole - mix @ after if way.own else 0.0
        x = family.mlp(block, reduced.x)
    body = x[:, prefix:]
    found = family.norm(module, body if mix is None else mix @ body + apart)
    return found.reshape(len(images), side, side, -1).numpy()


def main() -> None:
    """Every way with every schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("engines/.work"))
    parser.add_argument("--images", type=int, default=32)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    name, decoder = prepared(args.assets, args.work)
    model = load_model(name, layers=(LAYER,))
    head, how = Head(decoder, model.vit), model.preprocessing
    pixels = as_input(load_pixels(load_images(pictures(args.assets, args.work, args.images)).paths, how), how)
    chunks = torch.from_numpy(pixels).split(CHUNK)
    empty = np.zeros((args.images, model.vit.classes), np.float32)

    def outputs(tokens: tuple[int, ...], way: Way | None) -> np.ndarray:
        found = np.concatenate([features(model, chunk, tokens, way) for chunk in chunks])
        return packed({f"features_{LAYER}": found, "embedding": empty})

    task = Dense(model.vit.outputs, head)
    dense, rows = outputs((model.vit.tokens,) * model.vit.depth, None), []
    print("| tokens | way | map difference | IoU | feature error | feature cosine |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for schedule, tokens in SCHEDULES.items():
        for label, way in WAYS.items():
            pruned = outputs(tokens, way)
            found = task.fidelity(dense, pruned, None)
            a, b = (head(unpacked(each, model.vit.outputs)) > SALIENT for each in (dense, pruned))
            either = np.logical_or(a, b).sum((1, 2, 3))
            same = np.where(either, np.logical_and(a, b).sum((1, 2, 3)) / np.maximum(either, 1), 1.0).mean()
            [layer] = found.layers
            figures = (found.head_difference, float(same), layer.error, layer.cosine)
            print(
                f"| {schedule}× | {label} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |", flush=True
            )
            rows.append({"schedule": schedule, "way": label, "figures": figures})
    print(json.dumps({"images": args.images, "rows": rows}))


if __name__ == "__main__":
    main()

"""Makes the fixtures of the GPU tests and of benchmarks/gpu.py on a machine with torch: ONNX files and logits.

python tests/gpu/prepare.py DIR [--model M] [--weights FILE] [--images CSV] [--batch 1] [--precisions fp32,fp16]
For each precision DIR/PRECISION/ gets the profiling models (probes/), dense.onnx, pomt.onnx and fold.onnx;
DIR/reference.npz holds a few batches of pictures ("images") and ONNX Runtime's fp32
logits for them by the name of the ONNX.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import onnxruntime

from edgeprune import zoo
from edgeprune.images import load_images, load_pixels, normalise
from edgeprune.io import replacing, save
from edgeprune.pipeline.export import export_model
from edgeprune.records import Schedule, Vit
from edgeprune.scheduling.goals import single_cut
from edgeprune.scheduling.paper import PAPER_BLOCK
from edgeprune.vit.models import load_model
from edgeprune.vit.profiling_models import export_profiling_models

PICTURES = 16  # at least
KEPT = {"pomt": (0.5,), "fold": (0.75, 0.55, 0.35)}  # of all tokens: POMT's one cut, folding at each quarter


def schedule_of(vit: Vit, method: str) -> Schedule:
    """A schedule of a fixed shape, since there is no staircase of the GPU yet."""
    counts = [max(round(share * vit.tokens), vit.prefix + 2) for share in KEPT[method]]
    tokens = single_cut(vit, PAPER_BLOCK, counts[0])
    if method == "fold":
        tokens = tuple([vit.tokens, *counts][4 * block // vit.depth] for block in range(vit.depth))
    return Schedule(vit=vit, method=method, policy="paper" if method == "pomt" else "search", tokens=tokens)


def prepare(
    out: Path, name: str, weights: str | None, images: Path | None, batch: int, precisions: tuple[str, ...]
) -> None:
    """Write the folder; files that exist already are kept."""
    model = load_model(name, weights)
    schedules = {"dense": None} | {method: out / f"{method}.json" for method in KEPT}
    for method in KEPT:
        save(schedule_of(model.vit, method), out / f"{method}.json")
    for precision in precisions:
        export_profiling_models(model, tuple(KEPT), batch, out / precision / "probes", precision)
        for candidate, schedule in schedules.items():
            path = out / precision / f"{candidate}.onnx"
            if not path.exists():
                export_model(model, schedule, batch, path, precision)
    count = -(-PICTURES // batch) * batch
    side, how = model.vit.image_px, model.preprocessing
    if images is None and name == zoo.EMBEDDED:
        images = zoo.images_dir() / "labels.csv"
    if images is not None:
        paths = load_images(images).paths
        pictures = normalise(load_pixels([paths[i % len(paths)] for i in range(count)], how), how)
    else:
        pictures = np.random.default_rng(0).standard_normal((count, 3, side, side), dtype=np.float32)
    known = {"images": pictures}
    for candidate, schedule in schedules.items():
        path = out / "fp32" / f"{candidate}.onnx"
        if not path.exists():  # fp32 was not requested, but it is the reference
            export_model(model, schedule, batch, path)
        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        parts = np.split(pictures, count // batch)
        known[candidate] = np.concatenate([session.run(None, {"images": part})[0] for part in parts])
    with replacing(out / "reference.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **known)


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=zoo.EMBEDDED)
    parser.add_argument("--weights")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precisions", default="fp32,fp16")
    args = parser.parse_args()
    prepare(args.out, args.model, args.weights, args.images, args.batch, tuple(args.precisions.split(",")))


if __name__ == "__main__":
    main()

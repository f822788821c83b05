"""Recovery on a real model without classes, at a fixed schedule: dense features with a decoder, or embeddings.

python benchmarks/recovery_tasks.py --assets DIR --work DIR [--task embed] [--images 325] [--tokens 257,257,…]
Trains on pictures of imagenet-val-650 and judges on 200 of nips17, before and after, with standard errors of the
change, paired by picture. No latency is measured. Prints a Markdown table and one JSON line last. Interrupted, it
continues.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from saliency import LAYER, per_picture, pictures, prepared

from edgeprune import stats
from edgeprune.cli import output
from edgeprune.images import drawn, load_images, load_pixels
from edgeprune.pipeline.context import Options, context_for
from edgeprune.vit.fidelity import logits_of_schedule, pruned_module
from edgeprune.vit.recovery import Recipe, recovered

METHOD, JUDGED = "fold", 200
TOKENS = "257,257,257,161,117,117,117,117,72,72,72,72"  # 1.57 times as fast on a CPU (docs/benchmarks.md)


def main() -> None:
    """Tune, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", choices=("dense", "embed"), default="dense")
    parser.add_argument("--images", type=int, default=325, help="to train on, a quarter of them to stop by")
    parser.add_argument("--tokens", default=TOKENS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokens = tuple(map(int, args.tokens.split(",")))
    name, decoder = prepared(args.assets, args.work)
    judged = pictures(args.assets, args.work, JUDGED)
    options = Options(model=name, images=judged, search_images=8, work=args.work, task=args.task)
    if args.task == "dense":
        options = replace(options, layers=(LAYER,), head=decoder)
    with output.progress() as progress:
        context = context_for(options, progress)
        model, pixels = context.model, context.needed_pictures().pixels
        found = load_images(args.assets / "imagenet-val-650" / "labels.csv").paths
        training = load_pixels([found[i] for i in drawn(len(found), args.images)], model.preprocessing)
        wanted = logits_of_schedule(model, "none", context.dense_tokens, pixels, False, progress)
        before = logits_of_schedule(model, METHOD, tokens, pixels, False, progress)
        pruned = pruned_module(model, METHOD, tokens, False)
        checkpoint = args.work / f"{args.task}-{args.images}.checkpoint"
        start = time.monotonic()
        tuned = recovered(pruned, training, model.preprocessing, Recipe(), checkpoint, progress, args.task)
        seconds = time.monotonic() - start
        after = logits_of_schedule(replace(model, module=tuned.module.model), METHOD, tokens, pixels, False, progress)
    rows = {when: per_picture(context, wanted, each) for when, each in (("before", before), ("after", after))}
    print("| figure | without recovery | with recovery | change |\n| --- | ---: | ---: | ---: |")
    figures = {}
    for figure, first in rows["before"].items():
        change = rows["after"][figure] - first
        figures[figure] = [float(first.mean()), float(first.mean() + change.mean()), stats.standard_error(change)]
        one, other, error = figures[figure]
        print(f"| {figure} | {one:.4f} | {other:.4f} | {other - one:+.4f} ± {error:.4f} |")
    record = tuned.record
    print(json.dumps({
        "task": args.task, "tokens": tokens, "images": args.images, "figures": figures, "curve": record.curve,
        "epochs": record.epochs, "seconds": seconds, "rate": record.rate,
    }))  # fmt: skip


if __name__ == "__main__":
    main()

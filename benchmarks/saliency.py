"""A real dense model: saliency maps and embeddings of a fine-tuned DINOv2 ViT-S/14 at equal measured latency.

python benchmarks/saliency.py --assets DIR --work DIR [--task embed] [--images 216] [--methods …] [--targets …]
DIR holds vits14_saliency.fp16.safetensors and nips17. Prints a Markdown table and one JSON line last. Figures are of
pictures that chose nothing; standard errors of differences to fold are paired by picture. Interrupted, it continues.
Some 40 min on 2 cores; with --multiply-adds, which measures nothing and builds no engines, a quarter of that.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from edgeprune import stats
from edgeprune.cli import output
from edgeprune.cli.tables import runs
from edgeprune.features import Dense, unpacked
from edgeprune.pipeline.compare import Comparison, compare
from edgeprune.pipeline.context import Context, Options, context_for
from edgeprune.pipeline.evaluate import logits_on
from edgeprune.pipeline.onnx_files import dense_onnx, pruned_onnx
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.pipeline.solve import solve
from edgeprune.records import Latency, Point, Progress, Schedule, Setup, Staircase, Vit
from edgeprune.scheduling.goals import Goal
from edgeprune.scheduling.published import published_schedule
from edgeprune.vit.fidelity import logits_of_schedule

FILE, LAYER, SALIENT = "vits14_saliency.fp16.safetensors", 12, 0.5
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Decoder(nn.Module):
    """Patch features (B, 16, 16, 384) after the final norm to a map (B, 1, 224, 224) of 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        for index, (entering, leaving) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
            setattr(self, f"upconv{index}", nn.ConvTranspose2d(entering, leaving, 4, 2, 1))
            setattr(self, f"bn{index}", nn.BatchNorm2d(leaving))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = features.permute(0, 3, 1, 2)
        for index in (1, 2, 3):
            x = getattr(self, f"bn{index}")(getattr(self, f"upconv{index}")(x)).relu()
        return interpolate(self.final_conv(x), size=(224, 224), mode="bilinear", align_corners=False).sigmoid()


def prepared(assets: Path, folder: Path) -> tuple[str, Path]:
    """The backbone as a folder of timm's format and the decoder as ONNX, written once: a model name and a path."""
    backbone, decoder = folder / "vits14-saliency", folder / "decoder.onnx"
    if not decoder.is_file():
        state = {name: tensor.float() for name, tensor in load_file(assets / FILE).items()}
        part = {
            prefix: {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            for prefix in ("backbone.", "decoder.")
        }
        backbone.mkdir(parents=True, exist_ok=True)
        save_file(part["backbone."], backbone / "model.safetensors")
        how = {"input_size": [3, 224, 224], "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}
        config = {
            "architecture": "vit_small_patch14_dinov2", "num_classes": 0, "model_args": {"img_size": 224},
            "pretrained_cfg": {**how, **IMAGENET, "num_classes": 0},
        }  # fmt: skip
        (backbone / "config.json").write_text(json.dumps(config))
        module = Decoder().eval()
        module.load_state_dict(part["decoder."])
        torch.onnx.export(
            module, (torch.zeros(2, 16, 16, 384),), decoder, input_names=[f"features_{LAYER}"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), external_data=False, verbose=False,
        )  # fmt: skip
    return f"local-dir:{backbone}", decoder


def pictures(assets: Path, folder: Path, count: int) -> Path:
    """A folder of copies of pictures spread over nips17, without labels."""
    with open(assets / "nips17" / "labels.csv", newline="") as file:
        names = [row["image"] for row in csv.DictReader(file)]
    out = folder / f"nips-{count}"
    out.mkdir(parents=True, exist_ok=True)
    for index in np.linspace(0, len(names) - 1, count).astype(int):
        shutil.copyfile(assets / "nips17" / names[index], out / Path(names[index]).name)
    return out


def per_picture(context: Context, wanted: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, Any]:
    """Figures of each picture: of the map, its thresholded map, the features and the embedding; (images,) each."""
    if not isinstance(context.task, Dense):
        return {"embedding cosine": cosines(wanted, found)}
    task = context.task
    one, other = task.of_head(wanted, True), task.of_head(found)
    a, b = one > SALIENT, other > SALIENT
    both, either = (np.logical_and(a, b).sum((1, 2, 3)), np.logical_or(a, b).sum((1, 2, 3)))
    before, after = (unpacked(each, task.outputs) for each in (wanted, found))
    return {
        "map difference": np.abs(one - other).mean((1, 2, 3), dtype=np.float64),
        "IoU": np.where(either, both / np.maximum(either, 1), 1.0),
        "feature cosine": cosines(before[f"features_{LAYER}"], after[f"features_{LAYER}"]).mean((1, 2)),
        "embedding cosine": cosines(before["embedding"], after["embedding"]),
    }


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosines of vectors along the last axis."""
    found: NDArray[np.float64] = (a * b).sum(-1, dtype=np.float64) / np.maximum(
        np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12
    )
    return found


class Row(NamedTuple):
    """A schedule with its speed-up and the figures of each picture."""

    target: float
    method: str
    policy: str
    schedule: Schedule
    speedup: float
    each: dict[str, NDArray[np.float64]]


def measured(options: Options, comparison: Comparison) -> list[Row]:
    """The entries of a comparison; their outputs are those that `compare` has left in the work folder."""
    context = context_for(options)
    pool = context.needed_pictures()
    with context.target.work.lock():
        kept, _ = pool.held_out("fold", "fp32")
        wanted, rows = logits_on(context, pool, dense_onnx(context))[kept], []
        for entry in comparison.entries:
            own = context.with_method(entry.method)
            found = logits_on(own, pool, pruned_onnx(own, entry.schedule))[kept]
            assert entry.report is not None and entry.report.speedup is not None
            each = per_picture(context, wanted, found)
            rows.append(Row(entry.target, entry.method, entry.policy, entry.schedule, entry.report.speedup, each))
    return rows


def computed(vit: Vit, setup: Setup) -> Staircase:
    """A staircase in 10⁹ multiply-adds instead of ms, every 8 tokens; cuts are free."""
    inner, patches = vit.heads * vit.head_dim, vit.tokens - vit.prefix

    def trunk(n: int) -> float:
        linear = 4 * vit.width * inner + vit.mlp_matrices * vit.width * vit.mlp_width
        return vit.depth * n * (linear + 2 * n * inner) / 1e9

    def point(value: float) -> Latency:
        return Latency(samples_ms=(value,))

    fixed = patches * 3 * vit.patch_px**2 * vit.width / 1e9
    counts = [n for n in range(16 + vit.prefix, vit.tokens, 8)] + [vit.tokens]
    return Staircase(
        vit=vit, setup=msgspec.structs.replace(setup, noiseless=True), fixed=point(fixed),
        dense=point(fixed + trunk(vit.tokens)),
        points=tuple(Point(tokens=n, latency=point(trunk(n))) for n in counts),
    )  # fmt: skip


def by_multiply_adds(
    options: Options, methods: Sequence[str], targets: Sequence[float], searched: Sequence[str], progress: Progress
) -> list[Row]:
    """Schedules of equal multiply-adds, evaluated in PyTorch; nothing is measured and no engine is built."""
    context = context_for(options, progress)
    pool, model = context.needed_pictures(), context.model
    with context.target.work.lock():
        staircase, rows = computed(model.vit, context.target.setup), []
        kept, _ = pool.held_out("fold", "fp32")
        pixels = pool.pixels[kept]
        wanted = logits_of_schedule(model, "none", context.dense_tokens, pixels, False, progress)
        for target, method in product(targets, methods):
            own, goal = context.with_method(method), Goal(speedup=target)
            limit = goal.limit_ms(staircase.dense.median_ms)
            assert limit is not None
            schedules = [published_schedule(staircase, method, limit, context.prefix_last)]
            if method in searched:
                schedules.append(solve(own, staircase, ScheduleScores(own), goal).schedule)
            for schedule in filter(None, schedules):
                tokens, last = schedule.tokens, schedule.prefix_last
                found = logits_of_schedule(model, method, tokens, pixels, last, progress)
                assert schedule.predicted_ms is not None
                speedup, each = staircase.dense.median_ms / schedule.predicted_ms, per_picture(context, wanted, found)
                rows.append(Row(target, method, schedule.policy, schedule, speedup, each))
    return rows


def summarised(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means, and mean differences to fold's searched schedule for the same target, with standard errors."""
    found = []
    for row in rows:
        [ours] = [r for r in rows if (r.method, r.policy, r.target) == ("fold", "search", row.target)]
        apart = {name: values - ours.each[name] for name, values in row.each.items()}
        found.append(
            {
                "target": row.target, "method": row.method, "policy": row.policy, "speedup": row.speedup,
                "tokens": list(row.schedule.tokens), "images": len(next(iter(row.each.values()))),
                "figures": {name: float(values.mean()) for name, values in row.each.items()},
                "more_than_fold": {n: (float(d.mean()), stats.standard_error(d)) for n, d in apart.items()},
            }
        )  # fmt: skip
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows by target and method; in brackets the difference to fold and its standard error."""
    names = list(rows[0]["figures"])
    lines = [
        f"| target | method | shape | speed-up | {' | '.join(names)} | tokens |",
        f"| ---: | --- | --- | ---: | {'---: | ' * len(names)}--- |",
    ]
    for row in sorted(rows, key=lambda r: (r["target"], -r["figures"]["embedding cosine"])):
        figures = []
        for name in names:
            more, error = row["more_than_fold"][name]
            apart = f" ({more:+.4f} ± {error:.4f})" if error else ""
            figures.append(f"{row['figures'][name]:.4f}{apart}")
        cells = (f"{row['target']:g}×", row["method"], row["policy"], f"{row['speedup']:.2f}", *figures)
        lines.append(f"| {' | '.join(cells)} | {runs(tuple(row['tokens']))} |")
    return "\n".join(lines)


def main() -> None:
    """Prepare, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("engines/.work"))
    parser.add_argument("--task", choices=("dense", "embed"), default="dense")
    parser.add_argument("--images", type=int, default=212)
    parser.add_argument("--search-images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", default="fold,pomt,tome,topk,evit")
    parser.add_argument("--searched", default="fold", help="methods whose schedules are searched as fold's are")
    parser.add_argument("--multiply-adds", action="store_true", help="equal multiply-adds instead of latency")
    parser.add_argument("--targets", default="1.25,1.5,2.0")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, decoder = prepared(args.assets, args.work)
    options = Options(
        model=model, images=pictures(args.assets, args.work, args.images), search_images=args.search_images,
        rounds=args.rounds, work=args.work, task=args.task,
    )  # fmt: skip
    if args.task == "dense":
        options = replace(options, layers=(LAYER,), head=decoder)
    methods, searched = (given.split(",") for given in (args.methods, args.searched))
    targets = [float(target) for target in args.targets.split(",")]
    with output.progress() as progress:
        if args.multiply_adds:
            found = by_multiply_adds(options, methods, targets, searched, progress)
        else:
            found = measured(options, compare(options, methods, targets, progress, searched))
    rows = summarised(found)
    print(markdown(rows))
    print(json.dumps({"task": args.task, "multiply_adds": args.multiply_adds, "rows": rows}))


if __name__ == "__main__":
    main()

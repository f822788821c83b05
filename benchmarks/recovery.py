"""Recovery by self-distillation on the real ViT-Tiny and DeiT-Tiny: what it gains, by speed-up, method and pictures.

python benchmarks/recovery.py --assets DIR --out DIR [--only PATTERN]     every run of RUNS that is not yet in --out
python benchmarks/recovery.py --assets DIR --out DIR --run vit,fold,2.0,mix650 rate=2e-5 epochs=8
A fifth part `int8` of a run tunes with fake quantisation and judges INT8 files, run by ONNX Runtime on the CPU.
`cv650` and `cv1650` are cross-validation: five runs, `cv650.0` to `cv650.4`, whose figures are pooled.
DIR holds imagenet-val-650, nips17 and the weights. Prints a Markdown table and one JSON line last. No latency is
measured: the schedules are fixed. A run of ViT-Tiny with 650 pictures takes some 10 min of one core.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgeprune import stats
from edgeprune.images import batches, calibration_indices, drawn, load_images, load_pixels
from edgeprune.io import key_of, save_array, write_bytes
from edgeprune.onnx_graph.calibration import calibrated
from edgeprune.onnx_graph.graph import save_graph
from edgeprune.onnx_graph.int8 import Int8Layer, int8, int8_layers
from edgeprune.records import Int8Ranges
from edgeprune.runtimes.inference import logits_of
from edgeprune.runtimes.target import target_for
from edgeprune.scheduling.published import published_shapes
from edgeprune.tasks import CLASSIFY, percent
from edgeprune.vit.augmentation import Augmentation
from edgeprune.vit.export import onnx_of_schedule
from edgeprune.vit.fidelity import logits_of_schedule, pruned_module
from edgeprune.vit.models import Model, load_model
from edgeprune.vit.recovery import Recipe, recovered
from edgeprune.vit.recovery_files import save_recovered

WEIGHTS = {
    "vit": ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"),
    "deit": ("deit_tiny_patch16_224", "deit_tiny_patch16_224.safetensors"),
}
# Chosen by the search of `edgeprune build` for 2 cores of a CPU, batch 1, fp32; those after 2.0 by hand.
FOLD = {
    "1.5": (197, 197, 197, 129, 129, 113, 72, 72, 72, 72, 72, 72),
    "2.0": (197, 144, 144, 88, 88, 49, 49, 25, 25, 25, 25, 25),
    "2.5": (160, 112, 112, 56, 56, 32, 32, 16, 16, 16, 16, 16),
    # About as fast as 2.0, with fewer or more tokens in late blocks.
    "2.0-early": (197, 160, 160, 96, 96, 40, 40, 16, 16, 16, 16, 16),
    "2.0-late": (197, 144, 144, 80, 80, 32, 32, 32, 32, 32, 32, 32),
    "2.5-late": (197, 97, 97, 28, 28, 28, 28, 28, 28, 28, 28, 28),
    # Of equal predicted latency (2.0 times less): the best before recovery, and the best after two epochs of it.
    "2.01-before": (197, 128, 128, 128, 128, 24, 24, 24, 24, 24, 24, 24),
    "2.01-after": (197, 197, 97, 97, 40, 40, 40, 40, 40, 40, 40, 40),
}
RUNS = (
    "vit,fold,2.0,cv650", "vit,fold,1.5,cv650", "deit,fold,2.0,cv650", "vit,fold,2.0,cv1650", "vit,fold,2.5,cv650",
    "vit,pomt,2.0,cv650", "vit,tome,2.0,cv650",
    "vit,fold,2.0,val650", "vit,fold,1.5,val650", "deit,fold,2.0,val650", "vit,fold,2.0,mix1150",
    "vit,fold,1.5,val650,int8",
    "vit,pomt,2.0,val650", "vit,tome,2.0,val650", "vit,fold,2.5,val650", "deit,fold,1.5,val650",
    "vit,fold,2.0,nips1000", "vit,fold,1.5,nips1000", "deit,fold,2.0,mix1150",
    "vit,fold,2.0,mix650", "vit,fold,2.0,mix325", "vit,fold,2.0,mix128",
    "deit,fold,2.0,mix650", "deit,fold,2.0,mix325", "deit,fold,2.0,mix128",
    "vit,pomt,1.5,val650", "vit,tome,1.5,val650", "vit,fold,1.5,mix1150",
    "deit,pomt,2.0,val650", "deit,tome,2.0,val650", "vit,fold,2.5,mix1150",
)  # fmt: skip
FOLDS = 5  # of cross-validation
JUDGED = 500  # pictures of the mixed set that no run trains on


def schedule_of(model: Model, method: str, speedup: str) -> tuple[int, ...]:
    """fold's schedule, or for others the published shape that leaves as many tokens in all."""
    wanted = FOLD[speedup]
    if method == "fold":
        return wanted
    return min(published_shapes(model.vit, method, True), key=lambda t: abs(sum(t) - sum(wanted)))


class Pictures:
    """The pictures of both sources, decoded, and how they are split."""

    def __init__(self, assets: Path, out: Path, model: Model) -> None:
        self.pixels: dict[str, Any] = {}
        self.labels: dict[str, Any] = {}
        for name, folder in (("val", "imagenet-val-650"), ("nips", "nips17")):
            found = load_images(assets / folder / "labels.csv")
            file = out / f"pixels-{name}-{model.preprocessing.resize_px}.npy"
            if not file.exists():
                save_array(load_pixels(found.paths, model.preprocessing), file)
            self.pixels[name], self.labels[name] = np.load(file), np.array(found.labels)

    def split(self, name: str) -> tuple[str, Any, Any, Any]:
        """A name for what is judged on, pixels to train on, pixels and labels to judge by.

        val650: 650 validation pictures, judged on 1,000 of nips17; nips1000: the other way round. mixN: N of the
        first 1,150 of both sources in a seeded order, always judged on the last 500. cv650.K: the validation pictures
        without the K-th of five parts, judged on that part; cv1650.K: all of nips17 as well.
        """
        if name == "val650":
            return "nips", self.pixels["val"], self.pixels["nips"], self.labels["nips"]
        if name == "nips1000":
            return "val", self.pixels["nips"], self.pixels["val"], self.labels["val"]
        data, _, part = name.partition(".")
        if part:
            order = np.random.default_rng(1).permutation(len(self.pixels["val"]))
            judged = order[int(part) :: FOLDS]
            train = np.delete(self.pixels["val"], judged, axis=0)
            if data == "cv1650":
                train = np.concatenate([train, self.pixels["nips"]])
            return f"part{part}", train, self.pixels["val"][judged], self.labels["val"][judged]
        order = np.random.default_rng(1).permutation(sum(map(len, self.pixels.values())))
        pixels, labels = (np.concatenate([kind["val"], kind["nips"]])[order] for kind in (self.pixels, self.labels))
        train = pixels[:-JUDGED][drawn(len(pixels) - JUDGED, int(name.removeprefix("mix")))]
        return "mix", train, pixels[-JUDGED:], labels[-JUDGED:]


def figures(dense: Any, pruned: Any, labels: Any) -> dict[str, Any]:
    """KL, agreement and top-1 of logits (images, classes)."""
    found = CLASSIFY.fidelity(dense, pruned, list(labels))
    return {"kl": found.kl, "agreement": found.agreement, "top1": found.top1}


def cached(out: Path, key: str, make: Callable[[], Any]) -> Any:
    """Logits that several runs share."""
    file = out / f"logits-{key}.npy"
    if not file.exists():
        save_array(make(), file)
    return np.load(file)


class Precision:
    """Logits (images, classes) of a schedule: in PyTorch, or of its INT8 file in ONNX Runtime."""

    batch = 10

    def __init__(self, kind: str, calibration: Any) -> None:
        self.kind, self.calibration = kind, calibration

    def logits(self, model: Model, method: str, tokens: Any, pixels: Any) -> Any:
        """Those of the model, with its own weights or others."""
        if self.kind != "int8":
            return logits_of_schedule(model, method, tokens, pixels, method != "none")
        target = target_for("cpu", "int8", self.batch)
        full, found = self.ranges(model, method, tokens)
        print(f"INT8 of {method}: {found.way}, in floating point {found.kept}, KL {found.kl:.4f}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "int8.onnx"
            save_graph(int8(full, found.ranges, found.kept), file)
            with target.runtime.open(file, target.setup) as session:
                return logits_of(session, pixels, model.preprocessing, self.batch)

    def ranges(self, model: Model, method: str, tokens: Any) -> tuple[onnx.ModelProto, Int8Ranges]:
        """The fp32 graph and its calibration."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "fp32.onnx"
            onnx_of_schedule(model, method, tokens, method != "none", self.batch, file)
            full = onnx.load(file)
        pixels = self.calibration[calibration_indices(len(self.calibration))]
        images = [images for images, _ in batches(pixels, model.preprocessing, self.batch)]
        return full, calibrated(full, images, CLASSIFY)

    def layers(self, model: Model, method: str, tokens: Any) -> tuple[Int8Layer, ...]:
        """What to round in training."""
        return int8_layers(*self.ranges(model, method, tokens)) if self.kind == "int8" else ()


def run(name: str, recipe: Recipe, assets: Path, out: Path, loaded: dict[str, Any]) -> dict[str, Any]:
    """One recovery, judged on pictures that it never saw; its weights are kept in `out`."""
    kind, method, speedup, data, *rest = name.split(",")
    if kind not in loaded:
        model = load_model(WEIGHTS[kind][0], str(assets / WEIGHTS[kind][1]))
        loaded[kind] = model, Pictures(assets, out, model)
    model, pictures = loaded[kind]
    tokens = schedule_of(model, method, speedup)
    where, training, pixels, labels = pictures.split(data)
    exact, precision = Precision("fp32", None), Precision(rest[0] if rest else "fp32", training)
    every, key = (model.vit.tokens,) * 12, f"{method}-{'.'.join(map(str, tokens))}"
    dense = cached(out, f"{kind}-{where}-dense", lambda: exact.logits(model, "none", every, pixels))
    whole, suffix = dense, "".join(f"-{each}-{data}" for each in rest)
    if rest:
        whole = cached(out, f"{kind}-{where}-dense{suffix}", lambda: precision.logits(model, "none", every, pixels))
    before = cached(out, f"{kind}-{where}-{key}{suffix}", lambda: precision.logits(model, method, tokens, pixels))
    start, student = time.monotonic(), pruned_module(model, method, tokens, True)
    layers = precision.layers(model, method, tokens)
    file = out / f"{name.replace(',', '-')}-{key_of(recipe.parts)[:8]}.safetensors"
    checkpoint = file.with_suffix(
        ".checkpoint"
    )  # an interrupted run continues, and its seconds are those of the rest
    trained = recovered(student, training, model.preprocessing, recipe, checkpoint, int8=layers)
    seconds = time.monotonic() - start
    save_recovered(trained.module.model, trained.record, file)
    checkpoint.unlink()
    after = precision.logits(replace(model, module=trained.module.model), method, tokens, pixels)
    return {
        "run": name, "tokens": tokens, "judged": len(labels), "seconds": seconds, "recipe": asdict(recipe),
        "dense_top1": percent(CLASSIFY.right(whole, labels)), "before": figures(dense, before, labels),
        "after": figures(dense, after, labels), "standard_error": errors_of(dense, before, after, labels),
        "curve": trained.record.curve, "epochs": trained.record.epochs, "images": trained.record.images,
        "weights": file.name,
    }  # fmt: skip


def errors_of(dense: Any, before: Any, after: Any, labels: Any) -> dict[str, float]:
    """Standard errors of what recovery changed, paired by picture."""
    change = np.asarray(stats.kl_per_image(dense, after)) - np.asarray(stats.kl_per_image(dense, before))
    hit = {"agreement": dense.argmax(1), "top1": labels}
    return {"kl": standard_error(change)} | {
        k: 100 * standard_error((after.argmax(1) == v) * 1.0 - (before.argmax(1) == v)) for k, v in hit.items()
    }


def standard_error(differences: Any) -> float:
    """Standard error of the mean of paired differences."""
    return float(np.std(differences, ddof=1) / len(differences) ** 0.5)


def pooled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a cross-validation as one row: every picture is judged once, by weights that never saw it."""
    shares = np.array([row["judged"] for row in rows]) / sum(row["judged"] for row in rows)

    def mean(*path: str) -> float:
        values = [reduce(lambda found, key: found[key], path, row) for row in rows]
        return float(shares @ values)

    return rows[0] | {
        "run": rows[0]["run"].rpartition(".")[0], "judged": sum(row["judged"] for row in rows),
        "dense_top1": mean("dense_top1"), "epochs": round(mean("epochs")), "seconds": mean("seconds"),
        "before": {key: mean("before", key) for key in rows[0]["before"]},
        "after": {key: mean("after", key) for key in rows[0]["after"]},
        "standard_error": {
            key: float(np.linalg.norm(shares * [row["standard_error"][key] for row in rows]))
            for key in rows[0]["standard_error"]
        },
        "parts": rows,
    }  # fmt: skip


def parts_of(name: str) -> list[str]:
    """The runs that a name stands for: the parts of a cross-validation, else itself."""
    kind, method, speedup, data, *rest = name.split(",")
    whole = not data.startswith("cv") or "." in data
    return [name] if whole else [",".join([kind, method, speedup, f"{data}.{k}", *rest]) for k in range(FOLDS)]


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    before, after, error = row["before"], row["after"], row["standard_error"]
    lost = [row["dense_top1"] - each["top1"] for each in (before, after)]
    return (
        f"| {row['run']} {row.get('note', '')} | {before['kl']:.4f} → {after['kl']:.4f} (±{error['kl']:.4f}) "
        f"| {after['kl'] / before['kl']:.2f} | {before['agreement']:.1f} → {after['agreement']:.1f} "
        f"(±{error['agreement']:.1f}) | {lost[0]:.1f} → {lost[1]:.1f} (±{error['top1']:.1f}) "
        f"| {row['epochs']} | {row['seconds']:.0f} |"
    )


HEAD = (
    "| model, method, speed-up, trained on | KL | share | agreement, % | top-1 lost | epochs | s |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def changed(recipe: Recipe, settings: list[str]) -> Recipe:
    """A recipe with settings NAME=VALUE; those of the augmentation, too."""
    for name, value in (each.split("=") for each in settings):
        if name in Augmentation._fields:
            recipe = replace(recipe, augmentation=recipe.augmentation._replace(**{name: float(value)}))
        else:
            kind = type(next(getattr(recipe, f.name) for f in fields(recipe) if f.name == name))
            recipe = replace(recipe, **{name: kind(value)})
    return recipe


def main() -> None:
    """Run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="*")
    parser.add_argument("--run")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    loaded: dict[str, Any] = {}
    rows = []
    recipe, note = changed(Recipe(), args.settings), " ".join(args.settings)
    for name in [args.run] if args.run else fnmatch.filter(RUNS, args.only):
        found = []
        for part in parts_of(name):
            file = args.out / f"{part.replace(',', '-')}{'-' if note else ''}{note.replace(' ', '-')}.json"
            if not file.exists():
                row = run(part, recipe, args.assets, args.out, loaded) | {"note": note}
                write_bytes(file, json.dumps(row).encode())
            found.append(json.loads(file.read_text()))
        rows.append(pooled(found) if len(found) > 1 else found[0])
        print(line(rows[-1]), flush=True)
    print("\n".join([HEAD, *map(line, rows)]))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()

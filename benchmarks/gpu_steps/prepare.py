"""Writes a kit for GPU machines without torch (see kit.py). This part needs torch and ONNX Runtime, but no GPU.

Finished files are kept, so that an interrupted preparation continues.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto

from edgeprune.defaults import REDUCERS
from edgeprune.images import load_images, load_pixels, normalise
from edgeprune.io import load, replacing, save
from edgeprune.latency.depth import LEAST_BLOCKS
from edgeprune.latency.profiling import cut_pairs
from edgeprune.onnx_graph.calibration import calibrated
from edgeprune.onnx_graph.chain import chained
from edgeprune.onnx_graph.graph import ALIGNED_BYTES, OUTSIDE_BYTES, linear_layers
from edgeprune.pipeline.export import metadata_of
from edgeprune.records import Int8Ranges, Schedule, Vit
from edgeprune.scheduling.goals import single_cut
from edgeprune.tasks import CLASSIFY
from edgeprune.vit.export import (
    graph_of_block,
    onnx_from_module,
    onnx_of_schedule,
    save_trunk,
    trunk_from_module,
    weight_arrays,
)
from edgeprune.vit.fidelity import logits_of_schedule
from edgeprune.vit.models import Model
from edgeprune.vit.profiling_models import alike, rotation_of
from edgeprune.vit.pruned import CutBlock, Trunk
from edgeprune.vit.reducers import reducer_named
from gpu_steps.kit import ABOUT, LATENCY, PARITY, STORE, pruned, ranking_graph, read_json, variant, write_json

PICTURES = 64
CALIBRATION = 16  # pictures for INT8
QUARTERS = (0.75, 0.55, 0.35)  # of all tokens after each quarter of the blocks, for parity
PERCENTS = (70, 50)  # of all tokens after one cut, for latency
Store = dict[str, Any]


def prepare_parity(
    kit: Path,
    model: Model,
    images: Path | None = None,
    methods: Sequence[str] = REDUCERS,
    batches: Sequence[int] = (1, 4),
    count: int = PICTURES,
) -> None:
    """Every method and no pruning, prefix_last on and off, by batch; pictures, PyTorch's logits, INT8 ranges.

    Without `images` the pictures are noise.
    """
    folder, vit = kit / model.vit.name, model.vit
    store = _store(folder, model, PARITY, random=False)
    pixels = _pictures(folder, model, images, count)
    logits: dict[str, Any] = {}
    for method in ("none", *methods):
        for prefix_last in (False, True):
            tokens = parity_tokens(vit, method)
            for batch in batches:
                name = variant(method, prefix_last, batch)
                schedule = _schedule(vit, method, tokens, prefix_last)
                _whole(folder, model, schedule, batch, name, store)
                _ranges(folder, name, variant(method, prefix_last, batches[0]), model, pixels)
            logits[variant(method, prefix_last, 0)] = logits_of_schedule(model, method, tokens, pixels, prefix_last)
    _save_arrays(folder / "logits.npz", logits)
    images_in = normalise(pixels, model.preprocessing)
    _save_arrays(
        folder / "ranking.npz", {m: _ranking(folder, variant(m, False, batches[0]), images_in) for m in methods}
    )


def prepare_latency(
    kit: Path,
    model: Model,
    methods: Sequence[str] = REDUCERS,
    batches: Sequence[int] = (1, 8, 32),
    percents: Sequence[int] = PERCENTS,
) -> None:
    """One block with a symbolic token axis, the unpruned model, cuts, and models with one cut; without weights.

    At the first batch also the trunk and two of its blocks, where its blocks are alike.
    """
    folder, vit, family = kit / model.vit.name, model.vit, model.family
    store = _store(folder, model, LATENCY, random=True)
    blocks: Any = model.module.blocks
    middle, rotation = blocks[vit.depth // 2], rotation_of(model)
    if vit.depth >= LEAST_BLOCKS and alike(blocks):
        first = torch.zeros(batches[0], vit.tokens, vit.width)
        block = graph_of_block(middle, family, first, rotation)
        for name, part in (("trunk", blocks), ("pair", blocks[vit.depth // 2 - 1 : vit.depth // 2 + 1])):
            if block is not None:
                chain = partial(chained, block, [weight_arrays(each) for each in part])
                _export(folder, f"{name}-b{batches[0]}", store, lambda p, c=chain: save_trunk(c(), p))
    for batch in batches:
        stream = torch.zeros(batch, vit.tokens, vit.width)
        _export(
            folder,
            f"block-b{batch}",
            store,
            lambda p, s=stream: trunk_from_module(Trunk([middle], family, rotation), s, p),
        )
        _whole(
            folder, model, _schedule(vit, "none", (vit.tokens,) * vit.depth, False), batch, f"dense-b{batch}", store
        )
        for method in methods:
            for entering, leaving in cut_pairs(vit):
                cut = CutBlock(middle, family, vit, leaving, reducer_named(method), rotation)  # type: ignore[arg-type]
                _export(
                    folder, f"cut-{method}-{entering}-{leaving}-b{batch}", store,
                    lambda p, c=cut, s=stream[:, :entering]: onnx_from_module(c, s, p, ("x", "y"), tensorrt=True),
                )  # fmt: skip
            for percent in percents:
                tokens = single_cut(vit, vit.depth // 4, max(vit.tokens * percent // 100, vit.prefix + 2))
                schedule = _schedule(vit, method, tokens, vit.prefix_pooled)
                _whole(folder, model, schedule, batch, pruned(method, percent, batch), store)


def parity_tokens(vit: Vit, method: str) -> tuple[int, ...]:
    """Three cuts, one after each quarter of the blocks; the last block cuts nothing, for the sake of prefix_last."""
    shares = (1.0, *QUARTERS) if method != "none" else (1.0,) * 4
    counts = [max(round(share * vit.tokens), vit.prefix + 2) for share in shares]
    tokens = [counts[4 * block // vit.depth] for block in range(vit.depth)]
    return (*tokens[:-1], tokens[-2])


def _schedule(vit: Vit, method: str, tokens: Sequence[int], prefix_last: bool) -> Schedule:
    return Schedule(vit=vit, method=method, policy="search", tokens=tuple(tokens), prefix_last=prefix_last)


def _store(folder: Path, model: Model, use: str, random: bool) -> Store:
    """What is known of the weights of a model; `tensors` are offsets by hash."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / ABOUT).exists():
        store: Store = read_json(folder / ABOUT)
    else:
        save(model.vit, folder / "vit.json")
        store = {"key": model.vit.weights_sha256, "random": random, "uses": [], "bytes": 0, "tensors": {}}
        if random:
            store["key"] = hashlib.sha256(f"random {model.vit.name}".encode()).hexdigest()
    if use not in store["uses"]:
        store["uses"].append(use)
        write_json(folder / ABOUT, store)
    return store


def _pack(source: Path, out: Path, store: Store) -> None:
    """Move a graph into the kit; its large fp32 tensors go to the store, each once."""
    model = onnx.load(source)
    folder, begin = out.parent, store["bytes"]
    new: list[tuple[int, bytes]] = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.raw_data) < OUTSIDE_BYTES:
            continue
        content, digest = bytes(tensor.raw_data), hashlib.sha256(tensor.raw_data).hexdigest()
        if digest not in store["tensors"]:
            place = -(-store["bytes"] // ALIGNED_BYTES) * ALIGNED_BYTES
            store["tensors"][digest], store["bytes"] = place, place + len(content)
            new.append((place, content))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        place = store["tensors"][digest]
        for key, value in (("location", STORE), ("offset", place), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))
    if not store["random"]:
        with open(folder / STORE, "r+b" if begin else "wb") as file:
            for place, content in new:
                file.seek(place)
                file.write(content)
    write_json(folder / ABOUT, store)
    with replacing(out) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _whole(folder: Path, model: Model, schedule: Schedule, batch: int, name: str, store: Store) -> None:
    def export(file: Path) -> None:
        onnx_of_schedule(
            model, schedule.method, schedule.tokens, schedule.prefix_last, batch, file,
            metadata=metadata_of(model, schedule, None), tensorrt=True,
        )  # fmt: skip

    _export(folder, name, store, export)


def _export(folder: Path, name: str, store: Store, export: Callable[[Path], None]) -> None:
    """Write a graph into the kit unless it is there."""
    out = folder / f"{name}.onnx"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            export(Path(scratch) / "model.onnx")
            _pack(Path(scratch) / "model.onnx", out, store)


def _pictures(folder: Path, model: Model, images: Path | None, count: int) -> Any:
    """Pixels (images, P, P, 3); written to the kit with the labels, if there are any."""
    path, how, labels = folder / "pictures.npz", model.preprocessing, None
    if not path.exists():
        if images is None:
            pixels = np.random.default_rng(0).integers(0, 256, (count, *how.size, 3), np.uint8)
        else:
            found = load_images(images)
            picked = [i * len(found.paths) // count for i in range(count)]
            pixels = load_pixels([found.paths[i] for i in picked], how)
            labels = [found.labels[i] for i in picked] if found.labels else None
        _save_arrays(path, {"pixels": pixels} | ({"labels": np.array(labels)} if labels else {}))
        save(how, folder / "preprocessing.json")
    return np.load(path)["pixels"]


def _ranges(folder: Path, name: str, first: str, model: Model, pixels: Any) -> None:
    """INT8 ranges of a graph: those of the same graph at its first batch, whose linear layers have the same order."""
    out, other = folder / f"{name}.int8.json", folder / f"{first}.int8.json"
    if out.exists():
        return
    graph = onnx.load(folder / f"{name}.onnx")
    if other.exists():
        known, before = load(other, Int8Ranges), onnx.load(folder / f"{first}.onnx")
        pairs = list(zip(linear_layers(before), linear_layers(graph), strict=True))
        held = [{t.name: t.raw_data for t in each.graph.initializer} for each in (before, graph)]
        if all(held[0][a.input[1]] == held[1][b.input[1]] for a, b in pairs):
            ranges = {b.input[0]: known.ranges[a.input[0]] for a, b in pairs}
            kept = tuple(b.name for a, b in pairs if a.name in known.kept)
            save(msgspec.structs.replace(known, ranges=ranges, kept=kept), out)
            return
    size = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    pictures = normalise(pixels[: min(CALIBRATION, len(pixels))], model.preprocessing)
    save(calibrated(graph, np.split(pictures, len(pictures) // size), CLASSIFY), out)


def _ranking(folder: Path, name: str, images: Any) -> Any:
    """The order in which the first cut ranks tokens, (images, tokens), by ONNX Runtime in fp32."""
    graph = ranking_graph(onnx.load(folder / f"{name}.onnx"))
    size = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    run = partial(session.run, None)
    return np.concatenate([run({"images": part})[0] for part in np.split(images, len(images) // size)])


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)

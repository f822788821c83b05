"""The Python API: the commands as functions that return records. Nothing is printed; progress is a callback."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import zoo
from edgeprune.bundles.bundle import Bundle
from edgeprune.defaults import METHODS, WORK
from edgeprune.records import Progress, Schedule, Staircase, silent
from edgeprune.runtimes.remote.ssh import Host
from edgeprune.scheduling.goals import Goal

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.benchmark.result import Bench
    from edgeprune.pipeline.compare import Comparison

__all__ = ["Goal", "bench", "build", "compare", "profile", "prune", "recover", "schedule"]


def build(
    model: str | os.PathLike[str] | nn.Module = zoo.EMBEDDED,
    *,
    device: str = "cpu",
    images: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    task: str | None = None,
    layers: Sequence[int] = (),
    head: str | Path | None = None,
    text_embeddings: str | Path | None = None,
    goal: Goal | None = None,
    weights: str | None = None,
    method: str = "fold",
    policy: str = "search",
    precision: str = "fp32",
    batch: int = 1,
    simulate: bool = False,
    exhaustive: bool = False,
    search_images: int = 128,
    rounds: int = 60,
    neighbours: int = 3,
    recover: str | Path | bool | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    host: str | None = None,
    host_program: str = "edgeprune",
    ray: str | None = None,
    work: str | Path = WORK,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Measure the staircase, choose a schedule, export, compile, time and evaluate it; write a bundle.

    Args:
        model: A timm name, `hf-hub:ORG/NAME`, `local-dir:PATH`, a folder in the format of transformers, or a timm
            VisionTransformer or Eva with the weights it has (copied, never changed). The embedded digit classifier by
            default.
        device: `cpu`, `cuda`, another name listed by `edgeprune devices`, or a path to your own .toml.
        images: A folder of class folders, a CSV `image[,label]`, or a folder of pictures. Labels are optional.
        image_size: Input (height, width) in pixels, a multiple of the patch size, or one number for a square, instead
            of the model's own. Position embeddings are resampled as in timm.
        task: Type of the output, `classify`, `embed` or `dense`; by default `embed` for a model without a head.
            Embeddings are compared by cosine and nearest neighbours, dense features by their relative error, and
            `Bundle.figures.fidelity` has the figures.
        layers: Blocks, counted from 1, whose patch features are outputs on the full grid (dense features).
        head: An ONNX file that takes the dense features; the error is then that of its output.
        text_embeddings: A float32 .npy file, (classes, C), with text embeddings of the class names: adds zero-shot
            figures.
        goal: A speed-up, a latency budget, a bound on lost top-1, on the cosine of embeddings or on the error of
            dense features, or a trade-off, which is the default (Goal()).
        weights: `pretrained`, `embedded`, `random`, or a checkpoint file; for names only.
        method: How tokens are removed: fold, pomt, tome, evit, topk, none.
        policy: `search` (cuts in any blocks, lowest KL) or `paper` (one cut, highest utility).
        precision: fp32, fp16, int8 or fp8; PrecisionError if it is slower than fp32 or loses too much. `auto` builds
            all that the device supports and keeps the fastest accepted one; `Bundle.precisions` says why.
        batch: Images per inference; part of the static shapes.
        simulate: Take latencies from the tail-effect model of the device instead of hardware.
        exhaustive: Measure every token count.
        search_images: Number of pictures used to choose the schedule; figures are of the others.
        rounds: Interleaved rounds of the final measurement.
        neighbours: Number of similar schedules to build and time in addition to the best.
        recover: Unlabelled pictures (a folder or a CSV) on which the pruned model is fine-tuned to match the unpruned
            one; True takes half of `images`. Figures are of other pictures, with and without recovery.
        preprocessing: Overrides of the model's data config: crop_pct, interpolation, mean, std, crop_mode.
        host: USER@HOST of the device, driven over ssh.
        host_program: Path of edgeprune on that host.
        ray: `local`, `auto` (the cluster of this machine, or the connection of this process) or HOST:PORT: evaluate
            schedules on a Ray cluster, with the same results. Needs the extra `ray`.
        work: Folder of finished steps, so that the same call continues or reuses them; of INT8 ranges, too, unless it
            is the default (they are in `calib` then).
        out: Folder of the bundle; default `engines/<device>/<model>/<method>-<precision>-b<batch>`.
        progress: Called with (current activity, items done, total number of items).

    Raises:
        EdgepruneError: One of edgeprune.errors; its message says what to do. Nothing half-written is left.
    """
    from edgeprune.distributed.cluster import connected
    from edgeprune.pipeline.auto import build_fastest
    from edgeprune.pipeline.build import build as build_one
    from edgeprune.pipeline.context import Options

    run = build_fastest if precision == "auto" else build_one
    options = Options(
        device=device,
        model=_model(model),
        weights=weights,
        images=_path(images),
        image_size=_size(image_size),
        method=method,
        policy=policy,
        goal=goal or Goal(),
        precision=precision,
        batch=batch,
        work=Path(work),
        out=_path(out),
        simulate=simulate,
        exhaustive=exhaustive,
        search_images=search_images,
        rounds=rounds,
        neighbours=neighbours,
        recover=_pictures(recover),
        task=task,
        layers=tuple(layers),
        head=_path(head),
        text_embeddings=_path(text_embeddings),
        overrides=preprocessing or {},
        host=Host(host, host_program) if host else None,
    )
    with connected(ray) as cluster:
        built = run(replace(options, cluster=cluster), progress)
    return Bundle(built.path, built.manifest, built.precisions)


def profile(
    model: str | os.PathLike[str] | nn.Module = zoo.EMBEDDED,
    *,
    device: str = "cpu",
    weights: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    trunk: str | Path | None = None,
    method: str = "none",
    precision: str = "fp32",
    batch: int = 1,
    simulate: bool = False,
    exhaustive: bool = False,
    task: str | None = None,
    layers: Sequence[int] = (),
    host: str | None = None,
    host_program: str = "edgeprune",
    work: str | Path = WORK,
    progress: Progress = silent,
) -> Staircase:
    """Measure latency over token counts: `points` (tokens, samples in ms) of the whole trunk, embedding and head.

    With `trunk` (trunk.onnx of `edgeprune export --trunk`) no torch is needed; `method` adds the cost of its cuts.
    The other arguments are those of `build`. Raises EdgepruneError.
    """
    from edgeprune.pipeline.context import check_task
    from edgeprune.pipeline.profile import profile as run
    from edgeprune.runtimes.target import target_for

    check_task(task)
    there = Host(host, host_program) if host else None
    target = target_for(device, precision, batch, simulate, Path(work), progress, there)
    return run(target, _model(model), weights, _path(trunk), method, exhaustive, _size(image_size), layers, task)


def schedule(
    staircase: Staircase | str | Path,
    model: str | os.PathLike[str] | nn.Module = zoo.EMBEDDED,
    *,
    images: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    task: str | None = None,
    layers: Sequence[int] = (),
    head: str | Path | None = None,
    goal: Goal | None = None,
    weights: str | None = None,
    method: str = "fold",
    policy: str = "search",
    search_images: int = 128,
    preprocessing: Mapping[str, Any] | None = None,
    work: str | Path = WORK,
    progress: Progress = silent,
) -> Schedule:
    """Choose the tokens that each block keeps, from a staircase and pictures; nothing is measured.

    `Schedule.tokens` has one count per block, including prefix tokens. The arguments are those of `build`. Raises
    ScheduleError if the goal is out of reach, and any other EdgepruneError.
    """
    from edgeprune.io import load
    from edgeprune.pipeline.context import Options
    from edgeprune.pipeline.schedule import schedule_from_staircase

    measured = staircase if isinstance(staircase, Staircase) else load(Path(staircase), Staircase)
    options = Options(
        model=_model(model), weights=weights, images=_path(images), method=method, policy=policy, goal=goal or Goal(),
        search_images=search_images, work=Path(work), task=task, layers=tuple(layers), head=_path(head),
        image_size=_size(image_size), overrides=preprocessing or {},
    )  # fmt: skip
    return schedule_from_staircase(measured, options, progress)


def prune(model: nn.Module, schedule: Schedule | str | Path) -> nn.Module:
    """A timm VisionTransformer or Eva with a schedule, as a torch module: (B, 3, H, W) images to (B, classes) logits.

    With a schedule for dense features it gives them on the full grid, (B, rows, columns, C) for each layer, and then
    the embedding.

    `model` has to take pictures of the schedule's size. The result shares its parameters with it, takes any batch
    size, runs on any device and can be trained: gradients flow through the tokens that are kept or merged, not
    through the choice of tokens. Raises ModelError for a model that is not supported, InputError if the schedule is
    for a model of another shape or size of pictures.
    """
    from edgeprune.io import load
    from edgeprune.vit.pruned import pruned_from_module

    found = schedule if isinstance(schedule, Schedule) else load(Path(schedule), Schedule)
    return pruned_from_module(model, found)


def recover(
    model: nn.Module,
    schedule: Schedule | str | Path,
    *,
    images: str | Path,
    task: str | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress = silent,
) -> nn.Module:
    """`prune`, with weights fine-tuned to match `model` on pictures; labels are never used.

    A quarter of the pictures is never trained on, and the state with the lowest KL on it is returned: the weights of
    `model` if none is better. `task` is classify or embed, by default that of the module; it is dense for a schedule
    with layers. `model` is not changed. Trains on a GPU if torch finds one; the result is on the CPU. With
    `checkpoint`, a file, an interrupted run continues after its last whole epoch. Raises InputError, ModelError,
    ImageError, OutputError.
    """
    from edgeprune.errors import InputError
    from edgeprune.images import load_pixels
    from edgeprune.pipeline.context import Options, check_outputs, check_size, check_task, recovery_set
    from edgeprune.vit.models import load_model
    from edgeprune.vit.recovery import Recipe, recovered

    check_task(task)
    loaded = load_model(model, task=task)
    check_outputs(loaded)
    pruned: Any = prune(loaded.module, schedule)
    if task is not None and (task == "dense") != bool(pruned.vit.layers):
        raise InputError(f"task {task} does not fit the outputs of this schedule: leave it out")
    how = loaded.preprocessing
    found = recovery_set(Options(recover=Path(images)), None)
    assert found is not None
    check_size(pruned.vit, len(found))
    pixels = load_pixels(found.paths, how, progress)
    task = "dense" if pruned.vit.layers else loaded.task
    return recovered(pruned, pixels, how, Recipe(seed=seed), _path(checkpoint), progress, task).module


def compare(
    model: str | os.PathLike[str] | nn.Module = zoo.EMBEDDED,
    *,
    device: str = "cpu",
    images: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    task: str | None = None,
    layers: Sequence[int] = (),
    head: str | Path | None = None,
    text_embeddings: str | Path | None = None,
    weights: str | None = None,
    methods: Sequence[str] = METHODS,
    speedups: Sequence[float] = (1.25, 1.5, 2.0),
    precision: str = "fp32",
    batch: int = 1,
    simulate: bool = False,
    exhaustive: bool = False,
    search_images: int = 128,
    rounds: int = 40,
    recover: str | Path | bool | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    ray: str | None = None,
    work: str | Path = WORK,
    progress: Progress = silent,
) -> Comparison:
    """Compare methods at equal measured latency, with searched and with published schedules.

    `Comparison.entries` has a schedule and a report for each; targets out of reach are in `missing`, with the reason.
    The arguments are those of `build`; fidelity is against the unpruned model in fp32, speed-ups are over it in
    `precision`. Raises EdgepruneError.
    """
    from edgeprune.distributed.cluster import connected
    from edgeprune.pipeline.compare import compare as run
    from edgeprune.pipeline.context import Options

    options = Options(
        device=device, model=_model(model), weights=weights, images=_path(images), precision=precision, batch=batch,
        work=Path(work), simulate=simulate, exhaustive=exhaustive, search_images=search_images, rounds=rounds,
        recover=_pictures(recover), task=task, layers=tuple(layers), head=_path(head),
        text_embeddings=_path(text_embeddings), image_size=_size(image_size), overrides=preprocessing or {},
    )  # fmt: skip
    with connected(ray) as cluster:
        return run(replace(options, cluster=cluster), list(methods), list(speedups), progress)


def bench(
    bundles: Sequence[str | Path | Bundle],
    *,
    rounds: int = 60,
    baseline: str | Path | None = None,
    end_to_end: bool = False,
    progress: Progress = silent,
) -> Bench:
    """Time bundles side by side on this machine, in interleaved rounds; ms, bootstrap intervals of 95 %.

    Latencies of a GPU are without the copies to and from it; with `end_to_end` they are wall time with both.
    `baseline` is a stored result of an earlier bench, to which ratios are given. Raises InputError, DeviceError.
    """
    from edgeprune.benchmark.bench import bench_bundles

    paths = [bundle.path if isinstance(bundle, Bundle) else Path(bundle) for bundle in bundles]
    return bench_bundles(paths, rounds, progress, _path(baseline), end_to_end=end_to_end)


def _model(given: str | os.PathLike[str] | nn.Module) -> str | nn.Module:
    return str(os.fspath(given)) if isinstance(given, os.PathLike) else given


def _pictures(recover: str | Path | bool | None) -> Path | bool:
    return recover if isinstance(recover, bool) else _path(recover) or False


def _size(given: int | tuple[int, int] | None) -> tuple[int, int] | None:
    from edgeprune.images import image_size

    return image_size(given, "image_size")


def _path(place: str | Path | None) -> Path | None:
    return Path(place) if place is not None else None

"""Commands that work on a model: build, compare, export, compile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import output
from edgeprune.cli.app import app
from edgeprune.cli.options import (
    Alpha,
    AnyPrecision,
    AsJson,
    Batch,
    Block,
    Budget,
    CropPct,
    Device,
    Exhaustive,
    HeadFile,
    HostProgram,
    Images,
    ImageSize,
    Interpolation,
    Layers,
    LockClocks,
    MaxDrop,
    MaxError,
    Mean,
    Method,
    MinCosine,
    Model,
    OnHost,
    OnRay,
    Policy,
    Precision,
    Recover,
    SearchImages,
    Simulate,
    Speedup,
    Std,
    Task,
    Texts,
    Weights,
    WholeLast,
    Work,
    goal_from,
    layers_from,
    overrides_from,
    recover_from,
    size_from,
)
from edgeprune.defaults import METHODS, WORK
from edgeprune.zoo import EMBEDDED


@app.command()
def build(
    device: Device = "cpu",
    model: Model = EMBEDDED,
    weights: Weights = None,
    images: Images = None,
    image_size: ImageSize = None,
    task: Task = None,
    layers: Layers = None,
    head: HeadFile = None,
    text_embeddings: Texts = None,
    method: Method = "fold",
    policy: Policy = "search",
    alpha: Alpha = None,
    speedup: Speedup = None,
    budget_ms: Budget = None,
    max_drop: MaxDrop = None,
    min_cosine: MinCosine = None,
    max_error: MaxError = None,
    precision: AnyPrecision = "fp32",
    batch: Batch = 1,
    block: Block = 3,
    whole_last: WholeLast = False,
    simulate: Simulate = False,
    lock_clocks: LockClocks = False,
    exhaustive: Exhaustive = False,
    search_images: SearchImages = 128,
    recover: Recover = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds of the final measurement", min=5)] = 60,
    neighbours: Annotated[int, typer.Option(help="similar schedules to build and time", min=0)] = 3,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    host: OnHost = None,
    host_program: HostProgram = "edgeprune",
    on_ray: OnRay = None,
    work: Work = WORK,
    out: Annotated[Path | None, typer.Option(help="folder for the bundle")] = None,
    as_json: AsJson = False,
) -> None:
    """Build a bundle: measure the staircase, choose a schedule, export, compile and measure it."""
    from edgeprune.cli.rows import precision_rows, row_of
    from edgeprune.cli.tables import build_table, precision_table
    from edgeprune.distributed.cluster import connected
    from edgeprune.pipeline.auto import build_fastest
    from edgeprune.pipeline.build import build as build_one
    from edgeprune.pipeline.context import Options
    from edgeprune.runtimes.remote.ssh import Host

    run = build_fastest if precision == "auto" else build_one

    options = Options(
        device=device,
        model=model,
        weights=weights,
        images=images,
        image_size=size_from(image_size),
        method=method,
        policy=policy,
        goal=goal_from(alpha, speedup, budget_ms, max_drop, min_cosine, max_error),
        precision=precision,
        batch=batch,
        work=work,
        out=out,
        simulate=simulate,
        exhaustive=exhaustive,
        block=block,
        whole_last=whole_last,
        search_images=search_images,
        rounds=rounds,
        neighbours=neighbours,
        recover=recover_from(recover),
        task=task,
        layers=layers_from(layers),
        head=head,
        text_embeddings=text_embeddings,
        overrides=overrides_from(crop_pct, interpolation, mean, std),
        host=Host(host, host_program) if host else None,
        lock_clocks=lock_clocks,
    )
    with connected(on_ray) as cluster, output.progress() as progress, output.clocks(device, lock_clocks, host):
        built = run(replace(options, cluster=cluster), progress)
    output.show(build_table(built.manifest), as_json)
    manifest = built.manifest
    if built.precisions:
        output.show(precision_table(built.precisions, manifest.engine.setup), as_json)
    output.tell(f"bundle: {built.path}", as_json)
    if as_json:
        row = row_of(manifest.engine.setup, manifest.schedule, manifest.report, built.path, manifest.recovery)
        output.json_line(row | ({"precisions": precision_rows(built.precisions)} if built.precisions else {}))


@app.command()
def compare(
    device: Device = "cpu",
    model: Model = EMBEDDED,
    weights: Weights = None,
    images: Images = None,
    image_size: ImageSize = None,
    task: Task = None,
    layers: Layers = None,
    head: HeadFile = None,
    text_embeddings: Texts = None,
    methods: Annotated[str, typer.Option(help="comma-separated methods")] = ",".join(METHODS),
    speedup: Annotated[str, typer.Option(help="comma-separated target speed-ups")] = "1.25,1.5,2.0",
    precision: Precision = "fp32",
    batch: Batch = 1,
    simulate: Simulate = False,
    exhaustive: Exhaustive = False,
    whole_last: WholeLast = False,
    search_images: SearchImages = 128,
    recover: Recover = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds of a measurement", min=5)] = 40,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    on_ray: OnRay = None,
    work: Work = WORK,
    plot: Annotated[Path | None, typer.Option(help="file for a plot of the results (.svg)")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare pruning methods at equal measured latency, with searched and with published schedules."""
    from edgeprune.cli.rows import compare_rows
    from edgeprune.cli.tables import compare_table
    from edgeprune.distributed.cluster import connected
    from edgeprune.html_report.files import compare_svg
    from edgeprune.io import check_replaceable, write_bytes
    from edgeprune.pipeline.compare import compare as run
    from edgeprune.pipeline.context import Options

    try:
        targets = [float(part) for part in speedup.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--speedup {speedup!r}: pass factors as 1.25,1.5,2.0") from None
    options = Options(
        device=device,
        model=model,
        weights=weights,
        images=images,
        image_size=size_from(image_size),
        precision=precision,
        batch=batch,
        work=work,
        simulate=simulate,
        exhaustive=exhaustive,
        whole_last=whole_last,
        search_images=search_images,
        rounds=rounds,
        recover=recover_from(recover),
        task=task,
        layers=layers_from(layers),
        head=head,
        text_embeddings=text_embeddings,
        overrides=overrides_from(crop_pct, interpolation, mean, std),
    )
    if plot is not None:
        check_replaceable(plot)
    with connected(on_ray) as cluster, output.progress() as progress:
        options = replace(options, cluster=cluster)
        comparison = run(options, [name.strip() for name in methods.split(",")], targets, progress)
    rows = compare_rows(comparison)
    output.show(compare_table(rows), as_json)
    for method, policy, target, reason in comparison.missing:
        output.tell(f"target not reached by {method} ({policy}) at {target}x: {reason}", True)
    if plot is not None and rows:
        write_bytes(plot, compare_svg(rows))
        output.tell(f"plot: {plot}", as_json)
    if as_json:
        output.json_line({"rows": rows})


@app.command()
def export(
    model: Model = EMBEDDED,
    weights: Weights = None,
    schedule: Annotated[Path | None, typer.Option(help="schedule.json written by `edgeprune schedule`")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="export the unpruned model")] = False,
    trunk: Annotated[bool, typer.Option("--trunk", help="export a folder of models for `profile --trunk`")] = False,
    method: Annotated[str | None, typer.Option(help="with --trunk: also models with cuts by this method")] = None,
    precision: Precision = "fp32",
    batch: Batch = 1,
    images: Images = None,
    image_size: ImageSize = None,
    task: Task = None,
    layers: Layers = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    device: Annotated[
        str,
        typer.Option(help="device that will run the file; determines the form of INT8 and the possible cuts"),
    ] = "cpu",
    out: Annotated[Path, typer.Option(help="ONNX file, or folder with --trunk")] = Path("model.onnx"),
    as_json: AsJson = False,
) -> None:
    """Export a pruned or unpruned model as ONNX with static shapes."""
    if (schedule is not None) + dense + trunk != 1:
        raise typer.BadParameter("pass exactly one of --schedule FILE, --dense and --trunk")
    from edgeprune.devices import load_device
    from edgeprune.onnx_graph.graph import weights_of
    from edgeprune.onnx_graph.precision import onnx_precision
    from edgeprune.pipeline.context import Options, check_task, image_set
    from edgeprune.pipeline.export import export_model
    from edgeprune.runtimes.target import check_batch, check_precision
    from edgeprune.vit.reducers import check_method

    check_batch(batch)
    check_task(task)
    check_method(method or "none")
    if method is not None and not trunk:
        raise typer.BadParameter("--method belongs to --trunk: a schedule has its method, an unpruned model none")
    found = load_device(device)
    check_precision(precision, found)
    runtime = found.runtime
    with output.progress() as progress:
        from edgeprune.vit.models import load_model

        overrides = overrides_from(crop_pct, interpolation, mean, std)
        loaded = load_model(model, weights, overrides, task, size_from(image_size), layers_from(layers))
        if trunk:
            from edgeprune.vit.profiling_models import export_profiling_models

            out = out if out != Path("model.onnx") else Path("probes")
            kind = onnx_precision(precision, runtime)
            export_profiling_models(loaded, (method or "none",), batch, out, kind, progress, runtime == "trt")
            path = out / "trunk.onnx"
        else:
            pictures = image_set(Options(model=model, images=images))
            progress("exporting ONNX", 0, 1)
            path = export_model(loaded, schedule, batch, out, precision, pictures, progress, runtime == "trt")
            progress("exporting ONNX", 1, 1)
    files = (path, *weights_of(path))
    output.tell(f"onnx: {' '.join(map(str, files))}", as_json)
    if as_json:
        size = sum(file.stat().st_size for file in files)
        output.json_line(
            {"model": model, "precision": precision, "batch": batch, "path": str(path), "size_bytes": size}
        )


@app.command(name="compile")
def compile_(
    onnx: Annotated[Path, typer.Argument(help="MODEL.onnx written by `edgeprune export`, or the one in a bundle")],
    device: Device = "cpu",
    dense: Annotated[Path | None, typer.Option(help="the unpruned model's ONNX, to measure the speed-up")] = None,
    images: Images = None,
    staircase: Annotated[
        Path | None, typer.Option(help="staircase.json of this device, to predict the latency")
    ] = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds of the measurement", min=5)] = 60,
    lock_clocks: LockClocks = False,
    work: Work = WORK,
    out: Annotated[Path | None, typer.Option(help="folder for the bundle")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile an ONNX file on the device, measure and check it, and write a bundle. Needs no torch."""
    from edgeprune.cli.rows import row_of
    from edgeprune.cli.tables import build_table
    from edgeprune.onnx_graph.graph import input_shape, load_graph, precision_of
    from edgeprune.pipeline.compile import Inputs, compile_onnx
    from edgeprune.runtimes.target import target_for

    graph = load_graph(onnx)
    with output.progress() as progress, output.clocks(device, lock_clocks):
        target = target_for(device, precision_of(graph), input_shape(graph)[0], False, work, progress)
        path, manifest = compile_onnx(target, Inputs(onnx, dense, images, staircase, rounds, out))
    output.show(build_table(manifest), as_json)
    output.tell(f"bundle: {path}", as_json)
    if as_json:
        output.json_line(row_of(manifest.engine.setup, manifest.schedule, manifest.report, path, manifest.recovery))

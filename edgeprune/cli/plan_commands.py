"""Commands that prepare a schedule: profile, schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import output
from edgeprune.cli.app import app
from edgeprune.cli.options import (
    Alpha,
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
    Policy,
    Precision,
    SearchImages,
    Simulate,
    Speedup,
    Std,
    Task,
    Weights,
    WholeLast,
    Work,
    goal_from,
    layers_from,
    overrides_from,
    size_from,
)
from edgeprune.defaults import WORK
from edgeprune.zoo import EMBEDDED


@app.command()
def profile(
    device: Device = "cpu",
    model: Model = EMBEDDED,
    weights: Weights = None,
    image_size: ImageSize = None,
    task: Task = None,
    layers: Layers = None,
    trunk: Annotated[Path | None, typer.Option(help="trunk.onnx of `export --trunk`; needs no torch")] = None,
    method: Annotated[str, typer.Option(help="also measure the cost of cuts by this method")] = "none",
    precision: Precision = "fp32",
    batch: Batch = 1,
    simulate: Simulate = False,
    lock_clocks: LockClocks = False,
    exhaustive: Exhaustive = False,
    host: OnHost = None,
    host_program: HostProgram = "edgeprune",
    work: Work = WORK,
    out: Annotated[Path, typer.Option(help="file for the staircase")] = Path("staircase.json"),
    as_json: AsJson = False,
) -> None:
    """Measure the latency staircase of a model: latency over token counts, and its treads."""
    from edgeprune.cli.rows import profile_row
    from edgeprune.cli.tables import profile_table
    from edgeprune.html_report.files import staircase_svg
    from edgeprune.io import check_replaceable, save, write_bytes
    from edgeprune.pipeline.context import check_task
    from edgeprune.pipeline.profile import profile as run
    from edgeprune.runtimes.remote.ssh import Host
    from edgeprune.runtimes.target import target_for

    check_task(task)
    if out.suffix == ".svg":
        raise typer.BadParameter(f"{out} is the file of the staircase; its plot is written beside it, as .svg")
    picture = out.with_suffix(".svg") if out.suffix == ".json" else out.with_name(f"{out.name}.svg")
    for path in (out, picture):
        check_replaceable(path)
    with output.progress() as progress, output.clocks(device, lock_clocks, host):
        there = Host(host, host_program) if host else None
        target = target_for(device, precision, batch, simulate, work, progress, there, lock_clocks)
        size, blocks = size_from(image_size), layers_from(layers)
        staircase = run(target, model, weights, trunk, method, exhaustive, size, blocks, task)
    save(staircase, out)
    write_bytes(picture, staircase_svg(staircase))
    output.show(profile_table(staircase), as_json)
    output.tell(f"staircase: {out}", as_json)
    if as_json:
        output.json_line(profile_row(staircase, out))


@app.command()
def schedule(
    staircase: Annotated[Path, typer.Argument(help="staircase.json written by `edgeprune profile`")],
    model: Model = EMBEDDED,
    weights: Weights = None,
    images: Images = None,
    image_size: ImageSize = None,
    task: Task = None,
    layers: Layers = None,
    head: HeadFile = None,
    method: Method = "fold",
    policy: Policy = "search",
    alpha: Alpha = None,
    speedup: Speedup = None,
    budget_ms: Budget = None,
    max_drop: MaxDrop = None,
    min_cosine: MinCosine = None,
    max_error: MaxError = None,
    block: Block = 3,
    whole_last: WholeLast = False,
    search_images: SearchImages = 128,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    work: Work = WORK,
    out: Annotated[Path, typer.Option(help="file for the schedule")] = Path("schedule.json"),
    as_json: AsJson = False,
) -> None:
    """Choose how many tokens each block keeps, from a staircase and pictures."""
    from edgeprune.cli.tables import runs
    from edgeprune.io import check_replaceable, save
    from edgeprune.pipeline.context import Options
    from edgeprune.pipeline.schedule import schedule_from_file

    check_replaceable(out)
    options = Options(
        model=model,
        weights=weights,
        images=images,
        image_size=size_from(image_size),
        method=method,
        policy=policy,
        goal=goal_from(alpha, speedup, budget_ms, max_drop, min_cosine, max_error),
        block=block,
        whole_last=whole_last,
        search_images=search_images,
        work=work,
        task=task,
        layers=layers_from(layers),
        head=head,
        overrides=overrides_from(crop_pct, interpolation, mean, std),
    )
    with output.progress() as progress:
        found, measured = schedule_from_file(staircase, options, progress)
    save(found, out)
    assert found.predicted_ms is not None
    dense_ms, simulated = measured.dense.median_ms, measured.setup.simulated
    note = " (SIMULATED)" if simulated else ""
    output.tell(f"tokens per block: {runs(found.tokens)}", as_json)
    output.tell(f"predicted: {found.predicted_ms:.3f} ms, {dense_ms / found.predicted_ms:.3f}x{note}", as_json)
    output.tell(f"schedule: {out}", as_json)
    if as_json:
        output.json_line(
            {
                "model": found.vit.name,
                "method": method,
                "policy": policy,
                "tokens": list(found.tokens),
                "predicted_ms": found.predicted_ms,
                "predicted_speedup": dense_ms / found.predicted_ms,
                "path": str(out),
            }
            | ({"simulated": True} if simulated else {})
        )

"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from edgeprune import console
from edgeprune.console import (
    Alpha,
    AsJson,
    Batch,
    Block,
    Budget,
    CropPct,
    Device,
    Exhaustive,
    HostProgram,
    Images,
    Interpolation,
    LockClocks,
    MaxDrop,
    Mean,
    Method,
    Model,
    OnHost,
    Policy,
    Precision,
    SearchImages,
    Simulate,
    Speedup,
    Std,
    Weights,
    WholeLast,
    Work,
)
from edgeprune.errors import EdgepruneError, HostError, VerifyError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune the tokens of timm Vision Transformers along the latency staircase of the target device.",
)

WORK = Path("engines/.work")
WORKER_WORK = Path("~/.cache/edgeprune")
EMBEDDED = "vit_digits"


def main() -> None:
    """Entry point: an EdgepruneError is one line on stderr and exit 1; Ctrl-C exits 130."""
    try:
        app()
    except EdgepruneError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:  # typer has met Ctrl-C
            typer.echo("interrupted: finished steps are kept, the same command goes on from there", err=True)
        raise


@app.command()
def build(
    device: Device = "cpu",
    model: Model = EMBEDDED,
    weights: Weights = None,
    images: Images = None,
    method: Method = "fold",
    policy: Policy = "search",
    alpha: Alpha = None,
    speedup: Speedup = None,
    budget_ms: Budget = None,
    max_drop: MaxDrop = None,
    precision: Precision = "fp32",
    batch: Batch = 1,
    block: Block = 3,
    whole_last: WholeLast = False,
    simulate: Simulate = False,
    lock_clocks: LockClocks = False,
    exhaustive: Exhaustive = False,
    search_images: SearchImages = 128,
    rounds: Annotated[int, typer.Option(help="interleaved rounds of the final measurement", min=5)] = 60,
    neighbours: Annotated[int, typer.Option(help="of the schedule that are built and compared", min=0)] = 3,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    host: OnHost = None,
    host_program: HostProgram = "edgeprune",
    work: Work = WORK,
    out: Annotated[Path | None, typer.Option(help="folder of the bundle")] = None,
    as_json: AsJson = False,
) -> None:
    """Model to bundle: staircase, schedule, ONNX, engine, measurement."""
    from edgeprune.job import Options
    from edgeprune.pipeline import build as run
    from edgeprune.report import build_table, row_of
    from edgeprune.ssh import Host

    options = Options(
        device=device,
        model=model,
        weights=weights,
        images=images,
        method=method,
        policy=policy,
        goal=console.goal(alpha, speedup, budget_ms, max_drop),
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
        overrides=console.overrides(crop_pct, interpolation, mean, std),
        host=Host(host, host_program) if host else None,
        lock_clocks=lock_clocks,
    )
    with console.progress() as progress, console.clocks(device, lock_clocks, host):
        built = run(options, progress)
    console.show(build_table(built.manifest), as_json)
    console.tell(f"bundle: {built.path}", as_json)
    if as_json:
        manifest = built.manifest
        console.json_line(row_of(manifest.engine.setup, manifest.schedule, manifest.report, built.path))


@app.command()
def profile(
    device: Device = "cpu",
    model: Model = EMBEDDED,
    weights: Weights = None,
    trunk: Annotated[Path | None, typer.Option(help="trunk.onnx of `export --trunk`: needs no torch")] = None,
    method: Method = "none",
    precision: Precision = "fp32",
    batch: Batch = 1,
    simulate: Simulate = False,
    lock_clocks: LockClocks = False,
    exhaustive: Exhaustive = False,
    host: OnHost = None,
    host_program: HostProgram = "edgeprune",
    work: Work = WORK,
    out: Annotated[Path, typer.Option(help="where the staircase goes")] = Path("staircase.json"),
    as_json: AsJson = False,
) -> None:
    """Measure the staircase of a model: latency over token counts, and its treads."""
    from edgeprune import profiling
    from edgeprune.html_report.files import staircase_svg
    from edgeprune.records import save, write_bytes
    from edgeprune.reducers import check_method
    from edgeprune.report import profile_row, profile_table
    from edgeprune.ssh import Host
    from edgeprune.target import alone, target_for

    check_method(method)
    with console.progress() as progress, console.clocks(device, lock_clocks, host):
        there = Host(host, host_program) if host else None
        target = target_for(device, precision, batch, simulate, work, progress, there, lock_clocks)
        with alone(work) if not simulate else nullcontext():
            if trunk is not None:
                staircase = profiling.staircase_of_folder(target, trunk, (method,), exhaustive)
            elif simulate:
                staircase = profiling.staircase_simulated(target, profiling.vit_of(model), exhaustive)
            else:
                from edgeprune.models import load_model

                loaded = load_model(model, weights)
                staircase = profiling.staircase_of_model(target, loaded, (method,), exhaustive)
    save(staircase, out)
    write_bytes(out.with_suffix(".svg"), staircase_svg(staircase))
    console.show(profile_table(staircase), as_json)
    console.tell(f"staircase: {out}", as_json)
    if as_json:
        console.json_line(profile_row(staircase, out))


@app.command()
def schedule(
    staircase: Annotated[Path, typer.Argument(help="staircase.json of `edgeprune profile`")],
    model: Model = EMBEDDED,
    weights: Weights = None,
    images: Images = None,
    method: Method = "fold",
    policy: Policy = "search",
    alpha: Alpha = None,
    speedup: Speedup = None,
    budget_ms: Budget = None,
    max_drop: MaxDrop = None,
    block: Block = 3,
    whole_last: WholeLast = False,
    search_images: SearchImages = 128,
    work: Work = WORK,
    out: Annotated[Path, typer.Option(help="where the schedule goes")] = Path("schedule.json"),
    as_json: AsJson = False,
) -> None:
    """Choose the tokens that each block keeps, from a staircase and pictures."""
    from edgeprune.job import Options
    from edgeprune.planning import schedule_from_file
    from edgeprune.records import save
    from edgeprune.report import runs

    options = Options(
        model=model,
        weights=weights,
        images=images,
        method=method,
        policy=policy,
        goal=console.goal(alpha, speedup, budget_ms, max_drop),
        block=block,
        whole_last=whole_last,
        search_images=search_images,
        work=work,
    )
    with console.progress() as progress:
        found, dense_ms = schedule_from_file(staircase, options, progress)
    save(found, out)
    assert found.predicted_ms is not None
    console.tell(f"tokens per block: {runs(found.tokens)}", as_json)
    console.tell(f"predicted: {found.predicted_ms:.3f} ms, {dense_ms / found.predicted_ms:.3f}x", as_json)
    console.tell(f"schedule: {out}", as_json)
    if as_json:
        console.json_line(
            {
                "model": found.vit.name,
                "method": method,
                "policy": policy,
                "tokens": list(found.tokens),
                "predicted_ms": found.predicted_ms,
                "predicted_speedup": dense_ms / found.predicted_ms,
                "path": str(out),
            }
        )


@app.command()
def export(
    model: Model = EMBEDDED,
    weights: Weights = None,
    schedule: Annotated[Path | None, typer.Option(help="schedule.json of `edgeprune schedule`")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="the unpruned model")] = False,
    trunk: Annotated[bool, typer.Option("--trunk", help="a folder of probes for `profile --trunk`")] = False,
    method: Method = "none",
    precision: Precision = "fp32",
    batch: Batch = 1,
    images: Images = None,
    out: Annotated[Path, typer.Option(help="ONNX file, or folder with --trunk")] = Path("model.onnx"),
    as_json: AsJson = False,
) -> None:
    """Export a pruned or unpruned model as ONNX in which every shape is static."""
    if (schedule is not None) + dense + trunk != 1:
        raise typer.BadParameter("pass exactly one of --schedule FILE, --dense and --trunk")
    from edgeprune.graph import weights_of
    from edgeprune.job import Options, pictures_of
    from edgeprune.pipeline import export_model
    from edgeprune.profiling import export_probes
    from edgeprune.target import check_batch, check_precision

    check_batch(batch)
    check_precision(precision)
    with console.progress() as progress:
        from edgeprune.models import load_model

        loaded = load_model(model, weights)
        progress("exporting", 0, 1)
        if trunk:
            out = out if out != Path("model.onnx") else Path("probes")
            export_probes(loaded, (method,), batch, out, precision)
            path = out / "trunk.onnx"
        else:
            pictures = pictures_of(Options(model=model, images=images))
            path = export_model(loaded, schedule, batch, out, precision, pictures, progress)
        progress("exporting", 1, 1)
    files = (path, *weights_of(path))
    console.tell(f"onnx: {' '.join(map(str, files))}", as_json)
    if as_json:
        size = sum(file.stat().st_size for file in files)
        console.json_line(
            {"model": model, "precision": precision, "batch": batch, "path": str(path), "size_bytes": size}
        )


@app.command(name="compile")
def compile_(
    onnx: Annotated[Path, typer.Argument(help="MODEL.onnx of `edgeprune export`, or in a bundle")],
    device: Device = "cpu",
    dense: Annotated[Path | None, typer.Option(help="the unpruned ONNX: measures the speed-up beside it")] = None,
    images: Images = None,
    staircase: Annotated[Path | None, typer.Option(help="this device's staircase.json, for the prediction")] = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds of the measurement", min=5)] = 60,
    lock_clocks: LockClocks = False,
    work: Work = WORK,
    out: Annotated[Path | None, typer.Option(help="folder of the bundle")] = None,
    as_json: AsJson = False,
) -> None:
    """ONNX to bundle on the device itself, without torch: compiled, measured, checked."""
    from edgeprune.compiling import Inputs, compile_onnx
    from edgeprune.graph import input_shape, load_graph, precision_of
    from edgeprune.report import build_table, row_of
    from edgeprune.target import target_for

    graph = load_graph(onnx)
    with console.progress() as progress, console.clocks(device, lock_clocks):
        target = target_for(device, precision_of(graph), input_shape(graph)[0], False, work, progress)
        path, manifest = compile_onnx(target, Inputs(onnx, dense, images, staircase, rounds, out))
    console.show(build_table(manifest), as_json)
    console.tell(f"bundle: {path}", as_json)
    if as_json:
        console.json_line(row_of(manifest.engine.setup, manifest.schedule, manifest.report, path))


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="folders that `edgeprune build` wrote")],
    rounds: Annotated[int, typer.Option(help="interleaved rounds", min=5)] = 60,
    baseline: Annotated[Path | None, typer.Option(help="earlier --out (or saved --json) to compare with")] = None,
    fail_slower: Annotated[
        float | None, typer.Option(help="exit 3 if slower than the baseline by more than this percentage", min=0)
    ] = None,
    summary: Annotated[Path | None, typer.Option(help="Markdown for the summary of a CI job")] = None,
    out: Annotated[Path | None, typer.Option(help="where the JSON goes, a baseline for later")] = None,
    lock_clocks: LockClocks = False,
    as_json: AsJson = False,
) -> None:
    """Measure bundles, interleaved, on this machine; exit 3 where one is slower than a baseline allows."""
    if fail_slower is not None and (baseline is None or not fail_slower < 1e6):
        raise typer.BadParameter("--fail-slower is a percentage over a stored bench: pass --baseline FILE too")
    import json

    from edgeprune.baseline import failure
    from edgeprune.bench import bench_bundles
    from edgeprune.records import write_bytes
    from edgeprune.summary import bench_markdown, bench_table

    with console.progress() as progress:
        result = bench_bundles(bundles, rounds, progress, baseline, lock_clocks)
    result["failed"] = None if fail_slower is None else failure(result["rows"], fail_slower)
    for path, text in (
        (out, json.dumps(result, allow_nan=False)),
        (summary, bench_markdown(result, result["failed"])),
    ):
        if path is not None:
            write_bytes(path, text.encode())
    console.show(bench_table(result), as_json)
    if as_json:
        console.json_line(result)
    if result["failed"] is not None:
        console.tell(f"failed: {result['failed']}", True)
        raise typer.Exit(3)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="folder that `edgeprune build` or `compile` wrote")],
    images: Annotated[list[Path], typer.Argument(help="pictures, or folders of them")],
    top: Annotated[int, typer.Option(help="classes told of each picture", min=1)] = 5,
    as_json: AsJson = False,
) -> None:
    """Classify pictures with a bundle's engine."""
    from edgeprune.infer import classify
    from edgeprune.report import run_table

    with console.progress() as progress:
        found = classify(bundle, images, top, progress)
    console.show(run_table(found), as_json)
    if as_json:
        console.json_line(found)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="folder that `edgeprune build` or `compile` wrote")],
    as_json: AsJson = False,
) -> None:
    """Check that a bundle is whole, belongs on this machine, and computes and times what it did."""
    from edgeprune.report import verify_table
    from edgeprune.verify import SIMULATED
    from edgeprune.verify import verify as run

    checks = run(bundle)
    failed = next((check for check in checks if check.status == "failed"), None)
    console.show(verify_table(str(bundle), checks), as_json)
    if as_json:
        result = {"bundle": str(bundle), "ok": failed is None, "checks": [check._asdict() for check in checks]}
        simulated = any(check.name == SIMULATED for check in checks)
        console.json_line(result | ({"simulated": True} if simulated else {}))
    if failed is not None:
        advice = f": {failed.advice}" if failed.advice else ""
        raise VerifyError(f"{bundle}: {failed.name}: expected {failed.expected}, found {failed.found}{advice}")


@app.command()
def ship(
    bundle: Annotated[Path | None, typer.Argument(help="folder that `edgeprune build` or `compile` wrote")] = None,
    to: Annotated[str | None, typer.Argument(help="USER@HOST:DIR")] = None,
    all_: Annotated[Path | None, typer.Option("--all", help="hosts.toml: several destinations at once")] = None,
    roll_back: Annotated[bool, typer.Option("--roll-back", help="switch to the version before instead")] = False,
    host_program: HostProgram = "edgeprune",
    as_json: AsJson = False,
) -> None:
    """Copy a bundle to devices over ssh, verify it there, and switch DIR/current to it."""
    from edgeprune import ship as shipping
    from edgeprune.report import ship_table

    if to is None and roll_back and bundle is not None:  # `ship --roll-back USER@HOST:DIR`
        bundle, to = None, str(bundle)
    if (to is None) == (all_ is None) or (bundle is None) != roll_back:
        raise typer.BadParameter("pass BUNDLE and USER@HOST:DIR, or --all hosts.toml; --roll-back takes no bundle")
    where = shipping.fleet(all_) if all_ else (shipping.destination(to or "", host_program),)
    with console.progress() as progress:
        if bundle is None:
            results = shipping.each(shipping.roll_back, where, progress)
        else:
            results = shipping.ship_all(bundle, where, progress)
    console.show(ship_table(results), as_json)
    if as_json:
        console.json_line({"rows": [result._asdict() for result in results]})
    failed = [result for result in results if result.state == "failed"]
    if failed:
        raise HostError(f"{len(failed)} of {len(results)} failed: {failed[0].to}: {failed[0].detail}")


@app.command(name="export-triton")
def export_triton(
    bundle: Annotated[Path, typer.Argument(help="folder that `edgeprune build` or `compile` wrote")],
    repository: Annotated[Path, typer.Argument(help="Triton model repository")],
    name: Annotated[str | None, typer.Option(help="of the model there")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a bundle's engine as an entry of a Triton model repository."""
    from edgeprune.triton import triton_entry

    path = triton_entry(bundle, repository, name)
    console.tell(f"triton: {path}", as_json)
    if as_json:
        console.json_line({"path": str(path)})


@app.command()
def compare(
    device: Device = "cpu",
    model: Model = EMBEDDED,
    weights: Weights = None,
    images: Images = None,
    methods: Annotated[str, typer.Option(help="separated by commas")] = "fold,pomt,tome,topk,evit,none",
    speedup: Annotated[str, typer.Option(help="targets, separated by commas")] = "1.25,1.5,2.0",
    precision: Precision = "fp32",
    batch: Batch = 1,
    simulate: Simulate = False,
    exhaustive: Exhaustive = False,
    whole_last: WholeLast = False,
    search_images: SearchImages = 128,
    rounds: Annotated[int, typer.Option(help="interleaved rounds of a measurement", min=5)] = 40,
    work: Work = WORK,
    plot: Annotated[Path | None, typer.Option(help="where the Pareto plot goes (.svg)")] = None,
    as_json: AsJson = False,
) -> None:
    """Methods side by side at equal measured latency, by the search and in their published shapes."""
    from edgeprune.compare import compare as run
    from edgeprune.html_report.files import compare_svg
    from edgeprune.job import Options
    from edgeprune.records import write_bytes
    from edgeprune.report import compare_rows, compare_table

    try:
        targets = [float(part) for part in speedup.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--speedup {speedup!r}: pass factors as 1.25,1.5,2.0") from None
    options = Options(
        device=device,
        model=model,
        weights=weights,
        images=images,
        precision=precision,
        batch=batch,
        work=work,
        simulate=simulate,
        exhaustive=exhaustive,
        whole_last=whole_last,
        search_images=search_images,
        rounds=rounds,
    )
    with console.progress() as progress:
        comparison = run(options, [name.strip() for name in methods.split(",")], targets, progress)
    rows = compare_rows(comparison)
    console.show(compare_table(rows), as_json)
    for method, policy, target, reason in comparison.missing:
        console.tell(f"not reached: {method}, {policy}, {target}x: {reason}", True)
    if plot is not None and rows:
        write_bytes(plot, compare_svg(rows))
        console.tell(f"plot: {plot}", as_json)
    if as_json:
        console.json_line({"rows": rows})


@app.command()
def report(
    bundle: Annotated[Path, typer.Argument(help="folder that `edgeprune build` wrote")],
    out: Annotated[Path | None, typer.Option(help="where the page goes; default: the one in the bundle")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="show it in the browser")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw the page of a bundle again from what the bundle holds, and say where it is."""
    from edgeprune.html_report.page import page_of_bundle

    path = page_of_bundle(bundle, out)
    console.tell(f"report: {path}", as_json)
    if as_json:
        console.json_line({"path": str(path)})
    if open_it:
        console.open_in_browser(path)


@app.command()
def devices(as_json: AsJson = False) -> None:
    """List the devices that edgeprune knows."""
    from edgeprune.report import device_rows, device_table

    rows = device_rows()
    console.show(device_table(rows), as_json)
    if as_json:
        console.json_line({"devices": rows})


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed here, what this machine is, and what would make its figures untrustworthy."""
    from edgeprune.doctor import examine
    from edgeprune.report import doctor_table

    findings = examine()
    console.show(doctor_table(findings), as_json)
    if as_json:
        console.json_line({"checks": [finding._asdict() for finding in findings]})


@app.command(hidden=True)
def worker(work: Annotated[Path, typer.Option(help="folder that keeps what was sent")] = WORKER_WORK) -> None:
    """The device's end of `--host`: speaks to a workstation over stdin and stdout."""
    import os

    from edgeprune.worker import serve

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    serve(sys.stdin.buffer, answers, work)


def _version(value: bool) -> None:
    if value:
        from edgeprune import __version__

        typer.echo(f"edgeprune {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()

"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.errors import EdgepruneError, InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune the tokens of timm Vision Transformers along the latency staircase of the target device.",
)

Device = Annotated[str, typer.Option(help="cpu, cuda, a Jetson (see `edgeprune devices`), or your own .toml")]
Model = Annotated[str, typer.Option(help="a timm VisionTransformer by name; default: the embedded one")]
Weights = Annotated[
    str | None, typer.Option(help="pretrained | embedded | FILE (.safetensors, or .pth with tensors only)")
]
Images = Annotated[
    Path | None, typer.Option(help="folder of class folders, CSV `image[,label]`, or folder of pictures")
]
Method = Annotated[str, typer.Option(help="how tokens are lost: fold | pomt | tome | evit | topk | none")]
Policy = Annotated[str, typer.Option(help="search: cuts in any blocks, by KL | paper: one block, by utility")]
Alpha = Annotated[float | None, typer.Option(help="weight of latency in the utility, 0 to 1", min=0, max=1)]
Speedup = Annotated[float | None, typer.Option(help="be at least this many times faster")]
Budget = Annotated[float | None, typer.Option("--budget-ms", help="take at most this many ms")]
MaxDrop = Annotated[float | None, typer.Option(help="lose at most these points of top-1", min=0)]
Precision = Annotated[str, typer.Option(help="fp32 | fp16 | int8")]
Batch = Annotated[int, typer.Option(help="images in one inference")]
WholeLast = Annotated[
    bool, typer.Option("--whole-last", help="compute the whole last block, though the head reads the prefix alone")
]
Work = Annotated[Path, typer.Option(help="folder that keeps finished steps")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")]
Simulate = Annotated[bool, typer.Option(help="latency from the device's tail-effect model, not from hardware")]
Exhaustive = Annotated[bool, typer.Option(help="probe every token count")]
Block = Annotated[int, typer.Option(help="block of the single cut (policy paper)", min=0)]
CropPct = Annotated[float | None, typer.Option(help="override the data config", min=0.05, max=1)]
Interpolation = Annotated[str | None, typer.Option(help="override the data config")]
Mean = Annotated[str | None, typer.Option(help="override the data config: r,g,b")]
Std = Annotated[str | None, typer.Option(help="override the data config: r,g,b")]
WORK = Path("engines/.work")
EMBEDDED = "vit_digits"


def main() -> None:
    """Entry point: an EdgepruneError is one line on stderr and exit 1; Ctrl-C exits 130."""
    try:
        app()
    except EdgepruneError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted: finished steps are kept, the same command goes on from there", err=True)
        sys.exit(130)


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
    exhaustive: Exhaustive = False,
    search_images: Annotated[int, typer.Option(help="pictures that the search compares schedules on", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="interleaved rounds of the final measurement", min=5)] = 60,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    work: Work = WORK,
    out: Annotated[Path | None, typer.Option(help="folder of the bundle")] = None,
    as_json: AsJson = False,
) -> None:
    """Model to bundle: staircase, schedule, ONNX, engine, measurement."""
    from edgeprune.job import Options
    from edgeprune.pipeline import build as run
    from edgeprune.report import build_table, row_of

    options = Options(
        device=device,
        model=model,
        weights=weights,
        images=images,
        method=method,
        policy=policy,
        goal=_goal(alpha, speedup, budget_ms, max_drop),
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
        overrides=_overrides(crop_pct, interpolation, mean, std),
    )
    with _progress() as progress:
        built = run(options, progress)
    _show(build_table(built.manifest), as_json)
    _tell(f"bundle: {built.path}", as_json)
    if as_json:
        _json(row_of(built.manifest, built.path))


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
    exhaustive: Exhaustive = False,
    work: Work = WORK,
    out: Annotated[Path, typer.Option(help="where the staircase goes")] = Path("staircase.json"),
    as_json: AsJson = False,
) -> None:
    """Measure the staircase of a model: latency over token counts, and its treads."""
    from edgeprune import profiling
    from edgeprune.records import save, write_bytes
    from edgeprune.report import profile_row, profile_table, staircase_svg
    from edgeprune.target import target_for

    with _progress() as progress:
        target = target_for(device, precision, batch, simulate, work, progress)
        if trunk is not None:
            staircase = profiling.staircase_of_folder(target, trunk, (method,), exhaustive)
        elif simulate:
            staircase = profiling.staircase_simulated(target, profiling.vit_of(model), exhaustive)
        else:
            from edgeprune.models import load_model

            loaded = load_model(model, weights)
            staircase = profiling.staircase_of_model(target, loaded, (method,), exhaustive)
    save(staircase, out)
    for plot in staircase_svg(staircase).values():
        write_bytes(out.with_suffix(".svg"), plot)
    _show(profile_table(staircase), as_json)
    _tell(f"staircase: {out}", as_json)
    if as_json:
        _json(profile_row(staircase, out))


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
    search_images: Annotated[int, typer.Option(help="pictures that schedules are compared on", min=1)] = 64,
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
        goal=_goal(alpha, speedup, budget_ms, max_drop),
        block=block,
        whole_last=whole_last,
        search_images=search_images,
        work=work,
    )
    with _progress() as progress:
        found, dense_ms = schedule_from_file(staircase, options, progress)
    save(found, out)
    assert found.predicted_ms is not None
    _tell(f"tokens per block: {runs(found.tokens)}", as_json)
    _tell(f"predicted: {found.predicted_ms:.3f} ms, {dense_ms / found.predicted_ms:.3f}x", as_json)
    _tell(f"schedule: {out}", as_json)
    if as_json:
        _json(
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
    batch: Batch = 1,
    out: Annotated[Path, typer.Option(help="ONNX file, or folder with --trunk")] = Path("model.onnx"),
    as_json: AsJson = False,
) -> None:
    """Export a pruned or unpruned model as ONNX in which every shape is static."""
    if (schedule is not None) + dense + trunk != 1:
        raise typer.BadParameter("pass exactly one of --schedule FILE, --dense and --trunk")
    from edgeprune.pipeline import export_model
    from edgeprune.profiling import export_probes

    with _progress() as progress:
        from edgeprune.models import load_model

        loaded = load_model(model, weights)
        progress("exporting", 0, 1)
        if trunk:
            out = out if out != Path("model.onnx") else Path("probes")
            export_probes(loaded, (method,), batch, out)
            path = out / "trunk.onnx"
        else:
            path = export_model(loaded, schedule, batch, out)
        progress("exporting", 1, 1)
    _tell(f"onnx: {path}", as_json)
    if as_json:
        _json({"model": model, "batch": batch, "path": str(path), "size_bytes": path.stat().st_size})


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="folders that `edgeprune build` wrote")],
    rounds: Annotated[int, typer.Option(help="interleaved rounds", min=5)] = 60,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of bundles, interleaved, on this machine."""
    from edgeprune.bench import bench_bundles
    from edgeprune.report import bench_table

    with _progress() as progress:
        rows = bench_bundles(bundles, rounds, progress)
    _show(bench_table(rows), as_json)
    if as_json:
        _json({"rows": rows})


@app.command()
def devices(as_json: AsJson = False) -> None:
    """List the devices that edgeprune knows."""
    from edgeprune.report import device_rows, device_table

    rows = device_rows()
    _show(device_table(rows), as_json)
    if as_json:
        _json({"devices": rows})


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed here, what this machine is, and what would make its figures untrustworthy."""
    from edgeprune.doctor import examine
    from edgeprune.report import doctor_table

    findings = examine()
    _show(doctor_table(findings), as_json)
    if as_json:
        _json({"checks": [finding._asdict() for finding in findings]})


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


def _goal(alpha: Any, speedup: Any, budget_ms: Any, max_drop: Any) -> Any:
    from edgeprune.schedule import Goal

    if sum(value is not None for value in (alpha, speedup, budget_ms, max_drop)) > 1:
        raise typer.BadParameter("pass at most one of --alpha, --speedup, --budget-ms and --max-drop")
    if speedup is not None and not 1 <= speedup < 1e6:
        raise typer.BadParameter("--speedup is a factor of at least 1")
    if budget_ms is not None and not 0 < budget_ms < 1e9:
        raise typer.BadParameter("--budget-ms is above 0")
    return Goal(alpha=alpha, speedup=speedup, budget_ms=budget_ms, max_drop=max_drop)


def _overrides(
    crop_pct: float | None, interpolation: str | None, mean: str | None, std: str | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if crop_pct is not None:
        found["crop_pct"] = crop_pct
    if interpolation is not None:
        found["interpolation"] = interpolation
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            try:
                values = tuple(float(part) for part in text.split(","))
            except ValueError:
                values = ()
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise InputError(f"--{name} {text!r}: pass three numbers as r,g,b")
            found[name] = values
    return found


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr and log lines beside it; no bar where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("edgeprune")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    try:
        with Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not sys.stderr.isatty()
        ) as bar:
            task = bar.add_task("starting", total=None)
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
    finally:
        logger.removeHandler(handler)


def _show(table: Any, as_json: bool) -> None:
    """A table for a person: on stdout, or on stderr where stdout is for a program."""
    from rich.console import Console

    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def _tell(line: str, as_json: bool) -> None:
    typer.echo(line, err=as_json)


def _json(row: dict[str, Any]) -> None:
    typer.echo(json.dumps(row, allow_nan=False))


if __name__ == "__main__":
    main()

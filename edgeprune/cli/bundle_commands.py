"""Commands on finished bundles: bench, run, verify, export-triton, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import output
from edgeprune.cli.app import app
from edgeprune.cli.options import AsJson, LockClocks
from edgeprune.errors import VerifyError


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="folders that `edgeprune build` wrote")],
    rounds: Annotated[int, typer.Option(help="interleaved rounds", min=5)] = 60,
    baseline: Annotated[Path | None, typer.Option(help="earlier result (--out or --json) to compare with")] = None,
    fail_slower: Annotated[
        float | None, typer.Option(help="exit with 3 if more than this percentage slower than the baseline", min=0)
    ] = None,
    summary: Annotated[Path | None, typer.Option(help="Markdown file for a CI job summary")] = None,
    out: Annotated[Path | None, typer.Option(help="write the result as JSON, for use as a baseline")] = None,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="measure wall time, including copies to and from the GPU")
    ] = False,
    lock_clocks: LockClocks = False,
    as_json: AsJson = False,
) -> None:
    """Time bundles side by side on this machine; exit 3 where one is slower than a baseline allows."""
    if fail_slower is not None and (baseline is None or not fail_slower < 1e6):
        raise typer.BadParameter("--fail-slower is a percentage above a baseline: pass --baseline FILE too")
    import json

    from edgeprune.benchmark.baseline import failure
    from edgeprune.benchmark.bench import bench_bundles
    from edgeprune.cli.rows import bench_row
    from edgeprune.cli.summary import bench_markdown, bench_table
    from edgeprune.io import check_replaceable, write_bytes

    for path in (out, summary):
        if path is not None:
            check_replaceable(path)
    with output.progress() as progress:
        measured = bench_bundles(bundles, rounds, progress, baseline, lock_clocks, end_to_end)
    failed = None if fail_slower is None else failure(measured, fail_slower)
    result = bench_row(measured) | {"failed": failed}
    if out is not None:
        write_bytes(out, json.dumps(result, allow_nan=False).encode())
    if summary is not None:
        write_bytes(summary, bench_markdown(measured, failed).encode())
    output.show(bench_table(measured), as_json)
    if as_json:
        output.json_line(result)
    if failed is not None:
        output.tell(f"failed: {failed}", True)
        raise typer.Exit(3)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="folder that `edgeprune build` or `compile` wrote")],
    images: Annotated[list[Path], typer.Argument(help="pictures, or folders of them")],
    top: Annotated[int, typer.Option(help="number of classes listed per image", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="folder for the outputs of each picture, PICTURE.npz")] = None,
    as_json: AsJson = False,
) -> None:
    """Run pictures through a bundle's engine: their likeliest classes, embeddings or dense features."""
    from edgeprune.bundles.predict import predict
    from edgeprune.cli.rows import predictions_row
    from edgeprune.cli.tables import run_table

    with output.progress() as progress:
        found = predict(bundle, images, top, progress, out, timed=True)
    output.show(run_table(found), as_json)
    if as_json:
        output.json_line(predictions_row(found))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="folder that `edgeprune build` or `compile` wrote")],
    as_json: AsJson = False,
) -> None:
    """Check that a bundle is complete, fits this machine and has its outputs; another latency is only a warning."""
    from edgeprune.bundles.verify import SIMULATED
    from edgeprune.bundles.verify import verify as run
    from edgeprune.cli.tables import verify_table

    checks = run(bundle)
    failed = next((check for check in checks if check.status == "failed"), None)
    output.show(verify_table(str(bundle), checks), as_json)
    if as_json:
        result = {"bundle": str(bundle), "ok": failed is None, "checks": [check._asdict() for check in checks]}
        simulated = any(check.name == SIMULATED for check in checks)
        output.json_line(result | ({"simulated": True} if simulated else {}))
    if failed is not None:
        advice = f": {failed.advice}" if failed.advice else ""
        raise VerifyError(f"{bundle}: {failed.name}: expected {failed.expected}, found {failed.found}{advice}")


@app.command(name="export-triton")
def export_triton(
    bundle: Annotated[Path, typer.Argument(help="folder that `edgeprune build` or `compile` wrote")],
    repository: Annotated[Path, typer.Argument(help="Triton model repository")],
    name: Annotated[str | None, typer.Option(help="name of the model in the repository")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a bundle's engine as an entry of a Triton model repository."""
    from edgeprune.bundles.triton import triton_entry

    path = triton_entry(bundle, repository, name)
    output.tell(f"triton: {path}", as_json)
    if as_json:
        output.json_line({"path": str(path)})


@app.command()
def report(
    bundle: Annotated[Path, typer.Argument(help="folder that `edgeprune build` wrote")],
    out: Annotated[Path | None, typer.Option(help="file to write; default: the page in the bundle")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="open it in the browser")] = False,
    as_json: AsJson = False,
) -> None:
    """Regenerate the HTML report of a bundle and print its path."""
    from edgeprune.html_report.page import page_of_bundle

    path = page_of_bundle(bundle, out)
    output.tell(f"report: {path}", as_json)
    if as_json:
        output.json_line({"path": str(path)})
    if open_it:
        output.open_in_browser(path)

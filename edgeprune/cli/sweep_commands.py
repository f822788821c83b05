"""The command `sweep`: many builds from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import output
from edgeprune.cli.app import app
from edgeprune.cli.options import AsJson, OnRay, Work
from edgeprune.defaults import ENGINES, WORK
from edgeprune.errors import SweepError


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="models, devices, goals and options")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and build nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="keep finished builds of an earlier run")] = False,
    max_failures: Annotated[
        int | None, typer.Option(help="stop once more builds than this have failed; default: never", min=0)
    ] = None,
    on_ray: OnRay = None,
    work: Work = WORK,
    out: Annotated[Path | None, typer.Option(help="folder for bundles, tables and the page")] = None,
    as_json: AsJson = False,
) -> None:
    """Build all combinations of models, devices, precisions, batches, methods and goals; write a table and a page."""
    from edgeprune.cli.live import live_rows
    from edgeprune.cli.rows import sweep_rows
    from edgeprune.cli.tables import plan_table, sweep_table
    from edgeprune.distributed.cluster import connected
    from edgeprune.html_report.sweep_page import sweep_html
    from edgeprune.io import write_bytes
    from edgeprune.sweeps.on_ray import Boards
    from edgeprune.sweeps.plan import boards_of, jobs_of
    from edgeprune.sweeps.run import InProcess, finished, run_sweep
    from edgeprune.sweeps.tables import write_tables

    jobs, place = jobs_of(file), out or ENGINES / "sweeps" / file.stem
    if dry_run:
        done = finished(jobs, place)
        boards = boards_of(jobs)
        output.show(plan_table(boards, done), as_json)
        line = f"{len(jobs)} builds on {len(boards)} boards; {len(done)} have a result that --resume reuses"
        output.tell(line, as_json)
        if as_json:
            plan = [{"job": job.name, "board": job.board, "reused": job.name in done} for job in jobs]
            output.json_line({"plan": plan})
        return
    with connected(on_ray) as cluster, live_rows(jobs) as live:
        executor = InProcess() if cluster is None else Boards(cluster)
        outcomes = run_sweep(jobs, executor, work, place, resume, max_failures, live.watch, live.ended)
    rows = sweep_rows(outcomes)
    files = write_tables(rows, place)
    page = place / "index.html"
    write_bytes(page, sweep_html(file.stem, rows).encode())
    output.show(sweep_table(rows), as_json)
    for path in (*files, page):
        output.tell(f"{path.suffix[1:]}: {path}", as_json)
    if as_json:
        output.json_line({"rows": rows})
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        first = failed[0]
        raise SweepError(
            f"{len(failed)} of {len(rows)} builds failed, the first is {first['job']} ({first['error']}): "
            "fix what the rows report, then run again with --resume"
        )

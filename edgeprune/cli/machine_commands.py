"""Commands about this machine: devices, doctor, worker."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import output
from edgeprune.cli.app import app
from edgeprune.cli.options import (
    AsJson,
)


@app.command()
def devices(as_json: AsJson = False) -> None:
    """List the devices that edgeprune supports."""
    from edgeprune.cli.rows import device_rows
    from edgeprune.cli.tables import device_table

    rows = device_rows()
    output.show(device_table(rows), as_json)
    if as_json:
        output.json_line({"devices": rows})


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check the installation and this machine for anything that makes latencies unreliable."""
    from edgeprune.cli.tables import doctor_table
    from edgeprune.devices.doctor import examine

    findings = examine()
    output.show(doctor_table(findings), as_json)
    if as_json:
        output.json_line({"checks": [finding._asdict() for finding in findings]})


WORKER_WORK = Path("~/.cache/edgeprune")


@app.command(hidden=True)
def worker(work: Annotated[Path, typer.Option(help="folder that keeps received files")] = WORKER_WORK) -> None:
    """The part of `--host` that runs on the device; talks to a workstation over stdin and stdout."""
    import os

    from edgeprune.runtimes.quiet import timing
    from edgeprune.runtimes.remote.worker import serve

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not mix with the answers
    serve(sys.stdin.buffer, answers, work, timing)

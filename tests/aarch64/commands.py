"""Runs commands of edgeprune one after another in this process, because an emulated Python starts slowly.

Reads a JSON list of argument lists from stdin; writes one JSON object per command, [exit code, stdout, stderr].
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from unittest import mock

from edgeprune.benchmark import bench, peak
from edgeprune.bundles import predict, verify
from edgeprune.cli import main
from edgeprune.latency import timing
from edgeprune.pipeline import measure

# An emulated inference takes 0.3 s, and its latency says nothing: fewer are timed than for users.
for module, name, value in (
    (timing, "WARMUP_S", 1.0),
    (timing, "WARMUP_MS", 20.0),
    (bench, "WARMUP_MS", 20.0),
    (measure, "WARMUP_MS", 20.0),
    (timing, "WINDOW", 1),
    (timing, "WARMUP", 1),
    (predict, "TIMED", 1),
    (verify, "TIMED", 2),
    (peak, "SIZES", (64,)),
    (peak, "RUNS", 3),
):
    assert hasattr(module, name), name
    setattr(module, name, value)


def run(argv: list[str]) -> tuple[int, str, str]:
    """One command: exit code, stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    arguments = mock.patch.object(sys, "argv", ["edgeprune", *argv])
    with arguments, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


for arguments in json.load(sys.stdin):
    print(json.dumps(run(arguments)), flush=True)

"""Defaults of options; imported by the command line before anything heavy."""

from __future__ import annotations

from pathlib import Path

ENGINES = Path("engines")  # of bundles
WORK = ENGINES / ".work"  # of finished steps
CALIB = Path("calib")  # of INT8 ranges, where the work folder is the default

REDUCERS = ("fold", "pomt", "tome", "topk", "evit")  # ways of removing tokens
METHODS = (*REDUCERS, "none")  # values of --method; `compare` runs all of them by default

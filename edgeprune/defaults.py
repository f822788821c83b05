"""Defaults of options; imported by the command line before anything heavy."""

from __future__ import annotations

from pathlib import Path

ENGINES = Path("engines")  # of bundles
WORK = ENGINES / ".work"  # of finished steps

REDUCERS = ("fold", "pomt", "tome", "topk", "evit")  # ways of removing tokens
METHODS = (*REDUCERS, "none")  # values of --method; `compare` runs all of them by default

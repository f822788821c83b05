"""Folders that are used unless the user names others; imported by the command line before anything heavy."""

from __future__ import annotations

from pathlib import Path

ENGINES = Path("engines")  # of bundles
WORK = ENGINES / ".work"  # of finished steps

"""Builds for a simulated Orin Nano choose and report what was stored; a change of the simulation stores anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.builds import Shared, exports_of, row_of
from support.paths import TESTS

CASES = [json.loads(line) for line in (TESTS / "golden" / "simulated_builds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case["args"], marks=() if "--search-images" in case["args"] else pytest.mark.slow)
        for case in CASES
    ],
)
def test_same_schedule_and_figures(
    case: dict[str, Any], shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the profiling models are from another build; those of batch 1 are the same for every device in fp32."""
    places = ("--work", exports_of(shared, tmp_path / "work"), "--out", tmp_path / "bundle")
    row = row_of(capsys, "build", "--device", "orin-nano", "--simulate", *case["args"].split(), *places)
    for key, value in case.items():
        if key != "args":
            near = pytest.approx(value, rel=1e-6, abs=1e-5) if isinstance(value, float | dict) else value
            assert row[key] == near, key

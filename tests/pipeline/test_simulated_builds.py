"""Builds of the embedded model for a simulated Orin Nano choose and report what they did before the move to packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.builds import call
from support.paths import TESTS

CASES = [json.loads(line) for line in (TESTS / "golden" / "simulated_builds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if "paper" in case["args"] else pytest.mark.slow) for case in CASES],
    ids=lambda case: case["args"],
)
def test_same_schedule_and_figures(case: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = ("--work", tmp_path / "work", "--out", tmp_path / "bundle", "--json")
    code = call("build", "--device", "orin-nano", "--simulate", *case["args"].split(), *work)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    for key, value in case.items():
        if key == "args":
            continue
        wanted = pytest.approx(value, rel=1e-6, abs=1e-5) if isinstance(value, float | dict) else value
        assert row[key] == wanted, key

"""Finished steps in the work folder: kept as long as their inputs, and the code that made them, stay the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune
from edgeprune.io import code_key
from edgeprune.runtimes.target import target_for

PLACE = """
from pathlib import Path
import edgeprune
from edgeprune.runtimes.target import target_for
assert Path(edgeprune.__file__).parent == Path.cwd() / "edgeprune"
print(target_for("orin-nano", simulate=True, work=Path("work")).work.file("model", ".onnx", "parts"))
"""


def test_edited_code_reuses_no_step(tmp_path: Path) -> None:
    """In a copy of the package: a reducer, a device and a file that no step is made by are edited in turn."""
    package = tmp_path / "edgeprune"
    shutil.copytree(Path(edgeprune.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def place() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", PLACE]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        ).stdout

    places = [place(), place()]
    for name in ("vit/reducers/topk.py", "devices/orin-nano.toml", "notes.css"):
        with open(package / name, "a") as file:
            file.write("\n# edited\n")
        places.append(place())
    assert places[0] == places[1] and places[3] == places[4]
    assert len({*places}) == 3


def test_finished_step_is_made_again_by_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, made = target_for("orin-nano", simulate=True, work=tmp_path), []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("done")

    for key in (code_key(), code_key(), "other code"):
        monkeypatch.setattr("edgeprune.runtimes.steps.code_key", lambda key=key: key)
        target.work.step("model", ".onnx", ("parts",), make)
    assert len(made) == len({*made}) == 2

"""Finished steps in the work folder: kept as long as their inputs, and the code that made them, stay the same."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from support.records import SETUP

import edgeprune
from edgeprune.devices import load_device
from edgeprune.errors import DeviceError, OutputError
from edgeprune.io import code_key
from edgeprune.runtimes.quiet import timing
from edgeprune.runtimes.steps import WorkFolder
from edgeprune.runtimes.target import check_fp8, check_precision, target_for

PLACE = """
from pathlib import Path
import edgeprune
from edgeprune.runtimes.target import target_for
assert Path(edgeprune.__file__).parent == Path.cwd() / "edgeprune"
print(target_for("orin-nano", simulate=True, work=Path("work")).work.file("model", ".onnx", "parts"))
"""


def test_edited_code_reuses_no_step(tmp_path: Path) -> None:
    """In a copy of the package: code, a device, templates and a file that makes no step are edited in turn."""
    package = tmp_path / "edgeprune"
    shutil.copytree(Path(edgeprune.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def place() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", PLACE]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        ).stdout

    places = [place(), place()]
    page = ("html_report/page.css", "html_report/sweep.html.j2")
    for name in ("vit/reducers/topk.py", "devices/orin-nano.toml", *page, "notes.txt"):
        with open(package / name, "a") as file:
            file.write("\n# edited\n")
        places.append(place())
    assert places[0] == places[1] and places[-2] == places[-1]
    assert len({*places}) == 5


def test_finished_step_is_made_again_by_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, made = target_for("orin-nano", simulate=True, work=tmp_path), []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("done")

    for key in (code_key(), code_key(), "other code"):
        monkeypatch.setattr("edgeprune.runtimes.steps.code_key", lambda key=key: key)
        target.work.step("model", ".onnx", ("parts",), make)
    assert len(made) == len({*made}) == 2


def test_a_lock_removes_what_was_left_in_its_own_folder_alone(tmp_path: Path) -> None:
    """The boards of a sweep work below the folder of plain builds, each with a lock of its own."""
    left = [tmp_path / ".samples.json.x.tmp", tmp_path / "profiling-models-1" / ".trunk.onnx.x.tmp"]
    in_use = tmp_path / "this-machine" / ".samples.json.x.tmp"
    for path in (*left, in_use):
        path.mkdir(parents=True)
    with WorkFolder(tmp_path).lock():
        assert not any(path.exists() for path in left) and in_use.exists()


def test_whatever_is_timed_on_this_machine_takes_turns(tmp_path: Path) -> None:
    """Two work folders have two locks, but one processor."""
    assert target_for("cpu", work=tmp_path).alone is timing
    assert target_for("orin-nano", simulate=True, work=tmp_path).alone is nullcontext


def test_a_work_folder_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    said = r"cannot be locked \(No locks .*\): pass a --work folder on a local disk"
    with pytest.raises(OutputError, match=said), WorkFolder(tmp_path).lock():
        pass


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (
            "orin-nano",
            "device orin-nano has no FP8: its compute capability is 8.7, FP8 needs 8.9: choose fp16 or int8",
        ),
        ("cpu", "device cpu has no FP8, which needs TensorRT: choose fp32, fp16 or int8"),
    ],
)
def test_fp8_is_refused_where_a_device_has_none(device: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=f"^{re.escape(reason)}$"):
        target_for(device, "fp8", simulate=device != "cpu", work=tmp_path)
    for other in ("jetson-thor", "h100"):
        assert target_for(other, "fp8", simulate=True, work=tmp_path).onnx_precision == "fp32"


@pytest.mark.parametrize(
    ("runtime", "version", "capability", "reason"),
    [
        ("trt", "8.6.2", "9.0", "TensorRT 8.6.2 has no FP8: install TensorRT 10 or later"),
        ("ort-cuda", "1.23.2", None, "ONNX Runtime has no FP8: install TensorRT 10"),
        ("trt", "10.3.0", "8.6", "its compute capability is 8.6"),
        ("trt", "10.13.3.9", "11.0", None),
        ("trt", "10.3.0", "8.9", None),
    ],
)
def test_fp8_is_refused_by_what_is_found_on_the_machine(
    runtime: str, version: str, capability: str | None, reason: str | None
) -> None:
    """As --device cuda, of which the device file says nothing, and over ssh."""
    setup = msgspec.structs.replace(
        SETUP, device="cuda", precision="fp8", runtime=runtime, runtime_version=version, compute_capability=capability
    )
    check_precision("fp8", load_device("cuda"))
    if reason is None:
        check_fp8(setup)
    else:
        with pytest.raises(DeviceError, match=reason):
            check_fp8(setup)
    check_fp8(msgspec.structs.replace(setup, precision="int8"))


def test_another_precision_of_a_target_is_as_if_asked_for(tmp_path: Path) -> None:
    first = target_for("h100", simulate=True, work=tmp_path)
    for precision in ("fp16", "int8", "fp8"):
        assert first.at(precision).setup == target_for("h100", precision, simulate=True, work=tmp_path).setup
    with pytest.raises(DeviceError, match="no FP8"):
        target_for("orin-nano", simulate=True, work=tmp_path).at("fp8")
    assert first.device.simulation is not None
    slow = msgspec.structs.replace(first.device.simulation, fma_per_clock_per_sm={"fp32": 128})
    device = msgspec.structs.replace(first.device, simulation=slow)
    with pytest.raises(DeviceError, match="no rate for 'int8'"):
        replace(first, device=device).at("int8")

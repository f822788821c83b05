"""The device half on an emulated aarch64 processor: Debian's Python for arm64 and the wheels that pip has for it.

QEMU runs the real machine code, so this shows that the packages load, that the commands work without torch, and that
the outputs are those of x86. It says nothing about speed or a GPU. tests/aarch64/setup.sh makes the Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
from support.builds import ONE_THREAD, Shared, few_digits, row_of
from support.loopback import Server
from support.paths import ROOT, TESTS

from edgeprune.bundles.format import GOLDEN, load_bundle
from edgeprune.errors import EngineError
from edgeprune.io import sha256_file
from edgeprune.runtimes.remote.ssh import Host
from edgeprune.runtimes.target import target_for

FOLDER = Path(os.environ.get("EDGEPRUNE_AARCH64") or Path(sys.prefix, "aarch64"))
PYTHON, MISSING = FOLDER / "python", FOLDER / "missing"
WHY = MISSING.read_text().strip() if MISSING.exists() else f"{FOLDER} is missing: tests/aarch64/setup.sh makes it"
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **ONE_THREAD}
TOLERANCE = 1e-4  # of logits, fp32: other instructions add in another order

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no emulated aarch64: {WHY}")


class Ran(NamedTuple):
    """The commands that ran there: the JSON object of each by its name, and the bundle that `compile` wrote."""

    rows: dict[str, Any]
    bundle: Path
    pictures: Path


def emulated(commands: Sequence[Sequence[object]], home: Path) -> list[tuple[int, str, str]]:
    """Commands of edgeprune in one emulated process: exit code, stdout and stderr of each."""
    done = subprocess.run(
        [PYTHON, TESTS / "aarch64" / "commands.py"],
        input=json.dumps([[str(part) for part in command] for command in commands]),
        env=ENVIRONMENT | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def ran(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """doctor, compile, verify, run and bench, on the ONNX of the build on x86."""
    folder = tmp_path_factory.mktemp("aarch64")
    table, bundle = few_digits(folder / "digits", 6), folder / "bundle"
    pictures = table.parent / "images"
    places = ("--work", folder / "work", "--out", bundle)
    commands: dict[str, tuple[object, ...]] = {
        "doctor": ("doctor",),
        "verify x86": ("verify", shared.bundle),
        "compile": ("compile", shared.bundle / "model.onnx", "--images", table, "--rounds", "5", *places),
        "verify": ("verify", bundle),
        "run": ("run", bundle, pictures, "--top", "3"),
        "bench": ("bench", bundle, "--rounds", "5"),
    }
    rows = {}
    said = emulated([(*command, "--json") for command in commands.values()], folder)
    for name, (code, out, err) in zip(commands, said, strict=True):
        assert code == 0, f"{name}: {err}"
        rows[name] = json.loads(out.splitlines()[-1])
    return Ran(rows, bundle, pictures)


def test_it_is_aarch64_without_torch(ran: Ran) -> None:
    checks = {check["name"]: check for check in ran.rows["doctor"]["checks"]}
    assert "aarch64" in checks["edgeprune"]["detail"]
    assert checks["torch"]["detail"].startswith("not installed")
    assert checks["onnxruntime"]["detail"] == version_there() != onnxruntime.__version__


def version_there() -> str:
    """The version of ONNX Runtime among the wheels for aarch64."""
    [found] = metadata.distributions(name="onnxruntime", path=[str(FOLDER / "site")])
    return found.version


def test_a_bundle_compiled_there_has_the_outputs_of_x86(ran: Ran, shared: Shared) -> None:
    here, there = load_bundle(shared.bundle), load_bundle(ran.bundle)
    assert there.engine.setup.runtime == "ort-cpu" and there.engine.setup.runtime_version == version_there()
    assert there.schedule == here.schedule and ran.rows["compile"]["images"] == 6
    (images, wanted), (same, found) = ([np.load(b / name) for name in GOLDEN] for b in (shared.bundle, ran.bundle))
    np.testing.assert_array_equal(same, images)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_bundles_verify_there(ran: Ran) -> None:
    """The one from x86, whose engine is the ONNX, too; its latency is of another setup."""
    for name in ("verify", "verify x86"):
        checks = {check["name"]: check["status"] for check in ran.rows[name]["checks"]}
        assert ran.rows[name]["ok"] and checks["files"] == checks["memory"] == checks["output"] == "ok"
        assert checks["runtime_version"] == ("ok" if name == "verify" else "warning")


def test_pictures_are_classified_as_on_x86(ran: Ran, shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoded, resized and normalised by the wheels for aarch64."""
    here = row_of(capsys, "run", shared.bundle, ran.pictures, "--top", "3")["rows"]
    there = ran.rows["run"]["rows"]
    assert len(there) == 6 and [row["image"] for row in there] == [row["image"] for row in here]
    for mine, other in zip(here, there, strict=True):
        assert [c["label"] for c in other["top"]] == [c["label"] for c in mine["top"]]
        assert [c["percent"] for c in other["top"]] == pytest.approx([c["percent"] for c in mine["top"]], abs=0.01)


def test_bench_there(ran: Ran) -> None:
    [row] = ran.rows["bench"]["rows"]
    assert row["setup"]["runtime_version"] == version_there() and len(row["samples_ms"]) == 5
    assert row["latency_ms"]["median"] > 0 and row["peak_gflop_per_s"] > 0


# ---- as a board behind ssh


@pytest.fixture
def board(there: Server, tmp_path: Path) -> Host:
    """The emulated Python as the `edgeprune` of the machine that answers ssh."""
    program = tmp_path / "edgeprune"
    variables = ENVIRONMENT | {"HOME": str(there.home)}
    settings = " ".join(f"{name}='{value}'" for name, value in variables.items())
    program.write_text(f'#!/bin/sh\n{settings} exec {PYTHON} -m edgeprune "$@"\n')
    program.chmod(0o755)
    return Host(there.address, str(program))


@pytest.mark.usefixtures("ssh")
def test_the_worker_behind_ssh(board: Host, shared: Shared, tmp_path: Path) -> None:
    """Files are sent, compiled, fetched, run and timed there; an error does not end the connection."""
    model = shared.bundle / "model.onnx"
    images = np.load(shared.bundle / GOLDEN[0])
    here, far = (target_for("cpu", work=tmp_path / name, host=host) for name, host in (("x86", None), ("arm", board)))
    assert far.setup.runtime_version == version_there() != here.setup.runtime_version
    free = far.runtime.free_bytes()
    assert free is not None and free > 1 << 20
    far.runtime.compile(model, far.setup, tmp_path / "engine.onnx")
    assert sha256_file(tmp_path / "engine.onnx") == sha256_file(model)
    with here.opener(model)() as a, far.opener(tmp_path / "engine.onnx")() as b:
        wanted = a.infer(images)
        np.testing.assert_allclose(b.infer(images), wanted, atol=TOLERANCE)
        assert b.time_ms() > 0
        with pytest.raises(EngineError, match="takes"):
            b.infer(images[:, :1])
        np.testing.assert_allclose(b.infer(images), wanted, atol=TOLERANCE)

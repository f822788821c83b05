"""The command line in and out of this process, the one measured build of a test session, and a few pictures."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from edgeprune import cli, zoo
from support import brief, processes

QUICK = ("--search-images", "4", "--rounds", "5", "--neighbours", "1")
# Test processes share the cores: one thread each, and none that spins while it waits.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "EDGEPRUNE_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
LATENCY = {"median": float, "p99": float, "low": float, "high": float}
CONTRACT: dict[str, Any] = {
    "bundle": str,
    "model": str,
    "device": str,
    "runtime": str,
    "precision": str,
    "batch": int,
    "method": str,
    "policy": str,
    "tokens": list,
    "latency_ms": LATENCY,
    "dense_latency_ms": LATENCY,
    "speedup": float,
    "predicted_ms": float,
    "agreement": float,
    "kl": float,
    "top1": float,
    "dense_top1": float,
    "images": int,
    "probes": int,
}
# Imports of torch and its kind fail, as where they are not installed.
WITHOUT_TORCH = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"torch", "timm", "torchvision", "onnxscript"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from edgeprune.cli import main
{brief.CODE}
main()
"""


class Shared(NamedTuple):
    """The one measured build of a test session."""

    bundle: Path
    work: Path
    command: tuple[str, ...]
    stdout: str
    stderr: str

    @property
    def row(self) -> dict[str, Any]:
        """What `--json` printed."""
        row: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return row


class Shallow(NamedTuple):
    """The first three blocks of the embedded model, which classify 99 % of the digits: a quick model to build."""

    model: str  # for --model; pictures have to be named too
    models: Path  # its profiling models: fp32, batch 1, cuts of topk

    def work(self, folder: Path) -> Path:
        """A work folder with these profiling models, to put into `folder`."""
        shutil.copytree(self.models, folder / self.models.name)
        return folder


def program(*argv: object) -> list[str]:
    """The command line in a process of its own."""
    return [sys.executable, "-m", "edgeprune", *map(str, argv)]


def start(*argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, run to its end."""
    environment = os.environ | options.pop("env", {})
    return subprocess.run(program(*argv), capture_output=True, text=True, timeout=900, env=environment, **options)


def without_torch(*argv: object) -> tuple[int, str, str]:
    """The command line in a process that cannot import torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout and stderr."""
    capsys.readouterr()
    arguments = mock.patch.object(sys, "argv", ["edgeprune", *map(str, argv)])
    with arguments, pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def row_of(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """The JSON object of a command that must succeed in this process."""
    code, out, err = call(capsys, *argv, "--json")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 1, out
    row: dict[str, Any] = json.loads(lines[0])
    return row


def shared_build(base: Path) -> Shared:
    """Build the embedded model once below `base`, in a process of its own; other test processes wait for it."""
    base = base / "shared"
    base.mkdir(exist_ok=True)
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        goal = ("--method", "pomt", "--alpha", "0.5")
        places = ("--work", str(base / "work"), "--out", str(base / "bundle"))
        command = ("build", "--device", "cpu", *goal, *QUICK, *places, "--json")
        said = base / "said.json"
        if not said.exists():
            code, out, err = processes.command(base, *command)
            assert code == 0, err
            said.write_text(json.dumps([out, err]))
        return Shared(base / "bundle", base / "work", command, *json.loads(said.read_text()))


def copied(shared: Shared, base: Path) -> Shared:
    """The build for a test process of its own: two may not work in one folder at a time."""
    old, new = str(shared.bundle.parent), str(base / "shared")
    shutil.copytree(old, new)
    command = tuple(part.replace(old, new) for part in shared.command)
    return Shared(
        Path(new, "bundle"),
        Path(new, "work"),
        command,
        shared.stdout.replace(old, new),
        shared.stderr.replace(old, new),
    )


def exports_of(shared: Shared, work: Path) -> Path:
    """A work folder with the profiling models of the shared build, none of its measurements."""
    models = min(
        shared.work.glob("profiling-models-*"), key=lambda folder: folder.stat().st_mtime
    )  # the first build's
    (work / models.name).mkdir(parents=True)
    for path in models.iterdir():
        if not path.name.startswith("trunk-"):  # the trunk at fixed token counts is made from trunk.onnx
            shutil.copy(path, work / models.name)
    return work


def shallow_model(base: Path) -> Shallow:
    """Write the shallow model and its profiling models once below `base`; other test processes wait for them."""
    base = base / "shallow"
    base.mkdir(exist_ok=True)
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "done").exists():
            processes.fork_and_join(processes.write_shallow, base / "shallow", base / "work")
            (base / "done").touch()
        [models] = (base / "work").glob("profiling-models-*")
        return Shallow(f"local-dir:{base / 'shallow'}", models)


def as_measured(bundle: Path, folder: Path) -> Path:
    """A copy of a simulated bundle that says it is of ONNX Runtime on a CPU."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engine"]["setup"]["runtime"] = "ort-cpu"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def few_digits(folder: Path, count: int = 21) -> Path:
    """Copy the first digits with their labels; the CSV."""
    source = zoo.images_dir()
    with open(source / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    (folder / "images").mkdir(parents=True)
    for row in rows:
        shutil.copy(source / row["image"], folder / row["image"])
    lines = ["image,label", *(f"{row['image']},{row['label']}" for row in rows)]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


def check_row(row: dict[str, Any], nullable: frozenset[str] = frozenset(), depth: int = 12) -> None:
    """Keys and types of the command contract; `depth` is the number of blocks."""
    for key, kind in CONTRACT.items():
        if row[key] is None:
            assert key in nullable, key
        elif isinstance(kind, dict):
            assert {k: type(v) for k, v in row[key].items()} == kind, key
        else:
            assert type(row[key]) is kind, key
    assert len(row["tokens"]) == depth
    assert row["tokens"] == sorted(row["tokens"], reverse=True)

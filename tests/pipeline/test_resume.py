"""kill -9 at any moment, two builds at once, a full disk, a read-only folder: nothing lost, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from support.builds import Shallow, Shared, call, exports_of, few_digits
from support.processes import FORKS, die_after_saves, die_at, exit_code, fork, measure_few, shallow_vit, started

from edgeprune.bundles.format import _replace, check_out, load_bundle
from edgeprune.errors import EdgepruneError
from edgeprune.io import load
from edgeprune.latency.staircase import SampleKey, Samples, trunk
from edgeprune.pipeline.context import Options
from edgeprune.records import Staircase
from edgeprune.scheduling.goals import Goal

KILLS = 20
SIMULATED = ("--device", "orin-nano", "--simulate", "--method", "none")


def whole(folder: Path) -> None:
    """Every file that shows is complete: bundles by their hashes, records and graphs because they can be read."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        if path.name == "manifest.json":
            load_bundle(path.parent)
        elif path.name.startswith("samples-"):
            msgspec.json.decode(path.read_bytes(), type=list[tuple[SampleKey, list[float]]])
        elif path.suffix == ".json":
            assert path.read_bytes().rstrip().endswith((b"}", b"]")) and json.loads(path.read_bytes()), path
        elif path.suffix == ".onnx":
            onnx.load(str(path), load_external_data=False)
        elif path.suffix == ".npy":
            np.load(path, allow_pickle=False)


def samples_in(work: Path) -> Samples:
    """What was measured of a staircase that is not finished."""
    found = list(work.glob("samples-*.json"))
    if not found:
        return {}
    pairs, _ = msgspec.json.decode(found[0].read_bytes(), type=tuple[list[tuple[SampleKey, list[float]]], Any])
    return dict(pairs)


@pytest.fixture
def build_in(shallow: Shallow, tmp_path: Path) -> Callable[[str], Options]:
    """build_in(name) are the options of a simulated build below that folder; "alone" has its profiling models."""
    few = few_digits(tmp_path / "digits")
    shallow.work(tmp_path / "alone" / "work")

    def options(name: str) -> Options:
        return Options(
            model=shallow.model, device="orin-nano", simulate=True, images=few, method="topk",
            goal=Goal(speedup=1.05), search_images=4, neighbours=0,
            work=tmp_path / name / "work", out=tmp_path / name / "bundle",
        )  # fmt: skip

    return options


def start_over(folder: Path) -> None:
    """A finished build goes on from the staircase."""
    shutil.rmtree(folder / "bundle")
    for path in (folder / "work").glob("staircase-*"):
        path.unlink()


def check_resumed(folder: Path, alone: Path) -> None:
    """A build that was killed again and again ends with the bundle of one that was left alone."""
    assert load_bundle(folder / "bundle") == load_bundle(alone / "bundle")
    assert not list((folder / "work").rglob(".*.tmp")), "what the killed left is swept up"


def test_killed_at_twenty_moments(build_in: Callable[[str], Options], tmp_path: Path) -> None:
    """While a file is written, before it takes its place and right after, from the first file to the bundle."""
    assert exit_code(build_in("alone")) == 0
    rng, folder = random.Random(0), tmp_path / "killed"
    for _ in range(KILLS):
        code = exit_code(build_in("killed"), die_at, rng.randrange(8))
        whole(folder)
        if code == 0:  # it was through before the event
            start_over(folder)
        else:
            assert code == -signal.SIGKILL
    assert exit_code(build_in("killed")) == 0
    check_resumed(folder, tmp_path / "alone")


@pytest.mark.slow
def test_killed_at_random_moments(build_in: Callable[[str], Options], tmp_path: Path) -> None:
    """Anywhere, not at the replacement of files alone."""
    assert exit_code(build_in("alone")) == 0
    rng, folder = random.Random(), tmp_path / "killed"
    for _ in range(KILLS):
        process = started(build_in("killed"))
        time.sleep(rng.uniform(0, 3))
        process.kill()
        process.join()
        if folder.exists():
            whole(folder)
        if process.exitcode == 0:
            start_over(folder)
    assert exit_code(build_in("killed")) == 0
    check_resumed(folder, tmp_path / "alone")


def test_no_probe_is_measured_twice(tmp_path: Path) -> None:
    """The samples that were saved when a process was killed are the first of those that it ends with."""
    work, rounds = tmp_path / "work", 12
    options = Options(model=shallow_vit(), method="none", images=few_digits(tmp_path / "digits"),
                      rounds=5, work=work, out=tmp_path / "bundle")  # fmt: skip
    before: Samples = {}
    for saves in (3, 6):
        assert exit_code(options, die_after_saves, rounds, saves) == -signal.SIGKILL
        now = samples_in(work)
        assert now
        for key, values in before.items():
            assert now[key][: len(values)] == values
        assert sum(map(len, now.values())) > sum(map(len, before.values()))
        before = now
    assert exit_code(options, measure_few, rounds) == 0
    [path] = (p for p in work.glob("staircase-*.json") if load(p, Staircase).probes)
    points = {trunk(p.tokens): list(p.latency.samples_ms) for p in load(path, Staircase).points}
    for key, values in before.items():
        if key.kind == "trunk":
            assert points[key._replace(stage=0)][: len(values)] == values


class Held:
    """Progress of a build that stops where it holds the work folder, until it may go on."""

    def __init__(self, work: Path) -> None:
        self.work, self.reached, self.go = work, FORKS.Event(), FORKS.Event()

    def __call__(self, *_: object) -> None:
        if (self.work / ".lock").exists() and not self.reached.is_set():
            self.reached.set()
            self.go.wait(300)


def held_build(options: Options, held: Held) -> None:
    from edgeprune.pipeline.build import build

    build(options, held)


def test_two_builds_at_once_do_not_disturb_each_other(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second fails in one line, the first goes on."""
    work = tmp_path / "work"
    shutil.copytree(shared.work, work)
    held = Held(work)
    options = Options(
        device="orin-nano", simulate=True, method="none", images=few_digits(tmp_path / "digits"),
        work=work, out=tmp_path / "a",
    )  # fmt: skip
    first = fork(held_build, options, held)
    try:
        assert held.reached.wait(300)
        for command in (("build", *SIMULATED), ("profile",), ("compile", shared.bundle / "model.onnx")):
            code, _, err = call(capsys, *command, "--work", work, "--out", tmp_path / "b")
            assert code == 1 and "another edgeprune is using" in err and not (tmp_path / "b").exists()
    finally:
        held.go.set()
        first.join()
    assert first.exitcode == 0
    load_bundle(tmp_path / "a")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_and_spares_what_is_there(
    shared: Shared, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both for the bundle and for the work folder; an earlier bundle stays as it was."""
    bundle = small / "bundle"
    shutil.copytree(shared.bundle, bundle)
    exports_of(shared, small / "work")
    before = load_bundle(bundle)
    (small / "ballast").write_bytes(b"\0" * (os.statvfs(small).f_bavail * os.statvfs(small).f_frsize - (64 << 10)))
    work, few = exports_of(shared, tmp_path / "work"), few_digits(tmp_path / "digits")
    for place in (("--work", work, "--out", bundle), ("--work", small / "work", "--out", tmp_path / "out")):
        code, _, err = call(capsys, "build", *SIMULATED, "--images", few, *place)
        assert code == 1, err
        assert "No space left on device" in err.splitlines()[-1] and "free some space" in err
        assert load_bundle(bundle) == before and not (tmp_path / "out").exists()
        assert not list(small.glob(".bundle*")), "half a bundle is left"


def test_a_read_only_folder_is_told(
    small: Path, shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shared.bundle, small / "bundle")
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    work, few = exports_of(shared, tmp_path / "work"), few_digits(tmp_path / "digits")
    for place in (
        ("--work", work, "--out", small / "bundle"),
        ("--work", small / "w", "--out", tmp_path / "o"),
    ):
        code, _, err = call(capsys, "build", *SIMULATED, "--images", few, *place)
        assert code == 1 and "Read-only file system" in err.splitlines()[-1], err
    load_bundle(small / "bundle")


def test_a_bundle_is_never_missing_while_it_is_replaced(shared: Shared, tmp_path: Path) -> None:
    """One step where the system can swap folders; what a kill between two renames leaves comes back."""
    out, fresh = tmp_path / "bundle", tmp_path / ".bundle.x.tmp"
    for place in (out, fresh):
        shutil.copytree(shared.bundle, place)
    (fresh / "new").write_text("")
    seen: list[bool] = []
    pid = os.fork()
    if pid == 0:
        until = time.monotonic() + 20
        while (out / "manifest.json").exists() and time.monotonic() < until and not (tmp_path / "done").exists():
            pass
        os._exit(0 if (tmp_path / "done").exists() else 1)
    for _ in range(200):
        _replace(fresh, out)
        seen.append((out / "new").exists())
    (tmp_path / "done").write_text("")
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the bundle was missing for a moment"
    assert seen == [True, False] * 100
    os.rename(out, tmp_path / ".bundle.y.old")
    check_out(out)
    load_bundle(out)
    with pytest.raises(EdgepruneError):
        load_bundle(fresh / "nothing")

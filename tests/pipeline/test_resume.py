"""kill -9 at any moment, two builds at once, a full disk, a read-only folder: nothing lost, nothing half-written."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from support.builds import ONE_THREAD, Shared, call, few_digits, program, start

from edgeprune.bundles.format import _replace, check_out, load_bundle
from edgeprune.errors import EdgepruneError
from edgeprune.io import load
from edgeprune.latency.staircase import SampleKey, Samples, trunk
from edgeprune.pipeline.build import build
from edgeprune.pipeline.context import Options
from edgeprune.records import Staircase
from edgeprune.scheduling.goals import Goal

KILLS = 20


FORKS = multiprocessing.get_context("forkserver")  # from a process that has loaded torch and never ran it
FORKS.set_forkserver_preload(["torch.onnx", "onnxscript", "onnxruntime", "timm", "edgeprune.pipeline.build"])


def quietly(options: Options) -> None:
    """A build that says nothing on stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    build(options)


def started(options: Options) -> Any:
    """A process of its own that builds."""
    process = FORKS.Process(target=quietly, args=(options,))
    process.start()
    return process


def finished(options: Options) -> bool:
    """Build in a process of its own, to its end."""
    process = started(options)
    process.join()
    return bool(process.exitcode == 0)


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
    return dict(msgspec.json.decode(found[0].read_bytes(), type=list[tuple[SampleKey, list[float]]])) if found else {}


def test_killed_at_twenty_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One build, killed again and again, ends with the bundle of one that was left alone."""
    for name, value in ONE_THREAD.items():
        monkeypatch.setenv(name, value)
    few = few_digits(tmp_path / "digits")

    def options(where: Path) -> Options:
        return Options(
            device="orin-nano", simulate=True, images=few, method="topk", goal=Goal(speedup=1.3), search_images=4,
            neighbours=0,
            work=where / "work", out=where / "bundle",
        )  # fmt: skip

    assert finished(options(tmp_path / "alone"))
    rng, kills = random.Random(0), 0
    while kills < KILLS:
        process = started(options(tmp_path / "killed"))
        time.sleep(rng.uniform(0, 3))
        process.kill()
        process.join()
        whole(tmp_path / "killed") if (tmp_path / "killed").exists() else None
        if process.exitcode == 0:  # it was through: once more, from the staircase on
            shutil.rmtree(tmp_path / "killed" / "bundle")
            for path in (tmp_path / "killed" / "work").glob("staircase-*"):
                path.unlink()
        kills += 1
    assert finished(options(tmp_path / "killed"))
    assert load_bundle(tmp_path / "killed" / "bundle") == load_bundle(tmp_path / "alone" / "bundle")
    assert not list((tmp_path / "killed" / "work").rglob(".*.tmp")), "what the killed left is swept up"


def test_no_probe_is_measured_twice(shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples that were saved when a process was killed are the first of those that it ends with."""
    for name, value in ONE_THREAD.items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    shutil.copytree(shared.work, work)
    for path in (*work.glob("staircase-*"), *work.glob("probed-*")):
        path.unlink()
    options = Options(method="none", rounds=5, work=work, out=tmp_path / "bundle")
    before: Samples = {}
    for moment in (3, 9):  # rounds
        process = started(options)
        while max(map(len, samples_in(work).values()), default=0) < moment:
            assert process.is_alive(), "it ended before it was killed"
            time.sleep(0.01)
        process.kill()
        process.join()
        now = samples_in(work)
        for name, values in before.items():
            assert now[name][: len(values)] == values
        before = now
    assert finished(options)
    [path] = (p for p in work.glob("staircase-*.json") if load(p, Staircase).probes)
    points = {trunk(p.tokens): list(p.latency.samples_ms) for p in load(path, Staircase).points}
    for key, values in before.items():
        if key.kind == "trunk":
            assert points[key._replace(stage=0)][: len(values)] == values


def test_two_builds_at_once_do_not_disturb_each_other(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second fails in one line, the first goes on."""
    work = tmp_path / "work"
    shutil.copytree(shared.work, work)
    for path in (*work.glob("staircase-*"), *work.glob("probed-*")):
        path.unlink()
    common = ("build", "--device", "cpu", "--method", "none", "--rounds", "5", "--work", work)
    first = subprocess.Popen(
        program(*common, "--out", tmp_path / "a"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | ONE_THREAD, text=True,
    )  # fmt: skip
    while not samples_in(work):
        assert first.poll() is None
        time.sleep(0.02)
    for command in (common, ("profile", "--work", work), ("compile", shared.bundle / "model.onnx", "--work", work)):
        code, _, err = call(capsys, *command, "--out", tmp_path / "b")
        assert code == 1 and "another edgeprune works in" in err and not (tmp_path / "b").exists()
    _, err = first.communicate(timeout=300)
    assert first.returncode == 0, err
    load_bundle(tmp_path / "a")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_and_spares_what_is_there(shared: Shared, small: Path, tmp_path: Path) -> None:
    """Both for the bundle and for the work folder; an earlier bundle stays as it was."""
    bundle = small / "bundle"
    shutil.copytree(shared.bundle, bundle)
    before = load_bundle(bundle)
    (small / "ballast").write_bytes(b"\0" * (os.statvfs(small).f_bavail * os.statvfs(small).f_frsize - (64 << 10)))
    work = tmp_path / "work"
    shutil.copytree(shared.work, work)
    common = ("build", "--device", "cpu", "--method", "none", "--rounds", "5")
    for place in (("--work", work, "--out", bundle), ("--work", small / "work", "--out", tmp_path / "out")):
        done = start(*common, *place)
        assert done.returncode == 1, done.stderr
        assert "No space left on device" in done.stderr.splitlines()[-1] and "free some space" in done.stderr
        assert "Traceback" not in done.stderr
        assert load_bundle(bundle) == before and not (tmp_path / "out").exists()
        assert not list(small.glob(".bundle*")), "half a bundle is left"
        shutil.rmtree(small / "work", ignore_errors=True)


def test_a_read_only_folder_is_told(small: Path, shared: Shared, tmp_path: Path) -> None:
    shutil.copytree(shared.bundle, small / "bundle")
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    for place in (
        ("--work", tmp_path / "work", "--out", small / "bundle"),
        ("--work", small / "w", "--out", tmp_path / "o"),
    ):
        done = start("build", "--device", "cpu", "--method", "none", *place)
        assert done.returncode == 1 and "Read-only file system" in done.stderr.splitlines()[-1], done.stderr
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

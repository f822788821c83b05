"""Records: what they refuse, how they are loaded and saved, and the statistics they compute."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import pytest

from edgeprune import io
from edgeprune.errors import OutputError, RecordError
from edgeprune.io import decode, key_of, load, read_bytes, replacing, save, write_bytes
from edgeprune.records import CutCost, Latency, Manifest, Schedule, Staircase, Vit
from edgeprune.stats import median_interval
from edgeprune.version import __version__

MakeVit = Callable[..., Vit]
MakeStaircase = Callable[..., Staircase]


@pytest.fixture
def staircase(make_staircase: MakeStaircase) -> Staircase:
    cost = CutCost(tokens_in=197, tokens_out=118, cost_ms=0.25)
    return make_staircase({100: [1.0, 1.5, 1.25], 197: (2.5, 2.0)}, cuts={"pomt": (cost,)})


@pytest.fixture
def schedule(make_vit: MakeVit) -> Schedule:
    tokens = (197,) * 3 + (120,) * 9
    return Schedule(vit=make_vit(), method="pomt", policy="paper", tokens=tokens, predicted_ms=1.5)


def test_round_trips(staircase: Staircase, schedule: Schedule, tmp_path: Path) -> None:
    for record in (staircase, schedule, schedule.vit, staircase.setup):
        save(record, tmp_path / "deep" / "record.json")
        assert load(tmp_path / "deep" / "record.json", type(record)) == record
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["record.json"]


def changed(record: Any, **fields: Any) -> bytes:
    """The JSON of a record with other fields; a dotted name leads inside."""
    content = msgspec.json.decode(io.encode(record))
    for name, value in fields.items():
        *way, last = name.split("__")
        inside = content
        for step in way:
            inside = inside[step]
        inside[last] = value
    return msgspec.json.encode(content)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"extra": 1}, "unknown field `extra`"),
        ({"vit__extra": 1}, r"unknown field `extra` - at `\$\.vit`"),
        ({"schema": 99}, "schema 99, not 1: use the version of edgeprune that wrote it"),
        ({"method": 3}, r"Expected `str`, got `int` - at `\$\.method`"),
        ({"tokens": [197] * 3 + [120] * 8}, "11 token counts for 12 blocks"),
        ({"tokens": [197] * 3 + [120] * 8 + [121]}, "tokens rise from 120 to 121 in block 11"),
        ({"tokens": [198] + [120] * 11}, "tokens rise from 197 to 198 in block 0"),
        ({"tokens": [197] * 11 + [1]}, "block 11 keeps 1, below prefix"),
        ({"vit__prefix": 197}, "prefix 197 must be below tokens 197"),
        ({"vit__depth": 0}, "sizes are 1 to"),
    ],
)
def test_bad_schedules_are_refused_by_their_fault(
    fields: dict[str, Any], reason: str, schedule: Schedule, tmp_path: Path
) -> None:
    path = tmp_path / "schedule.json"
    path.write_bytes(changed(schedule, **fields))
    with pytest.raises(RecordError, match=rf"schedule\.json: .*{reason}"):
        load(path, Schedule)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"points": []}, "points need ascending"),
        ({"vit__tokens": 198}, "points must include the unpruned count 198"),
        ({"fixed__samples_ms": []}, "at least one value"),
        ({"dense__samples_ms": [1.0, -1.0]}, "is not within"),
        ({"dense__samples_ms": [1.0, None]}, r"Expected `float`, got `null` - at `\$\.dense\.samples_ms\[1\]`"),
    ],
)
def test_bad_staircases_are_refused_by_their_fault(
    fields: dict[str, Any], reason: str, staircase: Staircase, tmp_path: Path
) -> None:
    path = tmp_path / "staircase.json"
    path.write_bytes(changed(staircase, **fields))
    with pytest.raises(RecordError, match=reason):
        load(path, Staircase)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b'{"schema": 1, "edgeprune": "99.0", "new": 1}',
            r"written by edgeprune 99\.0, which .* cannot read",
        ),
        (
            b'{"schema": 2, "edgeprune": "99.0", "new": 1}',
            r"schema 2, not 1: use .* that wrote it \(99\.0\)",
        ),
        (b'{"schema": 1, "edgeprune": "%s", "new": 1}' % __version__.encode(), "not a valid manifest file"),
        (b'{"schema": 1, "edgeprune": "\\u001b[2J", "new": 1}', "not a valid manifest file"),
        (b'{"new": 1}', "not a valid manifest file"),
    ],
)
def test_a_file_of_another_version_says_which(content: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        decode(content, Manifest, "manifest.json")


def test_order_of_points(staircase: Staircase) -> None:
    with pytest.raises(ValueError, match="ascending, distinct"):
        msgspec.structs.replace(staircase, points=staircase.points[::-1])
    with pytest.raises(ValueError, match="ascending, distinct"):
        msgspec.structs.replace(staircase, points=staircase.points + staircase.points[-1:])
    assert staircase.probes == 5


def test_unreadable_files(schedule: Schedule, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    whole = io.encode(schedule)
    for content in (b"", whole[: len(whole) // 2], b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(RecordError, match=r"schedule\.json: not a valid schedule file"):
            load(path, Schedule)
    for missing in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(RecordError, match="cannot be read"):
            load(missing, Schedule)
    path.write_bytes(b"x" * 11)
    with pytest.raises(RecordError, match="11 bytes, more than the 10 allowed"):
        read_bytes(path, limit=10)
    assert read_bytes(path, limit=11) == b"x" * 11


def test_cuts(make_vit: MakeVit) -> None:
    vit = make_vit(depth=4, tokens=10)
    for tokens, cuts in (((10, 10, 10, 10), ()), ((9, 9, 5, 5), (0, 2)), ((10, 10, 10, 2), (3,))):
        assert Schedule(vit=vit, method="pomt", policy="search", tokens=tokens).cuts == cuts


def test_setup_says_whether_it_is_simulated(staircase: Staircase) -> None:
    assert not staircase.setup.simulated
    assert msgspec.structs.replace(staircase.setup, runtime="simulated").simulated


def test_latency_statistics() -> None:
    latency = Latency(samples_ms=tuple(float(n) for n in range(100, 0, -1)))
    assert latency.median_ms == 50.5
    assert latency.p99_ms == pytest.approx(99.01)
    low, high = latency.interval_ms
    assert 39 <= low <= 42 and 59 <= high <= 62
    assert latency.summary() == {"median": 50.5, "p99": latency.p99_ms, "low": low, "high": high}
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([2.0, 1.0]) == (1.0, 2.0)


@pytest.mark.parametrize("n", [15, 30])
def test_median_interval_covers_the_median_about_95_times_in_100(n: int) -> None:
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.normal(5.0, 1.0, n).tolist()) for _ in range(400)]
    covered = np.mean([low <= 5.0 <= high for low, high in intervals])
    assert 0.92 <= covered <= 0.99


@pytest.mark.parametrize("n", [5, 15, 30, 60, 100])
def test_median_interval_treats_both_sides_alike(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    low, high = median_interval(values.tolist())
    assert median_interval((-values).tolist()) == (-high, -low)


def test_key_depends_on_every_part_and_on_no_order_of_keys(make_vit: MakeVit) -> None:
    vit = make_vit()
    assert key_of(vit, {"a": 1, "b": 2}) == key_of(vit, {"b": 2, "a": 1})
    keys = [key_of(vit, 1), key_of(vit, 2), key_of(make_vit(depth=11), 1), key_of(vit), key_of(vit, 1, None)]
    assert len(set(keys)) == 5 and all(len(key) == 16 for key in keys)


def content(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_place_that_cannot_be_written(schedule: Schedule, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "schedule.json", tmp_path / "file" / "deep" / "schedule.json"):
        with pytest.raises(OutputError, match=r"cannot be written .*: choose a folder you may write to"):
            save(schedule, path)
    assert content(tmp_path) == {"file": "in the way"}


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file(stop: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_bytes(path, b"old")
    with pytest.raises(stop), replacing(path) as temporary:
        temporary.write_text("half of the n")
        assert temporary.parent == path.parent
        raise stop
    assert content(tmp_path) == {"record.json": "old"}
    write_bytes(path, b"new")
    assert content(tmp_path) == {"record.json": "new"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "record.json"
    write_bytes(path, b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"record\.json: cannot be written .*: free some space"):
        write_bytes(path, b"new")
    assert content(tmp_path) == {"record.json": "old"}


def test_records_are_immutable(staircase: Staircase) -> None:
    with pytest.raises(AttributeError):
        staircase.setup.batch = 2  # type: ignore[misc]

"""SWEEP.toml as records: its keys, and the checks of their values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgeprune.errors import InputError, RecordError
from edgeprune.images import image_size
from edgeprune.io import read_bytes
from edgeprune.pipeline.context import check_counts, check_policy, check_task
from edgeprune.preprocessing import checked
from edgeprune.records import Record
from edgeprune.scheduling.goals import Goal
from edgeprune.vit.reducers import check_method

MAX_TOML_BYTES = 1 << 20


class ModelEntry(Record, frozen=True, kw_only=True):
    """A model, as the options of `build` name it."""

    name: str
    weights: str | None = None
    images: str | None = None  # instead of those of the sweep
    task: str | None = None
    image_size: int | str | tuple[int, int] | None = None  # as in --image-size
    layers: tuple[int, ...] = ()  # blocks, from 1, whose patch features are outputs
    head: str | None = None
    text_embeddings: str | None = None
    recover: bool | str | None = None  # instead of that of the sweep
    preprocessing: dict[str, Any] = msgspec.field(default_factory=dict)  # overrides, as in edgeprune.build


class DeviceEntry(Record, frozen=True, kw_only=True):
    """A device: simulated, this machine, or a board behind ssh."""

    name: str
    simulate: bool = False
    host: str | None = None  # USER@HOST; default: the hosts of this device in the file `hosts`
    program: str = "edgeprune"  # on that host
    precisions: tuple[str, ...] | None = None  # instead of those of the sweep
    batches: tuple[int, ...] | None = None


class GoalEntry(Record, frozen=True, kw_only=True):
    """One goal: exactly one of the fields."""

    alpha: float | None = None
    speedup: float | None = None
    budget_ms: float | None = None
    max_drop: float | None = None
    min_cosine: float | None = None
    max_error: float | None = None


class SweepFile(Record, frozen=True, kw_only=True):
    """SWEEP.toml. Paths are relative to its folder."""

    models: tuple[str | ModelEntry, ...]
    devices: tuple[str | DeviceEntry, ...]
    goals: tuple[GoalEntry, ...]
    precisions: tuple[str, ...] = ("fp32",)
    batches: tuple[int, ...] = (1,)
    methods: tuple[str, ...] = ("fold",)
    policy: str = "search"
    images: str | None = None
    recover: bool | str = False  # true: on half of the images; else a folder or CSV of pictures
    hosts: str | None = None  # a hosts.toml whose tables have a `device`
    search_images: int = 128
    rounds: int = 60
    neighbours: int = 3


def sweep_file(path: Path) -> SweepFile:
    """Read a SWEEP.toml. Raises InputError; for an unknown key RecordError, which names the nearest known one."""
    data = read_bytes(path, MAX_TOML_BYTES)
    try:
        table = msgspec.toml.decode(data)
        _check_keys(table, SweepFile, str(path))
        for key, kind in (("models", ModelEntry), ("devices", DeviceEntry), ("goals", GoalEntry)):
            for entry in table.get(key, ()) if isinstance(table.get(key), list) else ():
                if isinstance(entry, dict):
                    _check_keys(entry, kind, f"{path}, {key}")
        sweep = msgspec.convert(table, SweepFile)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not a sweep: {' '.join(str(error).split())}: see docs/sweep.md") from None
    _check(sweep, path)
    return sweep


def _check_keys(table: Mapping[str, Any], kind: type[Record], source: str) -> None:
    known = kind.__struct_fields__
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}: remove it"
            raise RecordError(f"{source}: unknown key {key!r}: {hint}")


def _check(sweep: SweepFile, path: Path) -> None:
    """Raise InputError for values that no build takes."""
    for name in ("models", "devices", "goals", "precisions", "batches", "methods"):
        if not getattr(sweep, name):
            raise InputError(f"{path}: {name} is empty: name at least one")
    for method in sweep.methods:
        check_method(method)
    check_policy(sweep.policy)
    for model in sweep.models:
        if isinstance(model, ModelEntry):
            check_task(model.task)
            image_size(model.image_size, f"{path}: image_size")
    try:
        for model in sweep.models:
            checked({} if isinstance(model, str) else model.preprocessing)
        for entry in sweep.goals:
            goal = Goal(**msgspec.structs.asdict(entry))
            goal.check()
            if goal == Goal():
                raise InputError("a goal is empty: write, for example, { speedup = 1.5 }")
        check_counts(sweep.search_images, sweep.rounds, sweep.neighbours)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None

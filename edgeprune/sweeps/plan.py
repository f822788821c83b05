"""SWEEP.toml as a list of builds, sorted by the board that each of them needs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from edgeprune import zoo
from edgeprune.bundles.ship import fleet
from edgeprune.devices import check_is_here, load_device
from edgeprune.errors import InputError, RecordError
from edgeprune.io import code_key, key_of, read_bytes, sha256_file
from edgeprune.pipeline.context import Options, check_counts, check_policy, check_task, image_set
from edgeprune.records import Record
from edgeprune.runtimes.remote.ssh import Host
from edgeprune.runtimes.target import check_batch, check_precision
from edgeprune.scheduling.goals import Goal
from edgeprune.vit.reducers import check_method

MAX_TOML_BYTES = 1 << 20
HERE = "this machine"
AUTO = "auto"  # precision: see pipeline/auto.py


class ModelEntry(Record, frozen=True, kw_only=True):
    """A model, as the options of `build` name it."""

    name: str
    weights: str | None = None
    images: str | None = None  # instead of those of the sweep
    task: str | None = None


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
    hosts: str | None = None  # a hosts.toml whose tables have a `device`
    search_images: int = 128
    rounds: int = 60
    neighbours: int = 3


class Job(Record, frozen=True, kw_only=True):
    """One build of a sweep."""

    name: str  # of its folder, below that of the sweep
    model: ModelEntry
    device: str
    board: str
    precision: str
    batch: int
    method: str
    policy: str
    goal: Goal
    simulate: bool
    host: Host | None
    images: str | None
    search_images: int
    rounds: int
    neighbours: int

    def options(self, work: Path, out: Path) -> Options:
        """The options of the build; boards have work folders of their own, so that they can work side by side."""
        model = self.model
        return Options(
            device=self.device,
            model=model.name,
            weights=model.weights,
            task=model.task,
            images=Path(self.images) if self.images else None,
            method=self.method,
            policy=self.policy,
            goal=self.goal,
            precision=self.precision,
            batch=self.batch,
            simulate=self.simulate,
            host=self.host,
            search_images=self.search_images,
            rounds=self.rounds,
            neighbours=self.neighbours,
            work=work / re.sub(r"[^\w.-]", "-", self.board),
            out=out / self.name,
        )

    def key(self) -> str:
        """Hash of all that the result depends on: build, code, pictures, local weights. Raises ImageError."""
        pictures = image_set(Options(model=self.model.name, images=Path(self.images) if self.images else None))
        return key_of(code_key(), self, pictures.key() if pictures else None, *map(_local, self.model_files()))

    def model_files(self) -> list[Path]:
        """Files on this machine that the model is read from."""
        places = [self.model.weights, self.model.name.partition(":")[2] or self.model.name]
        found = [Path(place) for place in places if place]
        return sorted(f for p in found for f in ([p] if p.is_file() else p.glob("*")) if f.is_file())


def jobs_of(path: Path) -> tuple[Job, ...]:
    """All builds of a SWEEP.toml. Raises InputError, DeviceError for a board that is not there."""
    sweep, folder = sweep_file(path), path.parent
    models = [ModelEntry(name=m) if isinstance(m, str) else m for m in sweep.models]
    devices = [DeviceEntry(name=d) if isinstance(d, str) else d for d in sweep.devices]
    _check(sweep, path)
    jobs: list[Job] = []
    for model, device in product(models, devices):
        check_task(model.task)
        precisions, batches = device.precisions or sweep.precisions, device.batches or sweep.batches
        hosts = _hosts(device, folder / sweep.hosts if sweep.hosts else None)
        for turn, (precision, batch) in enumerate(product(precisions, batches)):
            check_batch(batch)
            if precision != AUTO:
                check_precision(precision, load_device(device.name))
            host = hosts[(models.index(model) + turn) % len(hosts)] if hosts else None
            board = f"{device.name} at {host.address}" if host else f"{device.name}, simulated"
            for method, goal in product(sweep.methods, sweep.goals):
                images = model.images or sweep.images
                jobs.append(
                    Job(
                        name="/".join(
                            (device.name, _short(model), f"{method}-{precision}-b{batch}-{_goal_name(goal)}")
                        )
                        + ("-simulated" if device.simulate else ""),
                        model=_located(model, folder),
                        device=_place(device.name, folder) if device.name.endswith(".toml") else device.name,
                        board=board if host or device.simulate else HERE,
                        precision=precision,
                        batch=batch,
                        method=method,
                        policy=sweep.policy,
                        goal=Goal(**msgspec.structs.asdict(goal)),
                        simulate=device.simulate,
                        host=host,
                        images=_place(images, folder) if images else None,
                        search_images=sweep.search_images,
                        rounds=sweep.rounds,
                        neighbours=sweep.neighbours,
                    )
                )
    if len({job.name for job in jobs}) < len(jobs):
        raise InputError(f"{path}: a model, device or goal appears twice: remove one of the two")
    return tuple(jobs)


def boards_of(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """The builds of each board, those of the same model one after another, because they share a staircase."""
    boards: dict[str, list[Job]] = {}
    for job in jobs:
        boards.setdefault(job.board, []).append(job)
    return boards


def sweep_file(path: Path) -> SweepFile:
    """Read a SWEEP.toml. Raises RecordError, which names an unknown key and the nearest known one."""
    data = read_bytes(path, MAX_TOML_BYTES)
    try:
        table = msgspec.toml.decode(data)
        _check_keys(table, SweepFile, str(path))
        for key, kind in (("models", ModelEntry), ("devices", DeviceEntry), ("goals", GoalEntry)):
            for entry in table.get(key, ()) if isinstance(table.get(key), list) else ():
                if isinstance(entry, dict):
                    _check_keys(entry, kind, f"{path}, {key}")
        return msgspec.convert(table, SweepFile)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not a sweep: {' '.join(str(error).split())}: see docs/sweep.md") from None


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
    try:
        for entry in sweep.goals:
            goal = Goal(**msgspec.structs.asdict(entry))
            goal.check()
            if goal == Goal():
                raise InputError("a goal is empty: write, for example, { speedup = 1.5 }")
        check_counts(sweep.search_images, sweep.rounds, sweep.neighbours)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _hosts(device: DeviceEntry, hosts: Path | None) -> list[Host]:
    """The boards of a device behind ssh; none for a simulated one and for this machine. Raises DeviceError."""
    if device.simulate:
        if device.host is not None:
            raise InputError(f"device {device.name}: simulate needs no host: remove one of the two")
        return []
    if device.host is not None:
        return [Host(device.host, device.program)]
    listed = [to for to in fleet(hosts) if to.device == device.name] if hosts else []
    if not listed:
        check_is_here(load_device(device.name))
    return [Host(to.host, to.program) for to in listed]


def _goal_name(goal: GoalEntry) -> str:
    [(name, value)] = ((k, v) for k, v in msgspec.structs.asdict(goal).items() if v is not None)
    return f"{name.replace('_', '-')}-{value:g}"


def _short(model: ModelEntry) -> str:
    """The name of a model as a folder; two entries of one model differ by their weights."""
    name = Path(model.name.rpartition(":")[2]).name
    return f"{name}-{Path(model.weights).stem}" if model.weights and _is_file(model.weights) else name


def _is_file(weights: str) -> bool:
    return weights not in ("pretrained", "embedded", "random")


def _located(model: ModelEntry, folder: Path) -> ModelEntry:
    """The entry with its files found from the folder of the sweep."""
    weights = _place(model.weights, folder) if model.weights and _is_file(model.weights) else model.weights
    name = _place(model.name, folder) if model.name != zoo.EMBEDDED and (folder / model.name).is_dir() else model.name
    return msgspec.structs.replace(model, weights=weights, name=name)


def _place(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())


def _local(path: Path) -> tuple[str, str]:
    return path.name, sha256_file(path)

"""SWEEP.toml as a list of builds, sorted by the board that each of them needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import msgspec

from edgeprune import zoo
from edgeprune.bundles.ship import fleet
from edgeprune.devices import check_is_here, load_device
from edgeprune.errors import InputError
from edgeprune.images import image_size, load_images
from edgeprune.io import code_key, key_of, sha256_file
from edgeprune.onnx_graph.graph import weights_of
from edgeprune.pipeline.context import Options, image_set
from edgeprune.records import Record
from edgeprune.runtimes.remote.ssh import Host
from edgeprune.runtimes.target import check_batch, check_precision
from edgeprune.scheduling.goals import Goal
from edgeprune.sweeps.file import DeviceEntry, GoalEntry, ModelEntry, sweep_file
from edgeprune.vit import hugging_face

HERE = "this machine"
TOML = ".toml"  # the end of the name of a device with a file of its own
AUTO = "auto"  # precision: see pipeline/auto.py
LOCAL = ("local-dir", "local_dir")  # prefixes of timm's names for a folder


class Job(Record, frozen=True, kw_only=True):
    """One build of a sweep."""

    name: str  # of its folder, below that of the sweep
    label: str  # the model and what tells it from others of its name
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
            image_size=image_size(model.image_size),
            layers=model.layers,
            head=Path(model.head) if model.head else None,
            text_embeddings=Path(model.text_embeddings) if model.text_embeddings else None,
            overrides=model.preprocessing,
            recover=Path(model.recover) if isinstance(model.recover, str) else bool(model.recover),
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
        """Hash of all that the result depends on: build, code, pictures, local files. Raises ImageError."""
        pictures = image_set(Options(model=self.model.name, images=Path(self.images) if self.images else None))
        sets, training = [pictures] if pictures else [], self.model.recover
        if isinstance(training, str):
            sets.append(load_images(Path(training), "recover", anywhere=True))
        own = [Path(self.device)] if self.device.endswith(TOML) else []
        return key_of(code_key(), self, [each.key() for each in sets], *map(_local, own + self.model_files()))

    def model_files(self) -> list[Path]:
        """Files on this machine that the model and what belongs to it are read from."""
        model = self.model
        kind, _, folder = model.name.partition(":")
        places = [model.weights, folder if kind in LOCAL else model.name, model.head, model.text_embeddings]
        found = [Path(place) for place in places if place and Path(place).is_absolute()]
        found += [Path(model.weights).parent / "config.json"] if model.weights and _is_file(model.weights) else []
        if model.head:
            found += weights_of(Path(model.head)) if Path(model.head).is_file() else []
        return sorted(f for p in found for f in ([p] if p.is_file() else p.glob("*")) if f.is_file())


def jobs_of(path: Path) -> tuple[Job, ...]:
    """All builds of a SWEEP.toml. Raises InputError, DeviceError for a board that is not there."""
    sweep, folder = sweep_file(path), path.parent
    models = [ModelEntry(name=m) if isinstance(m, str) else m for m in sweep.models]
    entries = [DeviceEntry(name=d) if isinstance(d, str) else d for d in sweep.devices]
    devices = [msgspec.structs.replace(entry, name=_device(entry.name, folder)) for entry in entries]
    jobs: list[Job] = []
    places = [_located(model, folder, sweep.recover) for model in models]
    for (model, located, label), device in product(zip(models, places, labels_of(places), strict=True), devices):
        known = Path(device.name).stem
        precisions, batches = device.precisions or sweep.precisions, device.batches or sweep.batches
        hosts = _hosts(device, Path(_place(sweep.hosts, folder)) if sweep.hosts else None)
        for turn, (precision, batch) in enumerate(product(precisions, batches)):
            check_batch(batch)
            if precision != AUTO:
                check_precision(precision, load_device(device.name))
            host = hosts[(models.index(model) + turn) % len(hosts)] if hosts else None
            board = host.address if host else f"{known}, simulated"
            for method, goal in product(sweep.methods, sweep.goals):
                images = model.images or sweep.images
                jobs.append(
                    Job(
                        label=label,
                        name="/".join((known, label, f"{method}-{precision}-b{batch}-{_goal_name(goal)}"))
                        + ("-simulated" if device.simulate else ""),
                        model=located,
                        device=device.name,
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
        twice = next(name for name, count in Counter(job.name for job in jobs).items() if count > 1)
        raise InputError(f"{path}: {twice} appears twice: remove one of the two, or rename a device's file")
    return tuple(jobs)


def boards_of(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """The builds of each board, those of the same model one after another, because they share a staircase."""
    boards: dict[str, list[Job]] = {}
    for job in jobs:
        boards.setdefault(job.board, []).append(job)
    return boards


def _hosts(device: DeviceEntry, hosts: Path | None) -> list[Host]:
    """The boards of a device behind ssh; none for a simulated one and for this machine. Raises DeviceError."""
    if device.simulate:
        if device.host is not None:
            raise InputError(f"device {device.name}: simulate needs no host: remove one of the two")
        return []
    if device.host is not None:
        return [Host(device.host, device.program)]
    listed = [to for to in fleet(hosts) if _device(to.device or "", hosts.parent) == device.name] if hosts else []
    if not listed:
        check_is_here(load_device(device.name))
    return [Host(to.host, to.program) for to in listed]


def _goal_name(goal: GoalEntry) -> str:
    [(name, value)] = ((k, v) for k, v in msgspec.structs.asdict(goal).items() if v is not None)
    return f"{name.replace('_', '-')}-{value:g}"


def labels_of(models: Sequence[ModelEntry]) -> list[str]:
    """A label for each entry; those of different files of the same name end in a hash of their paths."""
    labels = [label_of(model) for model in models]
    return [
        f"{label}-{key_of(model)[:6]}"
        if any(a == label and b != model for a, b in zip(labels, models, strict=True))
        else label
        for label, model in zip(labels, models, strict=True)
    ]


def label_of(model: ModelEntry) -> str:
    """The name of a model as a folder, and what else its entry has: entries of one model differ by it."""
    parts = [Path(model.name.rpartition(":")[2]).name]
    parts += [Path(model.weights).stem] if model.weights and _is_file(model.weights) else []
    parts += [model.task] if model.task else []
    parts += ["x".join(map(str, size))] if (size := image_size(model.image_size)) else []
    parts += ["-".join(("layers", *map(str, model.layers)))] if model.layers else []
    parts += [Path(file).stem for file in (model.head, model.text_embeddings) if file]
    parts += [re.sub(r"[^\w.]+", "-", f"{key} {value}").strip("-") for key, value in model.preprocessing.items()]
    parts += ["recovered"] if model.recover else []
    return "-".join(parts)


def _is_file(weights: str) -> bool:
    return weights not in ("pretrained", "embedded", "random")


def _located(model: ModelEntry, folder: Path, recover: bool | str) -> ModelEntry:
    """The entry with its files found from the folder of the sweep, and with the sweep's `recover` if it has none."""
    kind, _, place = model.name.partition(":")
    name = model.name
    if kind in LOCAL:
        name = f"{kind}:{_place(place, folder)}"
    elif name != zoo.EMBEDDED and hugging_face.is_folder(name, folder):
        name = _place(name, folder)
    recover = recover if model.recover is None else model.recover
    return msgspec.structs.replace(
        model,
        name=name,
        weights=_place(model.weights, folder) if model.weights and _is_file(model.weights) else model.weights,
        head=_place(model.head, folder) if model.head else None,
        text_embeddings=_place(model.text_embeddings, folder) if model.text_embeddings else None,
        recover=_place(recover, folder) if isinstance(recover, str) else recover,
    )


def _device(name: str, folder: Path) -> str:
    """A device as in --device; a file of its own is found from `folder`."""
    return _place(name, folder) if name.endswith(TOML) else name


def _place(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())


def _local(path: Path) -> tuple[str, str]:
    return path.name, sha256_file(path)

"""Model to bundle: staircase, schedule, ONNX, engine, measurement. What the work folder holds is not redone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeprune import export, measure, zoo
from edgeprune.bundle import MANIFEST, load_bundle, write_bundle
from edgeprune.errors import EdgepruneError, ExportError, InputError
from edgeprune.images import ImageSet, load_images, load_pixels, normalise
from edgeprune.measure import Samples
from edgeprune.profiling import export_probes, staircase_of_model
from edgeprune.records import (
    Engine,
    Latency,
    Manifest,
    Progress,
    Report,
    Schedule,
    Staircase,
    encode,
    load,
    replacing,
    save,
    sha256_file,
    silent,
    write_bytes,
)
from edgeprune.report import staircase_svg
from edgeprune.schedule import (
    PAPER_BLOCK,
    Goal,
    choose,
    finished,
    paper_schedule,
    single_cut_front,
)
from edgeprune.staircase import predict_ms
from edgeprune.target import WORK, Target, target_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeprune.fidelity import Evaluator
    from edgeprune.models import Model

log = logging.getLogger(__name__)

ENGINES = Path("engines")
ROUNDS = 60
CORRECTIONS = 2  # times a schedule whose measured latency misses the goal is sought anew
MISS = 0.02  # of the goal, beyond which it counts as missed
PARITY_IMAGES = 8
PARITY = 1e-4


@dataclass(frozen=True)
class Options:
    """What a user asks of a build: the command line's options by name."""

    device: str = "cpu"
    model: str = zoo.EMBEDDED
    weights: str | None = None
    images: Path | None = None
    method: str = "pomt"
    policy: str = "search"
    goal: Goal = field(default_factory=Goal)
    precision: str = "fp32"
    batch: int = 1
    work: Path = WORK
    out: Path | None = None
    simulate: bool = False
    exhaustive: bool = False
    block: int = PAPER_BLOCK
    search_images: int = 64
    rounds: int = ROUNDS
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def folder(self) -> Path:
        """Where the bundle goes."""
        name = f"{self.method}-{self.precision}-b{self.batch}" + ("-simulated" if self.simulate else "")
        return self.out or ENGINES / self.device / self.model / name


@dataclass(frozen=True)
class Built:
    """A finished build."""

    path: Path
    manifest: Manifest
    staircase: Staircase


class Job:
    """One model on one target with its pictures: what every step of a build needs, each made on first use."""

    def __init__(self, options: Options, progress: Progress = silent) -> None:
        from edgeprune.models import load_model

        self.options, self.progress = options, progress
        self.target: Target = target_for(
            options.device, options.precision, options.batch, options.simulate, options.work, progress
        )
        self.model: Model = load_model(options.model, options.weights, options.overrides)
        self.pictures = pictures_of(options)
        if self.pictures and self.pictures.labels and max(self.pictures.labels) >= self.model.vit.classes:
            raise InputError(
                f"label {max(self.pictures.labels)} does not exist: {options.model} has classes 0 to "
                f"{self.model.vit.classes - 1}: check the CSV or the weights"
            )

    @cached_property
    def staircase(self) -> Staircase:
        """Measured, resumed or reused."""
        return staircase_of_model(self.target, self.model, self.options.method, self.options.exhaustive)

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """All pictures, (images, P, P, 3) bytes."""
        if self.pictures is None:
            raise InputError(f"{self.options.model} needs pictures to choose a schedule: pass --images DIR|CSV")
        pictures, how = self.pictures, self.model.preprocessing

        def make(path: Path) -> None:
            array = load_pixels(pictures.paths, how)
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)

        path = self.target.step("pixels", ".npy", (self.pictures_key, how), make)
        pixels: NDArray[np.uint8] = np.load(path, allow_pickle=False)
        return pixels

    @cached_property
    def pictures_key(self) -> str:
        """Hash of the pictures and labels; empty without any."""
        return self.pictures.key() if self.pictures else ""

    @cached_property
    def chosen(self) -> NDArray[np.int64]:
        """Indices of the seeded random choice of pictures on which schedules are compared."""
        order = np.random.default_rng(0).permutation(len(self.pixels))
        return np.sort(order[: self.options.search_images])

    @cached_property
    def evaluator(self) -> Evaluator:
        """Fidelity on the chosen pictures."""
        from edgeprune.fidelity import Evaluator

        labels = self.pictures.labels if self.pictures else None
        part = [labels[i] for i in self.chosen] if labels else None
        return Evaluator(self.model, self.options.method, self.pixels[self.chosen], part)

    def drop(self, tokens: Sequence[int]) -> float:
        """Points of top-1 that a schedule loses on all pictures; points of agreement without labels."""
        from edgeprune.fidelity import logits_of_schedule

        dense = (self.model.vit.tokens,) * self.model.vit.depth
        unpruned, pruned = (
            logits_of_schedule(self.model, self.options.method, t, self.pixels, self.progress)
            for t in (dense, tokens)
        )
        if self.pictures and self.pictures.labels:
            labels = self.pictures.labels
            return measure.top1(unpruned, labels) - measure.top1(pruned, labels)
        return 100 - measure.agreement(unpruned, pruned)


def pictures_of(options: Options) -> ImageSet | None:
    """The images asked for; the embedded model's held-out digits by default. Raises ImageError."""
    if options.images is not None:
        return load_images(options.images)
    return load_images(zoo.images_dir() / "labels.csv") if options.model == zoo.EMBEDDED else None


def build(options: Options, progress: Progress = silent) -> Built:
    """Model to bundle. Raises any EdgepruneError; nothing half-written is left."""
    if options.policy not in ("search", "paper"):
        raise InputError(f"unknown policy {options.policy!r}: choose search or paper")
    job = Job(options, progress)
    goal = options.goal
    for attempt in range(CORRECTIONS + 1):
        schedule = solve(job, goal)
        engine_file, report = realise(job, schedule)
        corrected = correction(job, options.goal, goal, report)
        if corrected is None or attempt == CORRECTIONS:
            break
        log.info("measured %.3fx, correcting the goal by it", report.speedup)
        try:
            if solve(job, corrected).tokens == schedule.tokens:
                break
        except EdgepruneError:  # the corrected goal is beyond what the model can give: keep what was built
            log.info("no schedule is faster: keeping the one that was measured")
            break
        goal = corrected
    return Built(options.folder(), _bundle(job, schedule, engine_file, report), job.staircase)


def correction(job: Job, asked: Goal, used: Goal, report: Report) -> Goal | None:
    """The goal to give the additive model so that the measurement meets `asked`; None where it does."""
    if asked.speedup is not None and used.speedup is not None:
        error = report.speedup / asked.speedup
        return Goal(speedup=used.speedup / error) if abs(error - 1) > MISS else None
    if asked.budget_ms is not None and used.budget_ms is not None:
        error = asked.budget_ms / report.latency.median_ms
        return Goal(budget_ms=used.budget_ms * error) if abs(error - 1) > MISS else None
    return None


def solve(job: Job, goal: Goal) -> Schedule:
    """Tokens per block for a goal, by the policy asked for; kept in the work folder."""
    options, staircase, vit = job.options, job.staircase, job.model.vit
    if options.method == "none":
        return finished(staircase, "none", options.policy, (vit.tokens,) * vit.depth)
    images = (job.pictures_key, options.search_images)
    parts = (
        encode(staircase),
        options.method,
        options.policy,
        goal,
        options.block,
        images,
        job.model.preprocessing,
    )

    def make(path: Path) -> None:
        if options.policy == "paper":
            schedule = paper_schedule(staircase, options.method, goal, _accuracy(job), options.block, job.progress)
        else:
            front = single_cut_front(staircase, options.method, job.evaluator.fidelity, goal, job.progress)
            best = choose(front, staircase, options.method, goal, job.drop)
            schedule = finished(staircase, options.method, "search", best.tokens)
        save(schedule, path)

    return load(job.target.step("schedule", ".json", parts, make), Schedule)


def _accuracy(job: Job) -> Any:
    def accuracy(tokens: int) -> float:
        score = job.evaluator.random_drop(tokens)
        return score.agreement if score.top1 is None else score.top1

    return accuracy


def dense_onnx(job: Job) -> Path:
    """The unpruned model's ONNX, among the probes."""
    folder = job.target.path("probes", "", job.model.vit, job.options.batch)
    export_probes(job.model, "none", job.options.batch, folder)
    return folder / "dense.onnx"


def pruned_onnx(job: Job, schedule: Schedule) -> Path:
    """The pruned model's ONNX, checked against PyTorch. Raises ExportError."""
    if not schedule.cuts:
        return dense_onnx(job)

    def make(path: Path) -> None:
        import torch

        from edgeprune.fidelity import pruned_module

        vit = job.model.vit
        example = torch.zeros(job.options.batch, 3, vit.image_px, vit.image_px)
        job.progress("exporting ONNX", 0, 1)
        export.onnx_from_module(pruned_module(job.model, schedule.method, schedule.tokens), example, path)
        job.progress("exporting ONNX", 1, 1)

    parts = (job.model.vit, schedule.method, schedule.tokens, job.options.batch)
    return job.target.step("model", ".onnx", parts, make)


def check_parity(job: Job, schedule: Schedule, logits: NDArray[np.float32]) -> float:
    """Largest difference of the engine's logits to PyTorch's over a few real images. Raises ExportError."""
    from edgeprune.fidelity import logits_of_schedule

    count = min(PARITY_IMAGES, len(logits))
    wanted = logits_of_schedule(job.model, schedule.method, schedule.tokens, job.pixels[:count])
    worst = float(np.abs(wanted - logits[:count]).max())
    if not worst <= PARITY:  # NaN is worse than any number
        raise ExportError(f"the engine's logits differ from PyTorch's by {worst:.2g}, above {PARITY}: report this")
    return worst


def realise(job: Job, schedule: Schedule) -> tuple[Path, Report]:
    """Compile a schedule and the unpruned model, measure both interleaved, compare their outputs."""
    target, options = job.target, job.options
    files = [_compiled(target, onnx) for onnx in (dense_onnx(job), pruned_onnx(job, schedule))]
    hashes = [sha256_file(file) for file in files]
    rounds = 1 if target.setup.simulated else options.rounds

    def time_both(path: Path) -> None:
        candidates = {n: target.opener(f) for n, f in zip(("dense", "pruned"), files, strict=True)}
        samples = measure.interleave(candidates, rounds, progress=job.progress, what="unpruned against pruned")
        write_bytes(path, msgspec.json.encode(samples))

    latency = target.step("latency", ".json", (hashes, target.setup, rounds), time_both)
    samples = msgspec.json.decode(latency.read_bytes(), type=Samples)
    speedup, interval = measure.ratio(samples["dense"], samples["pruned"])
    dense = Latency(samples_ms=tuple(samples["dense"]), warmup=measure.WARMUP)
    drift = dense.median_ms / job.staircase.dense.median_ms
    report = Report(
        latency=Latency(samples_ms=tuple(samples["pruned"]), warmup=measure.WARMUP),
        dense_latency=dense,
        speedup=speedup,
        speedup_interval=interval,
        probes=job.staircase.probes,
        predicted_ms=predict_ms(job.staircase, schedule.tokens, schedule.method) * drift,
    )
    if job.pictures is not None:
        unpruned, pruned = (_logits(job, file) for file in files)
        check_parity(job, schedule, pruned)
        labels = job.pictures.labels
        report = msgspec.structs.replace(
            report,
            agreement=measure.agreement(unpruned, pruned),
            kl=measure.kl_divergence(unpruned, pruned),
            top1=measure.top1(pruned, labels) if labels else None,
            dense_top1=measure.top1(unpruned, labels) if labels else None,
            images=len(job.pictures),
        )
    return files[1], report


def _compiled(target: Target, onnx: Path) -> Path:
    """The engine of an ONNX file on the target."""

    def make(path: Path) -> None:
        target.runtime.compile(onnx, target.setup, path)

    return target.step("engine", ".onnx", (sha256_file(onnx), target.setup), make)


def _logits(job: Job, engine: Path) -> NDArray[np.float32]:
    """Outputs of an engine over all pictures, (images, classes)."""

    def make(path: Path) -> None:
        with job.target.runtime.open(engine, job.target.setup) as session:
            array = measure.logits_of(session, job.pixels, job.model.preprocessing, job.options.batch, job.progress)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)

    parts = (sha256_file(engine), job.target.setup, job.pictures_key, job.model.preprocessing)
    logits: NDArray[np.float32] = np.load(job.target.step("logits", ".npy", parts, make), allow_pickle=False)
    return logits


def _bundle(job: Job, schedule: Schedule, engine_file: Path, report: Report) -> Manifest:
    """Write the bundle, unless the very same one is already there."""
    from edgeprune.models import class_labels

    options, model = job.options, job.model
    out = options.folder()
    digest = sha256_file(engine_file)
    engine = Engine(
        path="model.onnx",
        sha256=digest,
        onnx_sha256=digest,
        size_bytes=engine_file.stat().st_size,
        setup=job.target.setup,
    )
    if (out / MANIFEST).is_file():
        try:
            old = load_bundle(out)
        except EdgepruneError:
            old = None
        if old and (old.engine, old.schedule, old.report) == (engine, schedule, report):
            log.info("bundle: reused %s", out)
            return old
    if job.pictures is not None:
        index = np.arange(options.batch) % len(job.pixels)
        batch = normalise(job.pixels[index], model.preprocessing)
    else:
        shape = (options.batch, 3, model.vit.image_px, model.vit.image_px)
        batch = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with job.target.runtime.open(engine_file, job.target.setup) as session:
        golden = session.infer(batch)
    return write_bundle(
        out,
        vit=model.vit,
        engine_file=engine_file,
        engine=engine,
        schedule=schedule,
        staircase=job.staircase,
        report=report,
        preprocessing=model.preprocessing,
        labels=class_labels(model.vit, job.pictures.class_names if job.pictures else None),
        golden=(batch, golden),
        extra=staircase_svg(job.staircase, schedule),
    )


def schedule_from_file(path: Path, options: Options, progress: Progress = silent) -> tuple[Schedule, float]:
    """A schedule from a staircase file, and the unpruned latency (ms) it was measured against.

    Raises InputError where the staircase is of another model, ScheduleError where the goal is out of reach.
    """
    staircase = load(path, Staircase)
    setup = staircase.setup
    options = replace(options, device="cpu", precision="fp32", batch=setup.batch)
    job = Job(options, progress)
    if msgspec.structs.replace(staircase.vit, weights_sha256=job.model.vit.weights_sha256) != job.model.vit:
        raise InputError(f"{path} is of {staircase.vit.name}, not of this {job.model.vit.name}: profile it")
    job.staircase = msgspec.structs.replace(staircase, vit=job.model.vit)
    return solve(job, options.goal), staircase.dense.median_ms


def export_model(model: Model, schedule: Path | None, batch: int, out: Path) -> Path:
    """Write a pruned or, without a schedule, the unpruned model. Raises InputError, ExportError, OutputError."""
    import torch

    from edgeprune.fidelity import pruned_module

    method, tokens = "none", (model.vit.tokens,) * model.vit.depth
    if schedule is not None:
        found = load(schedule, Schedule)
        if found.vit != model.vit:
            raise InputError(f"{schedule} is of {found.vit.name} with other weights: make it for this model")
        method, tokens = found.method, found.tokens
    example = torch.zeros(batch, 3, model.vit.image_px, model.vit.image_px)
    export.onnx_from_module(pruned_module(model, method, tokens), example, out)
    return out

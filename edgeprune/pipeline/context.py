"""The options of a build, and what all its steps share: target, model and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune import zoo
from edgeprune.bundles.format import default_folder
from edgeprune.defaults import CALIB, WORK
from edgeprune.devices.memory import available_bytes
from edgeprune.errors import InputError
from edgeprune.images import ImageSet, drawn, labelled_for, load_images
from edgeprune.io import load_array
from edgeprune.pipeline.pictures import Pictures
from edgeprune.records import TASKS, Progress, Vit, silent
from edgeprune.runtimes.head import Head
from edgeprune.runtimes.remote.ssh import Host
from edgeprune.runtimes.target import Target, target_for
from edgeprune.scheduling.goals import Goal
from edgeprune.scheduling.paper import PAPER_BLOCK
from edgeprune.tasks import BY_NAME, CLASSIFY, Task, task_of
from edgeprune.vit.reducers import check_method

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from edgeprune.distributed.cluster import Cluster
    from edgeprune.vit.models import Model

ROUNDS = 60
LEAST_ROUNDS = 5
LEAST_RECOVERY = 16  # pictures
MOST_OUTPUT_BYTES = 1 << 30  # of all pictures; several such arrays are compared
SHARE_OF_MEMORY = 0.8  # of what is free, for the activations of one schedule
POLICIES = ("search", "paper")


@dataclass(frozen=True)
class Options:
    """The options of a build, named as on the command line."""

    device: str = "cpu"
    model: str | nn.Module = zoo.EMBEDDED
    weights: str | None = None
    images: Path | None = None
    method: str = "fold"
    policy: str = "search"
    goal: Goal = field(default_factory=Goal)
    precision: str = "fp32"
    batch: int = 1
    work: Path = WORK
    out: Path | None = None
    simulate: bool = False
    exhaustive: bool = False
    block: int = PAPER_BLOCK
    whole_last: bool = False  # compute the whole last block even if the head reads only the prefix
    search_images: int = 128
    recover: Path | bool = False  # pictures to tune the weights on; True: half of `images`
    rounds: int = ROUNDS
    neighbours: int = 3  # similar schedules to build and time in addition to the best
    calib: Path | None = None  # where INT8 ranges are kept; None: CALIB, or `work` where that is not the default
    host: Host | None = None  # the device, if it is another machine
    lock_clocks: bool = False  # of that host
    overrides: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None  # of records.TASKS; None: that of the model
    image_size: tuple[int, int] | None = None  # (height, width), pixels; None: that of the model
    layers: tuple[int, ...] = ()  # blocks, from 1, whose patch features are outputs
    head: Path | None = None  # ONNX on dense features, whose output is what counts
    text_embeddings: Path | None = None  # .npy (classes, C), for zero-shot figures of embeddings
    cluster: Cluster | None = None  # where schedules are evaluated, if not in this process


@dataclass(frozen=True)
class Context:
    """One model on one target with its pictures."""

    options: Options
    target: Target
    model: Model
    pictures: Pictures | None
    task: Task = CLASSIFY  # how outputs are compared
    progress: Progress = silent
    recovery: Pictures | None = None  # to tune the weights on
    head: Head | None = None

    @property
    def judged_by(self) -> str:
        """Key of the head, on which every figure depends; empty without one."""
        return self.head.key if self.head else ""

    @property
    def calib(self) -> Path:
        """Where INT8 ranges are kept."""
        return self.options.calib or (CALIB if self.options.work == WORK else self.options.work)

    @property
    def method(self) -> str:
        """How tokens are removed."""
        return self.options.method

    @property
    def prefix_last(self) -> bool:
        """Does the last block compute only the prefix tokens?"""
        vit = self.model.vit
        return vit.prefix_pooled and vit.depth > 1 and not self.options.whole_last

    @property
    def dense_tokens(self) -> tuple[int, ...]:
        """The schedule without a cut, one token count per block."""
        return (self.model.vit.tokens,) * self.model.vit.depth

    @property
    def out(self) -> Path:
        """The folder of the bundle."""
        return self.options.out or default_folder(self.target.setup, self.model.vit, self.method)

    def with_method(self, method: str) -> Context:
        """The same model, target and pictures with another method."""
        return replace(self, options=replace(self.options, method=method))

    def at(self, precision: str) -> Context:
        """The same model, target and pictures in another precision. Raises InputError, DeviceError."""
        return replace(self, options=replace(self.options, precision=precision), target=self.target.at(precision))

    def needed_pictures(self) -> Pictures:
        """The pictures. Raises InputError if there are none."""
        if self.pictures is None:
            raise InputError(f"{self.model.vit.name} needs pictures to choose a schedule: pass --images DIR|CSV")
        return self.pictures


def context_for(options: Options, progress: Progress = silent, target: Target | None = None) -> Context:
    """Open the target if none is given, load the model, find the pictures. Raises any EdgepruneError."""
    check_method(options.method)
    check_policy(options.policy)
    check_task(options.task)
    options.goal.check()
    check_counts(options.search_images, options.rounds, options.neighbours)
    target = target or target_for(
        options.device, options.precision, options.batch, options.simulate, options.work, progress,
        options.host, options.lock_clocks,
    )  # fmt: skip
    model = loaded(options)
    head = Head(options.head, model.vit) if options.head else None
    check_outputs(model)
    check_goal(options, model)
    found = image_set(options)
    if found:
        check_count(BY_NAME[model.task], min(len(found), options.search_images))
        check_size(model.vit, len(found))
        check_memory(options, model, len(found))
        if model.task == "classify":
            names = model.labels_like(found.class_names)
            found = labelled_for(found, model.vit.name, model.vit.classes, names)
    texts = None
    if options.text_embeddings is not None:
        texts = text_embeddings(options.text_embeddings, model, found.labels if found else None)
    training = recovery_set(options, found)
    pictures = Pictures(found, model.preprocessing, target, options.search_images, training) if found else None
    if pictures and 0 < len(pictures.untuned) < len(pictures.files):
        check_count(BY_NAME[model.task], len(pictures.untuned))
    if training:
        check_size(model.vit, len(training))
    recovery = Pictures(training, model.preprocessing, target, 0) if training else None
    task = task_of(model.task, model.vit, texts, head)
    return Context(options, target, model, pictures, task, progress, recovery, head)


def loaded(options: Options) -> Model:
    """The model of some options; dense where it has --layers or a --head. Raises as load_model, and InputError."""
    from edgeprune.vit.models import load_model

    task = options.task
    if options.head is not None:
        if task not in (None, "dense"):
            raise InputError(f"--head is for dense features: pass --task dense instead of {task}, or leave it out")
        task = "dense"
    return load_model(options.model, options.weights, options.overrides, task, options.image_size, options.layers)


def check_outputs(model: Model) -> None:
    """Raise InputError for a classifier whose answer is always the same."""
    if model.task == "classify" and model.vit.classes == 1:
        raise InputError(
            f"{model.vit.name} has a single logit, whose softmax is always 1: pass a model with one logit per class"
        )


def check_memory(options: Options, model: Model, images: int) -> None:
    """Raise InputError where the activations kept for the choice of a schedule would not fit in memory."""
    vit, count, free = model.vit, min(images, options.search_images), available_bytes()
    if options.method == "none" or options.cluster is not None or free is None:
        return
    each = 4 * vit.width * vit.tokens * (vit.depth + 1)  # as in vit.fidelity.Evaluator
    if count * each > (most := SHARE_OF_MEMORY * free):
        fits = int(most // each)
        advice = f"pass --search-images {fits}" if fits else "choose a smaller model or --image-size"
        raise InputError(
            f"comparing schedules of {vit.name} on {count} pictures takes {count * each / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free: {advice}"
        )


def check_goal(options: Options, model: Model) -> None:
    """Raise InputError for a goal or an option that the model's task does not have."""
    goal, name, dense = options.goal, model.vit.name, model.task == "dense"
    what = {"classify": "classifies", "embed": "embeds", "dense": "gives dense features"}[model.task]
    if goal.min_cosine is not None and model.task != "embed":
        other = "pass --max-error" if dense else "pass --max-drop or --task embed"
        raise InputError(f"--min-cosine is for embeddings, but {name} {what}: {other}")
    if goal.max_error is not None and not dense:
        raise InputError(f"--max-error is for dense features, but {name} {what}: pass --layers, or another goal")
    if dense and goal.max_drop is not None:
        raise InputError("--max-drop does not apply to dense features: pass --max-error")
    if dense and options.policy == "paper":
        raise InputError("--policy paper does not apply to dense features: pass --policy search")


def check_size(vit: Vit, images: int) -> None:
    """Raise InputError where the outputs for all pictures would not fit in memory."""
    most = MOST_OUTPUT_BYTES // (4 * vit.values)
    if vit.outputs and images > most:
        size = 4e-9 * vit.values * images
        raise InputError(f"the features of {images} pictures take {size:.1f} GB: pass {most} pictures or fewer")


def text_embeddings(path: Path, model: Model, labels: Sequence[int] | None) -> NDArray[np.float32]:
    """Embeddings of the names of classes, (classes, C), from an fp32 .npy file. Raises InputError."""
    if model.task != "embed":
        does = "classifies" if model.task == "classify" else "gives dense features"
        raise InputError(f"--text-embeddings is for embeddings, but {model.vit.name} {does}: pass --task embed")
    texts, width = load_array(path, "pass a float32 .npy"), model.vit.classes
    if texts.ndim != 2 or texts.shape[1] != width or not len(texts):
        raise InputError(
            f"{path} has the shape {texts.shape}, not (classes, {width}): pass the text embeddings of this model"
        )
    if not np.isfinite(texts).all():
        raise InputError(f"{path} has values that are not finite: compute the text embeddings again")
    if labels and max(labels) >= len(texts):
        raise InputError(
            f"label {max(labels)} has no row in {path}, which has {len(texts)}: pass one row for every class"
        )
    return texts


def check_task(task: str | None) -> None:
    """Raise InputError for an unknown task."""
    if task is not None and task not in TASKS:
        raise InputError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")


def check_count(task: Task, images: int) -> None:
    """Raise InputError where so many pictures are too few for the figures of a task."""
    if images < task.least_images:
        raise InputError(
            f"comparing embeddings by nearest neighbours needs at least {task.least_images} pictures, not {images}: "
            "pass more with --images and --search-images"
        )


def check_policy(policy: str) -> None:
    """Raise InputError for an unknown policy."""
    if policy not in POLICIES:
        raise InputError(f"unknown policy {policy!r}: choose from {', '.join(POLICIES)}")


def check_counts(search_images: int, rounds: int, neighbours: int) -> None:
    """Raise InputError for counts that no build takes."""
    for name, value, least in (
        ("search_images", search_images, 1), ("rounds", rounds, LEAST_ROUNDS), ("neighbours", neighbours, 0)
    ):  # fmt: skip
        if value < least:
            raise InputError(f"{name} = {value} is too few: use {least} or more")


def recovery_set(options: Options, images: ImageSet | None) -> ImageSet | None:
    """The pictures of --recover, without labels; None where nothing is recovered. Raises InputError, ImageError."""
    if options.recover is False:
        return None
    if options.method == "none":
        raise InputError("--method none removes no tokens, so there is nothing to recover: leave out --recover")
    if options.recover is not True:
        found = load_images(options.recover, "--recover", anywhere=True).paths
    elif images is None:
        raise InputError("--recover needs pictures: pass --images DIR|CSV or --recover DIR|CSV")
    else:
        found = tuple(images.paths[i] for i in drawn(len(images), len(images) // 2))
    if len(found) < LEAST_RECOVERY:
        raise InputError(f"--recover needs at least {LEAST_RECOVERY} pictures, not {len(found)}: pass more")
    return ImageSet(found, None, None)


def image_set(options: Options) -> ImageSet | None:
    """The images of --images; by default the held-out digits for the embedded model. Raises ImageError."""
    if options.images is not None:
        return load_images(options.images)
    return load_images(zoo.images_dir() / "labels.csv") if options.model == zoo.EMBEDDED else None

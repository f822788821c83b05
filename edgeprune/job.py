"""One model on one target with its pictures: what the steps of a build share, each made on first use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune import measure, zoo
from edgeprune.adaptive import edge, on_edges, settled
from edgeprune.devices import load_device
from edgeprune.errors import InputError
from edgeprune.images import ImageSet, calibration_indices, drawn, load_images, load_pixels
from edgeprune.profiling import Sought, staircase_of_model
from edgeprune.records import Progress, Staircase, replacing, silent
from edgeprune.reducers import check_method
from edgeprune.schedule import PAPER_BLOCK, Goal
from edgeprune.ssh import Host
from edgeprune.target import WORK, Target, target_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeprune.fidelity import Evaluator
    from edgeprune.models import Model

ENGINES = Path("engines")
ROUNDS = 60
LEAST_HELD_OUT = 32  # pictures that chose nothing, below which figures are of all
BIASED = "figures are of all %d images, the schedule was chosen on some of them: pass more --images for unbiased ones"


@dataclass(frozen=True)
class Options:
    """What a user asks of a build: the command line's options by name."""

    device: str = "cpu"
    model: str = zoo.EMBEDDED
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
    whole_last: bool = False  # compute the whole last block though the head reads the prefix alone
    search_images: int = 128
    rounds: int = ROUNDS
    neighbours: int = 3  # of the schedule that are built and measured beside it
    calib: Path = Path("calib")  # where INT8 ranges are kept
    host: Host | None = None  # the device, where it is another machine
    lock_clocks: bool = False  # on that host
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def folder(self) -> Path:
        """Where the bundle goes."""
        name = f"{self.method}-{self.precision}-b{self.batch}" + ("-simulated" if self.simulate else "")
        return self.out or ENGINES / load_device(self.device).name / self.model / name


class Job:
    """One model on one target with its pictures: what every step of a build needs, each made on first use."""

    def __init__(self, options: Options, progress: Progress = silent) -> None:
        from edgeprune.models import load_model

        check_method(options.method)
        self.options, self.progress = options, progress
        self._sought: Sought = ()
        self.target: Target = target_for(
            options.device, options.precision, options.batch, options.simulate, options.work, progress,
            options.host, options.lock_clocks,
        )  # fmt: skip
        self.model: Model = load_model(options.model, options.weights, options.overrides)
        self.pictures = pictures_of(options)
        if self.pictures and self.pictures.labels and max(self.pictures.labels) >= self.model.vit.classes:
            raise InputError(
                f"label {max(self.pictures.labels)} does not exist: {options.model} has classes 0 to "
                f"{self.model.vit.classes - 1}: check the CSV or the weights"
            )

    def with_method(self, method: str) -> Job:
        """The same job for another method, sharing model, pictures and staircase."""
        other = copy(self)
        other.options = replace(self.options, method=method)
        other.__dict__.pop("evaluator", None)
        return other

    @property
    def prefix_last(self) -> bool:
        """Does the last block compute the prefix alone?"""
        vit = self.model.vit
        return vit.prefix_pooled and vit.depth > 1 and not self.options.whole_last

    @cached_property
    def staircase(self) -> Staircase:
        """Measured, resumed or reused."""
        return self._probed()

    def _probed(self) -> Staircase:
        options = self.options
        return staircase_of_model(self.target, self.model, (options.method,), options.exhaustive, self._sought)

    def settle(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """A schedule on exact edges: where those of its treads are not known, they are probed for the staircase."""
        if missing := {edge(self.staircase, n) for n in tokens} - {*settled(self.staircase)}:
            self._sought = (*self._sought, tuple(sorted(missing)))
            self.staircase = self._probed()
        return on_edges(self.staircase, tokens)

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
        return drawn(len(self.pixels), self.options.search_images)

    @property
    def held_out(self) -> tuple[NDArray[np.int64], bool]:
        """Indices of the pictures that figures are of, and whether none of them chose the schedule or INT8 ranges.

        All pictures, and False, where fewer than LEAST_HELD_OUT would be left.
        """
        everything = np.arange(len(self.pixels))
        seen = self.chosen if self.options.method != "none" else everything[:0]
        if self.target.onnx_precision == "int8":
            seen = np.union1d(seen, calibration_indices(len(everything)))
        left = np.setdiff1d(everything, seen)
        good = len(left) >= LEAST_HELD_OUT or not len(seen)
        return (left if good else everything), good

    def labels_of(self, images: NDArray[np.int64]) -> list[int] | None:
        """Labels of some pictures; None where there are none."""
        labels = self.pictures.labels if self.pictures else None
        return [labels[i] for i in images] if labels else None

    @cached_property
    def evaluator(self) -> Evaluator:
        """Fidelity on the chosen pictures."""
        from edgeprune.fidelity import Evaluator

        labels = self.labels_of(self.chosen)
        return Evaluator(self.model, self.options.method, self.pixels[self.chosen], labels, self.prefix_last)

    def drop(self, tokens: Sequence[int]) -> float:
        """Points of top-1 that a schedule loses on the chosen pictures; points of agreement without labels."""
        from edgeprune.fidelity import logits_of_schedule

        dense, pixels = (self.model.vit.tokens,) * self.model.vit.depth, self.pixels[self.chosen]
        unpruned, pruned = (
            logits_of_schedule(self.model, self.options.method, t, pixels, False, self.progress)
            for t in (dense, tokens)
        )
        if labels := self.labels_of(self.chosen):
            return measure.top1(unpruned, labels) - measure.top1(pruned, labels)
        return 100 - measure.agreement(unpruned, pruned)


def pictures_of(options: Options) -> ImageSet | None:
    """The images asked for; the embedded model's held-out digits by default. Raises ImageError."""
    if options.images is not None:
        return load_images(options.images)
    return load_images(zoo.images_dir() / "labels.csv") if options.model == zoo.EMBEDDED else None

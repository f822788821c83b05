"""The pictures of a build: decoded once, and split into those for choosing a schedule and those for the figures."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.distributed.engines import stored
from edgeprune.images import ImageSet, calibration_indices, drawn, save_pixels
from edgeprune.io import sha256_file
from edgeprune.onnx_graph.precision import QUANTISED
from edgeprune.records import Preprocessing
from edgeprune.runtimes.target import Target

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

LEAST_HELD_OUT = 32  # with fewer pictures left after the choice of a schedule, figures are of all pictures


@dataclass(frozen=True)
class Pictures:
    """Images with the preprocessing of one model; the decoded pixels are kept in the target's work folder."""

    files: ImageSet
    how: Preprocessing
    target: Target
    search_images: int  # number of them used to choose a schedule
    recovery: ImageSet | None = None  # the pictures that weights are tuned on; some may be among `files`

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """All pictures, (images, H, W, 3) bytes, mapped from their file. Raises ImageError, OutputError."""

        def make(path: Path) -> None:
            save_pixels(self.files.paths, self.how, path, self.target.progress)

        path = self.target.work.step("pixels", ".npy", (self.key, self.how), make)
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # not a np.memmap, which Ray would copy

    @cached_property
    def stored(self) -> list[Any]:
        """All pictures in Ray's object store, once for all engines of the target's batch."""
        return stored(self.pixels, self.target.setup.batch)

    @cached_property
    def key(self) -> str:
        """Hash of the pictures and their labels."""
        return self.files.key()

    @cached_property
    def search(self) -> NDArray[np.int64]:
        """Sorted indices of the pictures on which schedules are compared, chosen at random with a fixed seed."""
        return drawn(len(self.files), self.search_images)

    @cached_property
    def tuned_on(self) -> NDArray[np.int64]:
        """Indices of the pictures that weights are tuned on, by content."""
        known = {sha256_file(path) for path in self.recovery.paths} if self.recovery else set()
        found = [i for i, path in enumerate(self.files.paths) if known and sha256_file(path) in known]
        return np.array(found, np.int64)

    @cached_property
    def untuned(self) -> NDArray[np.int64]:
        """Indices of all other pictures."""
        return np.setdiff1d(np.arange(len(self.files)), self.tuned_on)

    def held_out(self, method: str, precision: str) -> tuple[NDArray[np.int64], bool]:
        """Indices of the pictures for the figures, and whether none of them was used for anything else.

        Other uses are the choice of the schedule, INT8 ranges and recovery. Where fewer than LEAST_HELD_OUT would be
        left: all that no weights were tuned on (all pictures where there are none), False and a logged warning.
        """
        everything = np.arange(len(self.files))
        seen = self.search if method != "none" else everything[:0]
        if precision in QUANTISED:
            seen = np.union1d(seen, calibration_indices(len(everything)))
        left = np.setdiff1d(self.untuned, seen)
        if len(left) >= LEAST_HELD_OUT or len(left) == len(everything):
            return left, True
        kept = self.untuned if len(self.untuned) else everything
        log.warning(
            "figures are of all %d images%s, including those used to choose the schedule%s: "
            "pass more --images to avoid bias", len(kept),
            " that weights were not tuned on" if len(kept) < len(everything) else "",
            "" if len(self.untuned) else " and to recover",
        )  # fmt: skip
        return kept, False

    def labels(self, indices: NDArray[np.int64]) -> list[int] | None:
        """Class indices of some pictures; None where the pictures have no labels."""
        labels = self.files.labels
        return [labels[i] for i in indices] if labels else None

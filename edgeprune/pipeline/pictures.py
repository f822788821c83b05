"""The pictures of a build: decoded once, and parted into those that choose the schedule and those that judge it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.images import ImageSet, calibration_indices, drawn, load_pixels
from edgeprune.io import replacing
from edgeprune.records import Preprocessing
from edgeprune.runtimes.target import Target

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LEAST_HELD_OUT = 32  # pictures that chose nothing, below which figures are of all
BIASED = "figures are of all %d images, some of which chose the schedule: pass more --images for unbiased figures"


@dataclass(frozen=True)
class Pictures:
    """A set of images as one model sees them; the target's work folder keeps the decoded pixels."""

    files: ImageSet
    how: Preprocessing
    target: Target
    search_images: int  # how many of them schedules are chosen on

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """All pictures, (images, P, P, 3) bytes. Raises ImageError."""

        def make(path: Path) -> None:
            array = load_pixels(self.files.paths, self.how)
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)

        path = self.target.step("pixels", ".npy", (self.key, self.how), make)
        pixels: NDArray[np.uint8] = np.load(path, allow_pickle=False)
        return pixels

    @cached_property
    def key(self) -> str:
        """Hash of the pictures and their labels."""
        return self.files.key()

    @cached_property
    def search(self) -> NDArray[np.int64]:
        """Indices of the seeded choice of pictures on which schedules are compared."""
        return drawn(len(self.files), self.search_images)

    def held_out(self, method: str, precision: str) -> tuple[NDArray[np.int64], bool]:
        """Indices of the pictures that figures are of, and whether none of them chose the schedule or INT8 ranges.

        All pictures, and False, where fewer than LEAST_HELD_OUT would be left.
        """
        everything = np.arange(len(self.files))
        seen = self.search if method != "none" else everything[:0]
        if precision == "int8":
            seen = np.union1d(seen, calibration_indices(len(everything)))
        left = np.setdiff1d(everything, seen)
        good = len(left) >= LEAST_HELD_OUT or not len(seen)
        return (left if good else everything), good

    def labels(self, indices: NDArray[np.int64]) -> list[int] | None:
        """Class indices of some pictures; None where pictures have none."""
        labels = self.files.labels
        return [labels[i] for i in indices] if labels else None

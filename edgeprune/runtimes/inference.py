"""Outputs of a session for many pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.images import batches
from edgeprune.records import Preprocessing, Progress, silent
from edgeprune.runtimes import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray


Open = Callable[[], Session]


def logits_of(
    session: Session,
    pixels: NDArray[np.uint8],
    how: Preprocessing,
    batch: int,
    progress: Progress = silent,
    what: str = "evaluating",
) -> NDArray[np.float32]:
    """(images, classes) fp32 outputs for (images, H, W, 3) uint8 pictures. Raises EngineError."""
    rows = []
    done = 0
    for images, real in batches(pixels, how, batch):
        rows.append(session.infer(images)[:real])
        done += real
        if done % 16 < batch:
            progress(what, done, len(pixels))
    progress(what, len(pixels), len(pixels))
    return np.concatenate(rows)

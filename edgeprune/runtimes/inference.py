"""Outputs of a session for many pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import EngineError
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


def check_finite(outputs: NDArray[np.float32], precision: str) -> None:
    """Raise EngineError for outputs (images, values) that are infinite or no numbers."""
    if bad := len(outputs) - int(np.isfinite(outputs).all(axis=1).sum()):
        advice = "pass other weights" if precision == "fp32" else "use --precision fp32"
        raise EngineError(f"outputs are not finite in {precision} on {bad} of {len(outputs)} pictures: {advice}")

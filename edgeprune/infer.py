"""Pictures through a bundle's engine: the likeliest classes by name, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.images import ImageSet, batches, load_images, read_image
from edgeprune.local import local
from edgeprune.measure import WARMUP, latency_of, log_softmax
from edgeprune.records import Progress, silent

TIMED = 20  # inferences whose median is told


def classify(bundle: Path, sources: Sequence[Path], top: int = 5, progress: Progress = silent) -> dict[str, Any]:
    """{"rows": [{"image", "top": [{"class", "label", "percent"}]}], "latency_ms": ...} of pictures and folders.

    `latency_ms` is of one batch on the device, preprocessing aside. Pictures are read one batch at a time.
    Raises ImageError, InputError, DeviceError, EngineError.
    """
    here, rows = local(bundle), []
    manifest, paths = here.manifest, [path for source in sources for path in _pictures(source)]
    how, batch = manifest.preprocessing, manifest.engine.setup.batch
    with here.open() as session:
        for start in range(0, len(paths), batch):
            part = paths[start : start + batch]
            progress("classifying", start, len(paths))
            pixels = np.stack([read_image(path, how) for path in part])
            for images, real in batches(pixels, how, batch):
                shares = np.exp(log_softmax(session.infer(images)[:real])) * 100
                if shares.shape[1] != len(manifest.labels):
                    raise EngineError(f"{bundle}: the engine gives {shares.shape[1]} classes: build it again")
            for path, row in zip(part, shares, strict=True):
                best = row.argsort()[::-1][:top]
                found = [{"class": int(i), "label": manifest.labels[i], "percent": float(row[i])} for i in best]
                rows.append({"image": str(path), "top": found})
        progress("classifying", len(paths), len(paths))
        latency = latency_of(session, TIMED, WARMUP)
    return {
        "bundle": str(bundle),
        "model": manifest.vit.name,
        "device": here.setup.device,
        "runtime": here.setup.runtime,
        "batch": batch,
        "rows": rows,
        "latency_ms": latency.summary(),
    } | ({"simulated": True} if here.setup.simulated else {})


def _pictures(source: Path) -> tuple[Path, ...]:
    """A picture itself, or all of a folder or a CSV."""
    found: ImageSet | None = None
    if source.is_dir() or source.suffix.lower() == ".csv":
        found = load_images(source)
    return found.paths if found else (source,)

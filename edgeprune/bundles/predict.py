"""Classification of pictures with a bundle's engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgeprune.bundles.open import open_bundle
from edgeprune.errors import EngineError
from edgeprune.images import batches, load_images, read_image
from edgeprune.latency.timing import latency_of
from edgeprune.records import Latency, Progress, Setup, silent
from edgeprune.stats import log_softmax

TIMED = 20  # inferences that the latency is measured on


@dataclass(frozen=True)
class ClassScore:
    """A class by index and name, with its softmax probability in percent."""

    index: int
    label: str
    percent: float


class Prediction(NamedTuple):
    """The likeliest classes of one picture, the likeliest first."""

    image: Path
    top: tuple[ClassScore, ...]


@dataclass(frozen=True)
class Predictions:
    """Predictions of one bundle on this machine; `latency` is of one batch, without preprocessing."""

    bundle: Path
    model: str
    setup: Setup
    rows: tuple[Prediction, ...]
    latency: Latency


def predict(bundle: Path, sources: Sequence[Path], top: int = 5, progress: Progress = silent) -> Predictions:
    """The `top` likeliest classes of pictures; sources are pictures, folders, or CSVs, read one batch at a time.

    Raises ImageError, InputError, DeviceError, EngineError.
    """
    opened = open_bundle(bundle)
    manifest, paths = opened.manifest, [path for source in sources for path in _pictures(source)]
    how, batch = manifest.preprocessing, manifest.engine.setup.batch
    rows: list[Prediction] = []
    with opened.open_engine() as session:
        for start in range(0, len(paths), batch):
            part = paths[start : start + batch]
            progress("classifying", start, len(paths))
            pixels = np.stack([read_image(path, how) for path in part])
            for images, real in batches(pixels, how, batch):
                shares = np.exp(log_softmax(session.infer(images)[:real])) * 100
                if shares.shape[1] != len(manifest.labels):
                    sizes = f"{shares.shape[1]} outputs for {len(manifest.labels)} classes"
                    raise EngineError(f"{bundle}: the engine has {sizes}: build it again")
            for path, row in zip(part, shares, strict=True):
                best = row.argsort()[::-1][:top]
                found = tuple(ClassScore(int(i), manifest.labels[i], float(row[i])) for i in best)
                rows.append(Prediction(path, found))
        progress("classifying", len(paths), len(paths))
        latency = latency_of(session, TIMED)
    return Predictions(bundle, manifest.vit.name, opened.setup, tuple(rows), latency)


def _pictures(source: Path) -> tuple[Path, ...]:
    """The picture itself, or all pictures of a folder or a CSV."""
    if source.is_dir() or source.suffix.lower() == ".csv":
        return load_images(source).paths
    return (source,)

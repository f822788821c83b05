"""Classes or embeddings of pictures, by a bundle's engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeprune.bundles.open import open_bundle
from edgeprune.errors import EngineError
from edgeprune.images import batches, load_images, read_image
from edgeprune.latency.timing import latency_of
from edgeprune.records import Latency, Progress, Setup, silent
from edgeprune.stats import log_softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

TIMED = 20  # inferences that the latency is measured on


@dataclass(frozen=True)
class ClassScore:
    """A class by index and name, with its softmax probability in percent."""

    index: int
    label: str
    percent: float


class Prediction(NamedTuple):
    """What the engine says about one picture: its likeliest classes, the likeliest first, or its embedding."""

    image: Path
    top: tuple[ClassScore, ...] = ()
    embedding: tuple[float, ...] | None = None  # None for a model that classifies

    @property
    def norm(self) -> float:
        """Length of the embedding."""
        return float(np.linalg.norm(self.embedding or ()))


@dataclass(frozen=True)
class Predictions:
    """Predictions of one bundle on this machine; `latency` is of one batch, without preprocessing."""

    bundle: Path
    model: str
    setup: Setup
    rows: tuple[Prediction, ...]
    latency: Latency
    task: str = "classify"


def predict(bundle: Path, sources: Sequence[Path], top: int = 5, progress: Progress = silent) -> Predictions:
    """The `top` likeliest classes of pictures, or their embeddings, as the bundle's task is.

    Sources are pictures, folders, or CSVs, read one batch at a time.
    Raises ImageError, InputError, DeviceError, EngineError.
    """
    opened = open_bundle(bundle)
    manifest, paths = opened.manifest, [path for source in sources for path in _pictures(source)]
    how, batch = manifest.preprocessing, manifest.engine.setup.batch
    rows: list[Prediction] = []
    with opened.open_engine() as session:
        for start in range(0, len(paths), batch):
            part = paths[start : start + batch]
            progress("running pictures", start, len(paths))
            pixels = np.stack([read_image(path, how) for path in part])
            for images, real in batches(pixels, how, batch):
                outputs = session.infer(images)[:real]
                if outputs.shape[1] != manifest.vit.classes:
                    sizes = f"{outputs.shape[1]} outputs for {manifest.vit.classes} classes"
                    raise EngineError(f"{bundle}: the engine has {sizes}: build it again")
            rows += PREDICTIONS[manifest.task](part, outputs, manifest.labels, top)
        progress("running pictures", len(paths), len(paths))
        latency = latency_of(session, TIMED)
    return Predictions(bundle, manifest.vit.name, opened.setup, tuple(rows), latency, manifest.task)


def _classes(
    images: Sequence[Path], outputs: NDArray[np.float32], labels: Sequence[str], top: int
) -> Iterator[Prediction]:
    for path, row in zip(images, np.exp(log_softmax(outputs)) * 100, strict=True):
        best = row.argsort()[::-1][:top]
        yield Prediction(path, tuple(ClassScore(int(i), labels[i], float(row[i])) for i in best))


def _embeddings(
    images: Sequence[Path], outputs: NDArray[np.float32], labels: Sequence[str], top: int
) -> Iterator[Prediction]:
    for path, row in zip(images, outputs, strict=True):
        yield Prediction(path, embedding=tuple(row.tolist()))


PREDICTIONS = {"classify": _classes, "embed": _embeddings}  # by task


def _pictures(source: Path) -> tuple[Path, ...]:
    """The picture itself, or all pictures of a folder or a CSV."""
    if source.is_dir() or source.suffix.lower() == ".csv":
        return load_images(source).paths
    return (source,)

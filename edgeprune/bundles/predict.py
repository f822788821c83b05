"""Classes, embeddings or dense features of pictures, by a bundle's engine."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeprune.bundles.open import open_bundle
from edgeprune.errors import EngineError, InputError
from edgeprune.features import unpacked
from edgeprune.images import batches, load_images, read_image
from edgeprune.io import write_bytes
from edgeprune.records import Latency, Progress, Setup, Vit, silent
from edgeprune.runtimes.inference import check_finite
from edgeprune.stats import log_softmax
from edgeprune.tasks import output_names

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
    """What the engine says about one picture: its likeliest classes, the likeliest first, or its embedding.

    With dense features also those, (rows, columns, C) by the name of the output, or the file that they were saved to.
    """

    image: Path
    top: tuple[ClassScore, ...] = ()
    embedding: tuple[float, ...] | None = None  # None for a model that classifies
    features: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
    file: Path | None = None

    @property
    def norm(self) -> float:
        """Length of the embedding."""
        return float(np.linalg.norm(self.embedding or ()))


@dataclass(frozen=True)
class Predictions:
    """Predictions of one bundle on this machine; `latency`, if timed, is of one batch, without preprocessing."""

    bundle: Path
    model: str
    setup: Setup
    rows: tuple[Prediction, ...]
    latency: Latency | None = None
    task: str = "classify"


def predict(
    bundle: Path,
    sources: Sequence[Path],
    top: int = 5,
    progress: Progress = silent,
    out: Path | None = None,
    timed: bool = False,
) -> Predictions:
    """The `top` likeliest classes of pictures, their embeddings or dense features, as the bundle's task is.

    Sources are pictures, folders, or CSVs, read one batch at a time. With `out` all outputs of each picture are saved
    to a file of its name in that folder, `out`/PICTURE.npz, and dense features are not kept in memory. With `timed`
    the latency is measured as well.
    Raises ImageError, InputError, DeviceError, EngineError, OutputError.
    """
    opened = open_bundle(bundle)
    manifest, paths = opened.manifest, [path for source in sources for path in _pictures(source)]
    files = [None if out is None else out / f"{path.stem}.npz" for path in paths]
    if out is not None and len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise InputError(
            f"several pictures would be saved as {twice}: run them separately, with different --out folders"
        )
    how, batch = manifest.preprocessing, manifest.engine.setup.batch
    rows: list[Prediction] = []
    with opened.open_engine() as session:
        for start in range(0, len(paths), batch):
            part = paths[start : start + batch]
            progress("running pictures", start, len(paths))
            pixels = np.stack([read_image(path, how) for path in part])
            [(images, real)] = batches(pixels, how, batch)
            outputs = session.infer(images)[:real]
            if outputs.shape[1] != manifest.vit.values:
                sizes = f"{outputs.shape[1]} outputs for {manifest.vit.values} classes"
                raise EngineError(f"{bundle}: the engine has {sizes}: build it again")
            check_finite(outputs, manifest.engine.setup.precision)
            found = (
                _dense(part, outputs, manifest.vit)
                if manifest.vit.outputs
                else (PREDICTIONS[manifest.task](part, outputs, manifest.labels, top))
            )
            named = tuple(output_names(manifest.task, manifest.vit))
            for row, output, file in zip(found, outputs, files[start : start + batch], strict=True):
                rows.append(row if file is None else _saved(row, output, named[-1], file))
        progress("running pictures", len(paths), len(paths))
        latency = opened.latency(session, TIMED) if timed else None
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


def _dense(images: Sequence[Path], outputs: NDArray[np.float32], vit: Vit) -> Iterator[Prediction]:
    for path, row in zip(images, outputs, strict=True):
        found = {name: array[0] for name, array in unpacked(row[None], vit.outputs).items()}
        embedding = tuple(found.pop("embedding").tolist())
        yield Prediction(path, embedding=embedding, features=found)


def _saved(row: Prediction, output: NDArray[np.float32], name: str, file: Path) -> Prediction:
    """A prediction whose outputs are written to an .npz file; `output` is all there is without features."""
    arrays: dict[str, Any] = {**row.features, name: np.array(row.embedding, np.float32) if row.features else output}
    data = io.BytesIO()
    np.savez(data, **arrays)
    write_bytes(file, data.getvalue())
    return row._replace(features=MappingProxyType({}), file=file)


PREDICTIONS = {"classify": _classes, "embed": _embeddings}  # by task


def _pictures(source: Path) -> tuple[Path, ...]:
    """The picture itself, or all pictures of a folder or a CSV."""
    if source.is_dir() or source.suffix.lower() == ".csv":
        return load_images(source).paths
    return (source,)

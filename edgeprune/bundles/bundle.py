"""A bundle as an object: its records, its predictions, its checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.bundles.format import STAIRCASE, load_bundle, staircase_of
from edgeprune.records import Manifest, Progress, Report, Schedule, Staircase, silent

if TYPE_CHECKING:
    from edgeprune.bundles.predict import Predictions
    from edgeprune.bundles.verify import Check


@dataclass(frozen=True)
class Bundle:
    """A folder that `build` or `compile` wrote."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Open a bundle whose files are all there and unchanged. Raises InputError, RecordError."""
        return cls(Path(path), load_bundle(Path(path)))

    @property
    def figures(self) -> Report:
        """What was measured: latencies in ms, top-1 and agreement in percent, KL in nats; None is unknown."""
        return self.manifest.report

    @property
    def schedule(self) -> Schedule:
        """Tokens leaving each block."""
        return self.manifest.schedule

    @property
    def staircase(self) -> Staircase | None:
        """The staircase that the schedule rests on, if the bundle holds one."""
        return staircase_of(self.path) if STAIRCASE in self.manifest.files else None

    def predict(
        self, images: str | Path | Sequence[str | Path], top: int = 5, progress: Progress = silent
    ) -> Predictions:
        """The `top` likeliest classes of pictures (files, folders, or CSVs of them) by the bundle's engine.

        Raises ImageError, DeviceError where the engine belongs to another machine, EngineError.
        """
        from edgeprune.bundles.predict import predict

        sources = [images] if isinstance(images, str | Path) else images
        return predict(self.path, [Path(source) for source in sources], top, progress)

    def verify(self) -> list[Check]:
        """Is it whole, does it belong on this machine, does it compute and time what it did?"""
        from edgeprune.bundles.verify import verify

        return verify(self.path)

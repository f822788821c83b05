"""A bundle as an object of the Python API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.bundles.format import STAIRCASE, load_bundle, staircase_of
from edgeprune.records import Manifest, PrecisionResult, Progress, Report, Schedule, Staircase, silent

if TYPE_CHECKING:
    from edgeprune.bundles.predict import Predictions
    from edgeprune.bundles.verify import Check


@dataclass(frozen=True)
class Bundle:
    """A folder that `build` or `compile` wrote."""

    path: Path
    manifest: Manifest
    precisions: tuple[PrecisionResult, ...] = ()  # what `build` tried with precision="auto"; not in the folder

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Open a bundle and check the hashes of its files. Raises InputError, RecordError."""
        return cls(Path(path), load_bundle(Path(path)))

    @classmethod
    def unpack(
        cls,
        file: str | Path,
        folder: str | Path,
        *,
        allowed_signers: str | Path | None = None,
        signer: str | None = None,
        unsigned: bool = False,
    ) -> Bundle:
        """Check the signature of a file of `pack`, unpack it into a new folder, and check its hashes.

        The signature must be by a key in `allowed_signers`, a list as in ssh-keygen(1), and with `signer` by that
        name of it; `unsigned` takes any file. Raises VerifyError for a missing or wrong signature, InputError for
        anything but a whole bundle, OutputError, and MissingError without ssh-keygen.
        """
        from edgeprune.bundles.pack import unpack

        allowed = Path(allowed_signers) if allowed_signers is not None else None
        done = unpack(Path(file), Path(folder), allowed, signer, unsigned)
        return cls(done.path, done.manifest)

    @property
    def figures(self) -> Report:
        """Figures: latencies in ms, top-1 and agreement in percent, KL in nats; None is unknown.

        `figures.fidelity` has all figures of the task.
        """
        return self.manifest.report

    @property
    def schedule(self) -> Schedule:
        """How many tokens leave each block, prefix tokens included."""
        return self.manifest.schedule

    @property
    def staircase(self) -> Staircase | None:
        """The staircase that the schedule was chosen on; None where the bundle has none. Raises RecordError."""
        return staircase_of(self.path) if STAIRCASE in self.manifest.files else None

    def predict(
        self,
        images: str | Path | Sequence[str | Path],
        top: int = 5,
        progress: Progress = silent,
        out: str | Path | None = None,
        timed: bool = False,
    ) -> Predictions:
        """The `top` likeliest classes of pictures (files, folders, or CSVs of them), their embeddings or features.

        With `out`, a folder, all outputs of each picture are saved there as PICTURE.npz, and dense features are not
        kept in memory. With `timed`, the latency is measured as well (20 inferences after a warm-up). Raises
        InputError, ImageError, EngineError, OutputError, and DeviceError where the engine was built for another
        machine.
        """
        from edgeprune.bundles.predict import predict

        sources = [images] if isinstance(images, str | Path) else images
        paths = [Path(source) for source in sources]
        return predict(self.path, paths, top, progress, Path(out) if out else None, timed)

    def pack(self, out: str | Path, *, sign: str | Path | None = None) -> Path:
        """Write the bundle as one .tar.zst, the same bytes for the same bundle; its path.

        With `sign`, an OpenSSH private key, the signature is written beside it, to OUT.sig. Raises InputError,
        OutputError, and MissingError without ssh-keygen.
        """
        from edgeprune.bundles.pack import pack

        return pack(self.path, Path(out), Path(sign) if sign is not None else None).path

    def verify(self) -> list[Check]:
        """Check its files, its machine, its outputs and its latency; checks end at the first that fails."""
        from edgeprune.bundles.verify import verify

        return verify(self.path)

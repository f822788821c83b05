"""Comparison with a stored bench: refused where the setup differs; otherwise ratios, drift and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edgeprune.benchmark.peak import SIZES
from edgeprune.benchmark.result import Bench, Peak, Ratio
from edgeprune.errors import InputError
from edgeprune.io import load
from edgeprune.records import Latency, Record, Setup
from edgeprune.stats import bootstrap_ratio

DRIFT = 0.02  # relative change of the machine itself above which there is a warning


class Stored(Record, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Setup and samples, all that a comparison needs; figures that follow from samples are not read."""

    setup: Setup
    samples_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples_ms or not all(math.isfinite(ms) and ms > 0 for ms in self.samples_ms):
            raise ValueError("samples_ms needs at least one finite value above 0")


class StoredRow(Stored, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One bundle."""

    bundle: str
    model: str
    cuda_graph: bool | None = None  # None: not on a GPU, or of an earlier version


class StoredPeak(Stored, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The matrix product that was measured in the same rounds."""

    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in SIZES:
            raise ValueError(f"size {self.size} must be one of {', '.join(map(str, SIZES))}")


class Baseline(Record, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The JSON that `edgeprune bench` prints with --json and writes with --out."""

    schema: int
    rows: tuple[StoredRow, ...]
    end_to_end: bool = False
    peaks: tuple[StoredPeak, ...] = msgspec.field(name="probes", default=())

    def peak(self, setup: Setup) -> StoredPeak | None:
        """The matrix product of a setup; None where there was none."""
        return next((peak for peak in self.peaks if peak.setup == setup), None)


def check_comparable(source: Path, bundles: Sequence[tuple[str, str, Setup]], end_to_end: bool = False) -> Baseline:
    """The baseline in a file, comparable with every (bundle, model, setup).

    Raises RecordError for a file that is no baseline, InputError naming the bundle, the field, its value in the
    baseline and its value here.
    """
    baseline = load(source, Baseline)
    if baseline.end_to_end != end_to_end:
        way = "with" if baseline.end_to_end else "without"
        raise InputError(f"{source} was measured {way} --end-to-end: do the same, or store a new baseline with --out")
    stored = {row.bundle: row for row in baseline.rows}
    for name, model, setup in bundles:
        if name not in stored:
            raise InputError(
                f"{source}: has no bundle {name} (it has: {', '.join(stored) or 'none'}): name bundles as in the "
                "baseline, or store a new baseline with --out"
            )
        old = stored[name]
        pairs = [("model", old.model, model)]
        pairs += [(field, getattr(old.setup, field), getattr(setup, field)) for field in Setup.__struct_fields__]
        for field, expected, found in pairs:
            if expected != found:
                raise _other_setup(source, name, field, expected, found)
    return baseline


def check_graphs(source: Path, baseline: Baseline, graphs: Mapping[str, bool | None]) -> None:
    """Raise InputError for a bundle of which only one bench runs as a CUDA graph; `graphs` are of this one."""
    for row in baseline.rows:
        here = graphs.get(row.bundle)
        if None not in (row.cuda_graph, here) and row.cuda_graph != here:
            raise _other_setup(source, row.bundle, "cuda_graph", row.cuda_graph, here)


def _other_setup(source: Path, bundle: str, field: str, expected: object, found: object) -> InputError:
    return InputError(
        f"{source}: {bundle} was measured with {field} {expected!r}, here it is {found!r}: bench under the same "
        "setup, or store a new baseline with --out"
    )


def with_ratios(bench: Bench, baseline: Baseline) -> Bench:
    """The same bench with `to_baseline` in its rows, and in its peaks where the baseline has them in the same size.

    Every bundle must be in the baseline, see check_comparable.
    """
    stored = {row.bundle: row for row in baseline.rows}
    rows = tuple(
        msgspec.structs.replace(row, to_baseline=_ratio(row.latency, stored[row.bundle])) for row in bench.rows
    )
    peaks = []
    for peak in bench.peaks:
        before = baseline.peak(peak.setup)
        if before is not None and before.size == peak.size:
            peak = msgspec.structs.replace(peak, to_baseline=_ratio(peak.latency, before))
        peaks.append(peak)
    return Bench(rows=rows, peaks=tuple(peaks), end_to_end=bench.end_to_end)


def _ratio(now: Latency, before: Stored) -> Ratio:
    return Ratio(*bootstrap_ratio(now.samples_ms, before.samples_ms, paired=False))


def drift(peaks: Sequence[Peak]) -> str | None:
    """How the machine itself has changed since the baseline, by its matrix products; None where it has not."""
    for peak in peaks:
        if peak.to_baseline is None:
            continue
        ratio, (low, high) = peak.to_baseline
        if abs(ratio - 1) > DRIFT and not low <= 1 <= high:
            way = "slower" if ratio > 1 else "faster"
            return (
                f"the machine itself is {100 * abs(ratio - 1):.0f} % {way} than at the baseline (the same matrix "
                f"product takes {ratio:.3f}x as long, 95 % {low:.3f} to {high:.3f}), ratios to the baseline include "
                "that: see edgeprune doctor, or store a new baseline with --out"
            )
    return None


def failure(bench: Bench, percent: float) -> str | None:
    """Why a bench fails: bundles slower by more than `percent` even at the low end of the interval; else None."""
    slow = []
    for row in bench.rows:
        if row.to_baseline is None:
            continue
        ratio, (low, high) = row.to_baseline
        if low > 1 + percent / 100:
            slow.append(f"{row.bundle} takes {ratio:.3f}x (95 % {low:.3f} to {high:.3f})")
    return f"slower than the baseline by more than {percent:g} %: {'; '.join(slow)}" if slow else None

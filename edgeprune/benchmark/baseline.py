"""A stored bench as the measure of a new one: refused where the setup is another, else ratios and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.benchmark.peak import SIZES
from edgeprune.errors import InputError
from edgeprune.io import load
from edgeprune.records import Record, Setup
from edgeprune.stats import bootstrap_ratio

DRIFT = 0.02  # relative change of the machine itself from which on it is told


class Measured(Record, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What two benches are compared by; the figures that follow from samples are not read back."""

    setup: Setup
    samples_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples_ms or not all(math.isfinite(ms) and ms > 0 for ms in self.samples_ms):
            raise ValueError("samples_ms needs at least one finite value above 0")


class Row(Measured, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One bundle."""

    bundle: str
    model: str


class Probe(Measured, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The matrix product that was measured in the same rounds."""

    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in SIZES:
            raise ValueError(f"size {self.size} is none of {', '.join(map(str, SIZES))}")


class Baseline(Record, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What `edgeprune bench` prints with --json and writes with --out."""

    schema: int
    rows: tuple[Row, ...]
    probes: tuple[Probe, ...] = ()

    def probe(self, setup: Setup) -> Probe | None:
        """The probe of a setup; None where there was none."""
        return next((probe for probe in self.probes if probe.setup == setup), None)


def check_comparable(source: Path, bundles: Sequence[tuple[str, str, Setup]]) -> Baseline:
    """The baseline in a file, comparable with every (bundle, model, setup).

    Raises RecordError for a file that is none, InputError naming the bundle, the field, what the baseline has and
    what is here.
    """
    baseline = load(source, Baseline)
    then = {row.bundle: row for row in baseline.rows}
    for name, model, setup in bundles:
        if name not in then:
            raise InputError(
                f"{source}: has no bundle {name} (it has: {', '.join(then) or 'none'}): name bundles as they were "
                "named then, or store a new baseline with --out"
            )
        old = then[name]
        pairs = [("model", old.model, model)]
        pairs += [(field, getattr(old.setup, field), getattr(setup, field)) for field in Setup.__struct_fields__]
        for field, expected, found in pairs:
            if expected != found:
                raise InputError(
                    f"{source}: {name} was measured with {field} {expected!r}, here it is {found!r}: bench under the "
                    "same setup, or store a new baseline with --out"
                )
    return baseline


def add_ratios(baseline: Baseline, rows: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]]) -> None:
    """Put `baseline_ratio` (of medians, above 1 is slower) and its 95 % `baseline_interval` into rows and probes."""
    bundles = {row.bundle: row for row in baseline.rows}
    for row in rows:
        _add_ratio(row, bundles[row["bundle"]])
    for probe in probes:
        then = baseline.probe(Setup(**probe["setup"]))
        if then is not None and then.size == probe["size"]:
            _add_ratio(probe, then)


def _add_ratio(now: dict[str, Any], then: Measured) -> None:
    now["baseline_ratio"], interval = bootstrap_ratio(now["samples_ms"], then.samples_ms, paired=False)
    now["baseline_interval"] = list(interval)


def drift(probes: Sequence[dict[str, Any]]) -> str | None:
    """How the machine itself has changed since the baseline, by its matrix products; None where it has not."""
    for probe in probes:
        ratio, (low, high) = probe.get("baseline_ratio", 1.0), probe.get("baseline_interval", (1.0, 1.0))
        if abs(ratio - 1) > DRIFT and not low <= 1 <= high:
            way = "slower" if ratio > 1 else "faster"
            return (
                f"the machine itself is {100 * abs(ratio - 1):.0f} % {way} than at the baseline (the same product of "
                f"matrices takes {ratio:.3f}x, 95 % {low:.3f} to {high:.3f}): ratios to the baseline contain that"
            )
    return None


def failure(rows: Sequence[dict[str, Any]], percent: float) -> str | None:
    """Why a bench fails: bundles slower by more than `percent` even at the low end of the interval; else None."""
    slow = []
    for row in rows:
        low, high = row["baseline_interval"]
        if low > 1 + percent / 100:
            slow.append(f"{row['bundle']} takes {row['baseline_ratio']:.3f}x (95 % {low:.3f} to {high:.3f})")
    return f"slower than the baseline by more than {percent:g} %: {'; '.join(slow)}" if slow else None

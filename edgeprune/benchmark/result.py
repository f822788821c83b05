"""What a bench measured, as records; statistics follow from the samples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edgeprune.records import Latency, Record, Schedule, Setup


class Ratio(NamedTuple):
    """A ratio of latencies and its 95 % bootstrap interval."""

    value: float
    interval: tuple[float, float]


class BenchRow(Record, frozen=True, kw_only=True):
    """One bundle. `latency` is of one batch on the device; None is unknown."""

    bundle: str  # the path, as it was given
    setup: Setup  # of this machine, now
    schedule: Schedule
    latency: Latency
    speedup: Ratio  # the first bundle's latency over this one's, round by round
    gflop: float | None  # operations of one batch, 10⁹; two for each multiply-add
    peak_gflop_per_s: float | None  # of the matrix product measured under the same precision
    peak_memory_mib: float | None
    energy_per_image_mj: float | None
    to_baseline: Ratio | None = None  # of medians, above 1 is slower

    @property
    def images_per_s(self) -> float:
        """Images per second with one batch at a time: the batch over its median latency.

        Batches that overlap their copies with inference, or run on several streams, can give more.
        """
        return 1e3 * self.setup.batch / self.latency.median_ms

    @property
    def p90_ms(self) -> float:
        """90th percentile, ms."""
        return float(np.percentile(self.latency.samples_ms, 90))

    @property
    def gflop_per_s(self) -> float | None:
        """10⁹ operations per second at the median latency; None where they cannot be counted."""
        return None if self.gflop is None else 1e3 * self.gflop / self.latency.median_ms

    @property
    def peak_share(self) -> float | None:
        """The rate as a share of the measured peak, 0 to 1."""
        rate, peak = self.gflop_per_s, self.peak_gflop_per_s
        return None if rate is None or peak is None else rate / peak


class Peak(Record, frozen=True, kw_only=True):
    """A product of large matrices, measured in the same rounds as the bundles: what the machine can do at best."""

    setup: Setup  # batch 1
    size: int  # rows and columns of the matrices
    gflop_per_s: float  # at the best median that was measured
    latency: Latency
    to_baseline: Ratio | None = None  # None where the baseline has none of this setup and size


class Bench(Record, frozen=True, kw_only=True):
    """Bundles timed side by side, in the order they were given, and the peak of the machine for each setup."""

    rows: tuple[BenchRow, ...]
    peaks: tuple[Peak, ...]
    end_to_end: bool = False  # latencies are wall time with the copies to and from the device

"""A measured latency, and what must be known to compare it with another."""

from __future__ import annotations

from functools import lru_cache

import msgspec
import numpy as np

from edgeprune.records.base import MOST_UNITS, Record, check_figures
from edgeprune.stats import median_interval


class Setup(Record, frozen=True, kw_only=True):
    """Everything that must be equal for two latencies to be comparable."""

    device: str
    machine: str  # name of the processor or GPU
    runtime: str  # ort-cpu, ort-cuda, trt, simulated
    runtime_version: str
    precision: str
    batch: int
    threads: int | None = None
    power_mode: str | None = None
    compute_capability: str | None = None  # of the GPU
    gpu: str | None = None  # its name as CUDA has it
    sm_count: int | None = None
    workspace_mib: int | None = None  # limit of TensorRT's builder, on which tactics depend
    options: str | None = None  # builder options other than the defaults
    noiseless: bool = False  # the runtime computes latencies, so that one measurement is exact

    def __post_init__(self) -> None:
        if not 0 < self.batch <= MOST_UNITS:
            raise ValueError(f"batch is 1 to {MOST_UNITS}")
        if self.simulated:  # files of earlier versions lack this field
            msgspec.structs.force_setattr(self, "noiseless", True)

    @property
    def simulated(self) -> bool:
        """True where no hardware was measured."""
        return self.runtime == "simulated"


class Latency(Record, frozen=True, kw_only=True):
    """Milliseconds of single inferences; statistics are computed, never stored."""

    samples_ms: tuple[float, ...]
    warmup: int = 0
    cuda_graph: bool | None = None  # was an inference one CUDA graph? None: not on a GPU, or unknown

    def __post_init__(self) -> None:
        if not self.samples_ms:
            raise ValueError("samples_ms needs at least one value")
        check_figures(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Median, ms."""
        return _median(self.samples_ms)

    @property
    def p99_ms(self) -> float:
        """99th percentile, ms."""
        return float(np.percentile(self.samples_ms, 99))

    @property
    def interval_ms(self) -> tuple[float, float]:
        """Distribution-free 95 % interval of the median from order statistics, ms."""
        return median_interval(self.samples_ms)

    def summary(self) -> dict[str, float]:
        """A latency in JSON output, ms: median, p99, and low and high of the 95 % interval of the median."""
        low, high = self.interval_ms
        return {"median": self.median_ms, "p99": self.p99_ms, "low": low, "high": high}


@lru_cache(maxsize=1 << 14)
def _median(samples: tuple[float, ...]) -> float:
    """A search asks for the same medians a million times."""
    return float(np.median(samples))


class GpuState(Record, frozen=True, kw_only=True):
    """What decides a GPU's speed at one moment; None where that is unknown."""

    clock_mhz: float | None = None
    temperature_c: float | None = None
    throttles: tuple[str, ...] = ()  # what lowers its clocks now
    # By cause: how often (Jetson) or for how many ms clocks were lowered so far
    events: dict[str, int] = msgspec.field(default_factory=dict)


class Conditions(Record, frozen=True, kw_only=True):
    """The GPU before and after one stage of probing."""

    before: GpuState
    after: GpuState

    @property
    def throttled(self) -> tuple[str, ...]:
        """Why clocks were lowered during the stage, or at one of its ends; empty where they were not."""
        counted = [k for k, n in self.after.events.items() if n > self.before.events.get(k, n)]
        return tuple(sorted({*counted, *self.before.throttles, *self.after.throttles}))

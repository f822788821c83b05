"""Bundles timed side by side, interleaved so that drift affects all alike, and the measured peak of the machine."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from edgeprune.benchmark.baseline import Baseline, check_comparable, check_graphs, drift, with_ratios
from edgeprune.benchmark.peak import Gemm, largest_useful
from edgeprune.benchmark.result import Bench, BenchRow, Peak, Ratio
from edgeprune.bundles.format import ONNX, load_bundle
from edgeprune.bundles.open import LocalBundle, device_of, open_bundle
from edgeprune.devices.power import locked_clocks
from edgeprune.devices.sensors import Meter, PeakMemory, rails_w, total_w
from edgeprune.errors import EngineError, InputError
from edgeprune.latency.timing import WARMUP, WARMUP_MS, interleave
from edgeprune.onnx_graph.operations import flops_of_onnx
from edgeprune.records import Latency, Manifest, Progress, Setup, silent
from edgeprune.runtimes import RUNS_PER_TIMING, CopiesTimed, OnDevice, Session, cuda_graph_of
from edgeprune.runtimes.inference import Open
from edgeprune.runtimes.quiet import clocks_turn, timing
from edgeprune.stats import bootstrap_ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

ENERGY_S = 2.0  # at full rate, after a quarter of it for the sensors to follow


class Costs(NamedTuple):
    """What a bundle takes besides time, running alone, and whether as a CUDA graph; None is unknown."""

    peak_memory_mib: float | None
    energy_per_image_mj: float | None
    cuda_graph: bool | None


def bench_bundles(
    bundles: Sequence[Path],
    rounds: int,
    progress: Progress = silent,
    baseline: Path | None = None,
    lock_clocks: bool = False,
    end_to_end: bool = False,
) -> Bench:
    """Time bundles in `rounds` interleaved rounds, with a large matrix product for each setup in the same rounds.

    With a `baseline` (the JSON of an earlier bench) rows and peaks have their ratio to it, and a warning is logged
    where the machine itself has changed. A runtime that computes latencies takes one round. Latencies of a GPU are
    between CUDA events, without copies; with `end_to_end` they are wall time with both copies.

    Raises InputError for rounds below 1, a bundle that is incomplete or given twice, a baseline of another setup, and
    `end_to_end` of a simulation, which has no copies;
    DeviceError for a bundle of another device, or whose engine belongs to another machine or version.
    """
    if rounds < 1:
        raise InputError(f"{rounds} rounds are too few: use 1 or more")
    manifests = _loaded(bundles)
    if end_to_end and any(manifest.engine.setup.simulated for manifest in manifests.values()):
        raise InputError("a simulated device has no copies to time: leave out --end-to-end")
    devices = {path: device_of(path, manifest) for path, manifest in manifests.items()}
    with ExitStack() as stack:
        noiseless = all(manifest.engine.setup.noiseless for manifest in manifests.values())
        if lock_clocks:
            stack.enter_context(clocks_turn())
        if not noiseless:
            stack.enter_context(timing())
        for device in {device.name: device for device in devices.values()}.values() if lock_clocks else ():
            stack.enter_context(locked_clocks(device))
        candidates = [open_bundle(path, manifest) for path, manifest in manifests.items()]
        named = [(str(c.path), c.manifest.vit.name, c.setup) for c in candidates]
        stored = check_comparable(baseline, named, end_to_end) if baseline is not None else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gemms = _gemms(candidates, folder, stored, progress)
        costs = [_costs(candidate) for candidate in candidates]
        if baseline is not None and stored is not None:
            found = {str(c.path): cost.cuda_graph for c, cost in zip(candidates, costs, strict=True)}
            check_graphs(baseline, stored, found)
        opened: dict[str, Open] = {
            str(c.path): _with_copies(c.open_engine) if end_to_end else c.open_engine for c in candidates
        }
        opened |= {_name(gemm): gemm.open for gemm in gemms.values()}
        rounds, warmup_ms = (1, 0.0) if noiseless else (rounds, WARMUP_MS)
        what = "timing bundles, round"
        samples = interleave(opened, rounds, progress=progress, what=what, warmup_ms=warmup_ms, stable=not noiseless)
    peaks = {setup: _peak(gemm, samples[_name(gemm)]) for setup, gemm in gemms.items()}
    rows = [
        _row(candidate, samples, str(bundles[0]), peaks[_peak_setup(candidate)], cost)
        for candidate, cost in zip(candidates, costs, strict=True)
    ]
    result = Bench(rows=tuple(rows), peaks=tuple(peaks.values()), end_to_end=end_to_end)
    if stored is None:
        return result
    compared = with_ratios(result, stored)
    if (changed := drift(compared.peaks)) is not None:
        log.warning("%s", changed)
    return compared


def _loaded(bundles: Sequence[Path]) -> dict[Path, Manifest]:
    """Manifests by bundle. Raises InputError."""
    for path in bundles:
        if bundles.count(path) > 1:
            raise InputError(f"{path} is given twice: name each bundle once")
    manifests = {path: load_bundle(path) for path in bundles}
    if len({manifest.engine.setup.simulated for manifest in manifests.values()}) > 1:
        raise InputError("simulated and measured latencies cannot be compared: bench bundles of one kind")
    return manifests


def _peak_setup(candidate: LocalBundle) -> Setup:
    """The setup its peak is measured under; INT8 and FP8 on hardware have none: an fp32 product shows drift alone."""
    setup = candidate.setup
    known = setup.simulated or setup.precision in ("fp32", "fp16")
    return msgspec.structs.replace(setup, precision=setup.precision if known else "fp32", batch=1)


def _gemms(
    candidates: Sequence[LocalBundle], folder: Path, baseline: Baseline | None, progress: Progress
) -> dict[Setup, Gemm]:
    """A matrix product for each setup, of the same size as in the baseline, so that the two can be compared."""
    gemms: dict[Setup, Gemm] = {}
    for index, candidate in enumerate(candidates):
        progress("matrix products", index, len(candidates))
        setup = _peak_setup(candidate)
        if setup not in gemms:
            known = baseline.peak(setup) if baseline is not None else None
            gemms[setup] = largest_useful(
                candidate.runtime, setup, folder / str(index), known.size if known is not None else None
            )
    return gemms


def _costs(candidate: LocalBundle) -> Costs:
    """Memory and energy of a bundle that runs alone.

    Memory is the engine's on its device where the session knows it; for ONNX Runtime on a CPU it is the peak of
    resident memory that loading and running adds to this process.
    """
    with PeakMemory() as resident, candidate.open_engine() as session:
        for _ in range(WARMUP):
            session.time_ms()
        on_device = session.memory_bytes() if isinstance(session, OnDevice) else None
        graph = cuda_graph_of(session)
        energy_mj = None if candidate.setup.simulated else _energy_mj(session, candidate.setup.batch)
    used = resident.bytes if candidate.setup.runtime == "ort-cpu" else on_device
    return Costs(None if used is None else used / 2**20, energy_mj, graph)


class _WithCopies:
    """A session that is timed from its input in memory of the host to its output there."""

    def __init__(self, session: Session) -> None:
        self._session, self.cuda_graph = session, cuda_graph_of(session)

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._session.infer(images)

    def time_ms(self) -> float:
        """ONNX Runtime takes and returns arrays of the host, so its own timing has the copies already."""
        session = self._session
        return session.end_to_end_ms() if isinstance(session, CopiesTimed) else session.time_ms()

    def __enter__(self) -> _WithCopies:
        self._session.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, error, trace)


def _with_copies(open_: Open) -> Open:
    return lambda: _WithCopies(open_())


def _energy_mj(session: Session, batch: int) -> float | None:
    """Energy of the whole board for one image at full rate, mJ; None where no sensor answers."""
    if total_w(rails_w()) is None:
        return None
    _inferences(session, ENERGY_S / 4)
    with Meter() as meter:
        count = _inferences(session, ENERGY_S)
    joules = meter.energy_j
    return None if joules is None else 1e3 * joules / (count * batch)


def _inferences(session: Session, seconds: float) -> int:
    """Run one inference after another for `seconds`; how many there were."""
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        session.time_ms()
        count += RUNS_PER_TIMING
    return count


def _row(
    candidate: LocalBundle,
    samples: Mapping[str, Sequence[float]],
    first: str,
    peak: Peak,
    cost: Costs,
) -> BenchRow:
    """The row of one bundle; `samples` in ms by bundle, `first` is the one that speed-ups are relative to."""
    mine, setup = samples[str(candidate.path)], candidate.setup
    return BenchRow(
        bundle=str(candidate.path),
        setup=setup,
        schedule=candidate.manifest.schedule,
        latency=Latency(samples_ms=tuple(mine), cuda_graph=cost.cuda_graph),
        speedup=Ratio(*bootstrap_ratio(samples[first], mine, paired=True)),
        gflop=_gflop(candidate),
        peak_gflop_per_s=peak.gflop_per_s if peak.setup.precision == setup.precision else None,
        peak_memory_mib=cost.peak_memory_mib,
        energy_per_image_mj=cost.energy_per_image_mj,
    )


def _gflop(candidate: LocalBundle) -> float | None:
    """10⁹ operations of the ONNX in a bundle; None, and a log line, where an operator cannot be counted."""
    try:
        return flops_of_onnx(candidate.path / ONNX) / 1e9
    except EngineError as error:
        log.warning("no GFLOP/s: %s", error)
        return None


def _name(gemm: Gemm) -> str:
    setup = gemm.setup
    parts = (setup.device, setup.runtime, setup.precision, setup.options or "default options")
    return f"matrix product, {gemm.size} x {gemm.size} ({', '.join(parts)})"


def _peak(gemm: Gemm, samples: Sequence[float]) -> Peak:
    """The rate of a matrix product at its best median, and the samples (ms) that show drift."""
    best_ms = min(gemm.searched_ms, float(np.median(samples)))
    return Peak(
        setup=gemm.setup,
        size=gemm.size,
        gflop_per_s=1e3 * gemm.gflop / best_ms,
        latency=Latency(samples_ms=tuple(samples)),
    )

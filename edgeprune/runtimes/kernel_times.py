"""How long a GPU takes for one kernel, from its public figures: the tail-effect model.

Output is cut into tiles, each computed by one thread block, and the blocks run on the multiprocessors (SMs) in waves.
The last wave takes as long as a full one, so latency over token counts is a staircase. A matmul runs with the fastest
of TILES and SPLITS:

    tiles      = ceil(rows / tile_rows) · ceil(cols / tile_cols) · count
    waves      = ceil(tiles · split / sm_count)
    step       = tile_rows · tile_cols / (fma_per_clock · ISSUED) + (tile_rows + tile_cols) · bytes / load
    clocks     = waves · (K · step + WAVE)
    compute_us = clocks / clock_mhz
    memory_us  = bytes of both operands and the output / (bandwidth · REACHED)
    time_us    = launch_us + max(compute_us, memory_us), and for split > 1 launch_us + the partial sums' memory_us

`load` is what the L2 cache gives one SM per clock. K is the inner dimension over `split`, in whole steps of SLICE.
Rows are counted in whole tiles for memory, too.
Fused attention has one tile per QUERIES queries and head, which passes over all keys, with one exponential for each
pair of query and key. An elementwise kernel takes launch_us plus its memory_us, with rows in whole groups of ROWS.
There are no caches, no overlap of kernels and no limit by power.

ISSUED, WAVE and REACHED were set by hand to suit four published latencies of an Orin Nano; launch_us is an
assumption, TILES, SPLITS and ROWS are simplifications. docs/benchmarks.md, "Simulated against published latencies",
says how far off it is: within 25 % for an Orin Nano, and for an A100 but for ViT-B in fp16 at batch 1.

Sources: NVIDIA, "Matrix Multiplication Background User's Guide" (tiles, waves, split-K); arXiv 2407.05941 on the tail
effect behind token pruning.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from edgeprune import devices
from edgeprune.errors import DeviceError
from edgeprune.onnx_graph.operations import Attention, Elementwise, Matmul, Operation
from edgeprune.records import Device, Simulation

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "int8": 1, "fp8": 1}
# Rows and columns of a thread block's output: the tiles of CUTLASS's and TensorRT's kernels for these precisions.
TILES = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (256, 64), (128, 256), (256, 128))
SPLITS = (1, 2, 4, 8)  # blocks that share the inner dimension of one tile
SLICE = 32  # inner elements per step of a block's main loop
EXPONENTIALS = 16  # per clock and SM ("CUDA C++ Programming Guide", arithmetic throughput of special functions)
QUERIES = 64  # of one tile of fused attention; keys are taken in steps of this number, too
WAVE = 1500  # clocks per wave before the main loop and after it
ISSUED = 0.85  # of the peak rate that a main loop reaches
ROWS = 64  # of an elementwise kernel, in whole groups: smaller steps would be below the noise of any measurement
REACHED = 0.7  # of the data sheet's bandwidth
FUSES_FROM = (7, 5)  # oldest compute capability with TensorRT's fused attention kernels


def latency_ms(operations: Iterable[Operation], device: Device, precision: str) -> float:
    """Time of kernels one after another, in ms.

    At int8 and fp8 only linear layers of blocks are that, all else is fp16, as exported. Attention is one kernel at
    these and at fp16, three at fp32. `tf32` is fp32 as TensorRT runs it by default, which edgeprune never does; it is
    there for comparison with published figures. Raises DeviceError for a device without a simulation or a precision
    it has no rate for.
    """
    gpu = _Gpu(device, precision)
    known: dict[Operation, float] = {}
    total = 0.0
    for operation in operations:
        if operation not in known:
            known[operation] = gpu.time_us(operation)
        total += known[operation]
    return total / 1e3


def model_of(device: Device, precision: str) -> tuple[Simulation, int]:
    """Constants and SM count of a device. Raises DeviceError where there are none."""
    if device.simulation is None or device.sm_count is None:
        known = [name for name in devices.names() if devices.load_device(name).simulation]
        raise DeviceError(f"device {device.name} has no simulation: use --simulate with {', '.join(known)}")
    known = [kind for kind in BYTES if kind in device.simulation.fma_per_clock_per_sm]
    if precision not in known:
        raise DeviceError(f"device {device.name} has no rate for {precision!r}: choose {', '.join(known)}")
    return device.simulation, device.sm_count


class _Gpu:
    """A device at a precision. Raises DeviceError as model_of does."""

    def __init__(self, device: Device, precision: str) -> None:
        self.model, self.sm_count = model_of(device, precision)
        rates, self.load = self.model.fma_per_clock_per_sm, self.model.l2_bytes_per_clock_per_sm
        self.linear = precision  # of linear layers in blocks
        self.other = "fp16" if BYTES[precision] == 1 and "fp16" in rates else precision
        self.fuses = self.other == "fp16" and devices.has_capability(device.compute_capability, FUSES_FROM)

    def time_us(self, operation: Operation) -> float:
        """Time of one kernel, µs."""
        launch = self.model.launch_us
        if isinstance(operation, Elementwise):
            rows = ceil(operation.rows / ROWS) * ROWS
            return launch + self._memory_us(rows * operation.values * BYTES[self.other])
        if isinstance(operation, Matmul):
            kind = self.linear if operation.linear else self.other
            quantise_us = 0.0
            if BYTES[kind] == 1 and operation.quantises:  # reads the values of the other precision, writes one byte
                quantise_us = self.time_us(Elementwise(operation.rows, ceil(1.5 * operation.inner)))
            return launch + quantise_us + self._matmul_us(operation, kind)
        if self.fuses:
            return launch + self._attention_us(operation)
        return sum(map(self.time_us, operation.parts()))

    def _matmul_us(self, matmul: Matmul, kind: str) -> float:
        rate, size = self.model.fma_per_clock_per_sm[kind], BYTES[kind]
        best = float("inf")
        for tile_rows, tile_cols in TILES:
            down, across = ceil(matmul.rows / tile_rows), ceil(matmul.cols / tile_cols)
            clocks = tile_rows * tile_cols / (rate * ISSUED) + (tile_rows + tile_cols) * size / self.load
            values = down * tile_rows * (matmul.inner + matmul.cols) + matmul.inner * matmul.cols
            memory_us = self._memory_us(values * matmul.count * size)
            sums_us = self._memory_us(2 * 4 * down * tile_rows * matmul.cols * matmul.count)  # fp32, write and read
            for split in SPLITS:
                waves = ceil(down * across * matmul.count * split / self.sm_count)
                inner = ceil(matmul.inner / (split * SLICE)) * SLICE
                time_us = max(waves * (inner * clocks + WAVE) / self.model.clock_mhz, memory_us)
                best = min(best, time_us + (self.model.launch_us + split * sums_us if split > 1 else 0.0))
        return best

    def _attention_us(self, attention: Attention) -> float:
        rate, size = self.model.fma_per_clock_per_sm[self.other], BYTES[self.other]
        keys = ceil(attention.keys / QUERIES) * QUERIES
        down = ceil(attention.queries / QUERIES)
        waves = ceil(down * attention.count / self.sm_count)
        clocks = 2 * QUERIES * keys * attention.dim / (rate * ISSUED) + QUERIES * keys / EXPONENTIALS
        clocks += 2 * (QUERIES + keys) * attention.dim * size / self.load
        values = 2 * (down * QUERIES + keys) * attention.dim * attention.count
        return max(waves * (clocks + WAVE) / self.model.clock_mhz, self._memory_us(values * size))

    def _memory_us(self, size_bytes: float) -> float:
        return size_bytes / (self.model.bandwidth_gb_per_s * 1e3 * REACHED)

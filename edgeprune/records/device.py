"""A target and its hardware."""

from __future__ import annotations

from edgeprune.records.base import Record


class Simulation(Record, frozen=True, kw_only=True):
    """Constants of the tail-effect model of a device (runtimes/kernel_times.py has the formula)."""

    clock_mhz: float
    fma_per_clock_per_sm: dict[str, int]  # by precision: fp32, tf32 (only for comparisons), fp16, int8, fp8
    bandwidth_gb_per_s: float
    launch_us: float  # of each kernel, in a CUDA graph
    # While all SMs read; one alone takes 64 ("NVIDIA A100 Tensor Core GPU Architecture" whitepaper)
    l2_bytes_per_clock_per_sm: float = 64


class TrtOptions(Record, frozen=True, kw_only=True):
    """Options of TensorRT's builder; the defaults are TensorRT's own except for the workspace."""

    optimization_level: int | None = None  # 0 to 5: how thoroughly it searches for fast kernels
    workspace_mib: int = 2048  # at most, and never more than a quarter of all memory
    tactic_sources: tuple[str, ...] | None = None  # names of tensorrt.TacticSource
    typing: str = "strong"  # strong: types as in the ONNX (from TensorRT 10) | weak
    dla_core: int | None = None  # setting it raises an error with the reason


class Device(Record, frozen=True, kw_only=True):
    """A target: its hardware, its runtime, and how its power state is read."""

    name: str
    title: str
    runtime: str  # key of runtimes.RUNTIMES
    build: bool = True  # False: too old to build for; --simulate works
    reason: str = ""  # why build is False
    compute_capability: str | None = None
    sm_count: int | None = None
    memory_gib: float | None = None
    tensorrt: str | None = None  # supported versions, for example ">=8.6,<12"
    jetpack: str | None = None
    power_query: str | None = None  # command that prints the power mode
    clocks_query: str | None = None
    machine: tuple[str, ...] = ()  # parts of a board's or a GPU's name that identify the device
    gpu: str | None = None  # part of the GPU's name, where docker hides /proc/device-tree/model
    image: str | None = None  # container image for the device half
    simulation: Simulation | None = None
    trt: TrtOptions | None = None

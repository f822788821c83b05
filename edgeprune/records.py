"""Frozen records that are passed from step to step; io.py loads and saves them.

Units are in the names. `tokens` always counts every token that a block passes on, including the prefix (CLS,
distillation, registers) and any fused or mean token. This holds everywhere, from the profiler to the ONNX shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import ClassVar, NamedTuple

import msgspec
import numpy as np

from edgeprune.stats import median_interval

SCHEMA = 1
# Above all real models and pictures: files are untrusted, and memory is allocated for the sizes in them.
MOST = 1e12  # for any figure
MOST_PX, MOST_UNITS, MOST_BLOCKS, MOST_CLASSES = 1 << 13, 1 << 17, 1 << 10, 1 << 20
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")
CROP_MODES = ("center", "squash")
TASKS = ("classify", "embed", "dense")  # what the output of a model is for (tasks.py)
ENGINE_FILES = ("model.engine", "model.onnx")
FILE_NAME = r"\w[\w.-]*"  # of a file in a bundle: no path, not hidden, cannot be mistaken for an option


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: immutable, keyword-only, unknown fields refused."""


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


Pixels = int | tuple[int, int]  # the side of a square, or (height, width) of what is no square


def sides_of(px: Pixels) -> tuple[int, int]:
    """(height, width)."""
    return (px, px) if isinstance(px, int) else px


def pixels_of(height: int, width: int) -> Pixels:
    """One number for a square."""
    return height if height == width else (height, width)


def text_of(px: Pixels) -> str:
    """224, or 96x160 for a height of 96."""
    return str(px) if isinstance(px, int) else "x".join(map(str, px))


def check_pixels(px: Pixels, most: int) -> None:
    """Raise ValueError for sides outside 1 to `most`, and for a square that is given as two numbers."""
    sides = sides_of(px)
    if not 0 < min(sides) <= max(sides) <= most or pixels_of(*sides) != px:
        raise ValueError(f"a size is 1 to {most} px: one number, or two different ones, not {px}")


class Preprocessing(Record, frozen=True, kw_only=True):
    """How a picture becomes the input of the network, as in timm's eval transform.

    It is resized to `resize_px` and its middle cropped to `image_px`. "squash" resizes to exactly `resize_px`;
    "center" keeps the ratio of the sides, and the picture just covers `resize_px`: of a square, its shorter side is
    that of the square.
    """

    image_px: Pixels  # the network's input
    resize_px: Pixels
    interpolation: str  # bicubic | bilinear | nearest | lanczos
    crop_mode: str  # center | squash
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS or self.crop_mode not in CROP_MODES:
            raise ValueError(f"interpolation is one of {INTERPOLATIONS}, crop_mode one of {CROP_MODES}")
        check_pixels(self.image_px, MOST_PX)
        check_pixels(self.resize_px, 4 * MOST_PX)
        if not all(np.isfinite((*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError("mean is finite, std above 0")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input, pixels."""
        return sides_of(self.image_px)


class Output(NamedTuple):
    """An output of a model with dense features: its name in the ONNX, and its shape without the batch."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Values for one picture."""
        return prod(self.shape)


class Vit(Record, frozen=True, kw_only=True):
    """The shape and identity of one Vision Transformer."""

    name: str
    weights_sha256: str
    family: str
    image_px: Pixels
    patch_px: int
    depth: int
    width: int
    heads: int
    head_dim: int
    mlp_width: int
    mlp_matrices: int = 2  # 3 for gated (SwiGLU) MLPs, whose first layer is twice as wide
    prefix: int  # CLS, distillation and register tokens
    tokens: int  # tokens entering block 0, prefix included
    classes: int
    prefix_pooled: bool  # the outputs need only the prefix tokens
    layers: tuple[int, ...] = ()  # blocks, from 1, whose patch features are outputs; empty where none are

    def __post_init__(self) -> None:
        sizes = (self.depth, self.width, self.heads, self.head_dim, self.mlp_width, self.mlp_matrices, self.patch_px)
        if min(sizes) < 1 or max(sizes) > MOST_UNITS or self.depth > MOST_BLOCKS:
            raise ValueError(f"sizes are 1 to {MOST_UNITS}, blocks 1 to {MOST_BLOCKS}")
        check_pixels(self.image_px, MOST_PX)
        if not (0 < self.tokens <= MOST_UNITS and 0 < self.classes <= MOST_CLASSES):
            raise ValueError(f"tokens are 1 to {MOST_UNITS}, classes 1 to {MOST_CLASSES}")
        if not 0 <= self.prefix < self.tokens:
            raise ValueError(f"prefix {self.prefix} must be below tokens {self.tokens}")
        if self.layers:
            if (
                list(self.layers) != sorted(set(self.layers))
                or not 1 <= self.layers[0] <= self.layers[-1] <= self.depth
            ):
                raise ValueError(f"layers are ascending numbers of blocks, 1 to {self.depth}")
            if self.prefix_pooled or prod(self.grid) != self.tokens - self.prefix:
                raise ValueError("features of layers need every patch of the grid")

    @property
    def outputs(self) -> tuple[Output, ...]:
        """With `layers`, all outputs in the order in which arrays of several outputs are packed; else empty."""
        features = tuple(Output(f"features_{layer}", (*self.grid, self.width)) for layer in self.layers)
        return (*features, Output("embedding", (self.classes,))) if features else ()

    @property
    def values(self) -> int:
        """Values that the model gives for one picture."""
        return sum(output.size for output in self.outputs) or self.classes

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input, pixels."""
        return sides_of(self.image_px)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches; the body tokens before the first cut, row by row."""
        height, width = self.size
        return height // self.patch_px, width // self.patch_px


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


def check_figures(values: Iterable[float | None], least: float = 1e-9) -> None:
    """Raise ValueError unless every value that is not None is between `least` and MOST: files are untrusted."""
    for value in values:
        if value is not None and not least <= value <= MOST:
            raise ValueError(f"{value} is not within {least:g} to {MOST:g}")


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


class Point(Record, frozen=True, kw_only=True):
    """Latency of the whole trunk (all blocks) run at a constant token count."""

    tokens: int
    latency: Latency


class CutCost(Record, frozen=True, kw_only=True):
    """What one cut adds to a block beyond attention at `tokens_in` and MLP at `tokens_out`, ms."""

    tokens_in: int
    tokens_out: int
    cost_ms: float


class LastShare(Record, frozen=True, kw_only=True):
    """Latency of a last block that computes only the prefix, as a share of the whole block's at `tokens`."""

    tokens: int
    share: float


class GpuState(Record, frozen=True, kw_only=True):
    """What decides a GPU's speed at one moment; None where that is unknown."""

    clock_mhz: float | None = None
    temperature_c: float | None = None
    throttles: tuple[str, ...] = ()  # what lowers its clocks now
    events: dict[str, int] = {}  # by cause: how often (Jetson) or for how many ms clocks were lowered so far


class Conditions(Record, frozen=True, kw_only=True):
    """The GPU before and after one stage of probing."""

    before: GpuState
    after: GpuState

    @property
    def throttled(self) -> tuple[str, ...]:
        """Why clocks were lowered during the stage, or at one of its ends; empty where they were not."""
        counted = [k for k, n in self.after.events.items() if n > self.before.events.get(k, n)]
        return tuple(sorted({*counted, *self.before.throttles, *self.after.throttles}))


class DepthCheck(Record, frozen=True, kw_only=True):
    """The latency of the trunk as a linear function of that of two of its blocks."""

    slope: float
    offset_ms: float
    off: float  # largest relative error at token counts that the function was not fitted on

    def __post_init__(self) -> None:
        if not (self.slope > 0 and self.off >= 0):
            raise ValueError("a depth check has a slope above 0 and an error that is not below")

    def trunk_ms(self, pair_ms: float) -> float:
        """The latency of the trunk, ms, from that of two blocks."""
        return self.slope * pair_ms + self.offset_ms


class Staircase(Record, frozen=True, kw_only=True):
    """Measured latency over token counts on one setup; independent of the kind of hardware."""

    schema: int = SCHEMA
    vit: Vit
    setup: Setup
    fixed: Latency  # embedding and head
    dense: Latency  # the whole unpruned model, in the same rounds
    points: tuple[Point, ...]  # ascending token counts, the unpruned count included
    cuts: dict[str, tuple[CutCost, ...]] = {}  # by method
    last: tuple[LastShare, ...] = ()  # empty where the head reads more than the prefix
    depth: DepthCheck | None = None  # where two blocks were timed and not the whole trunk
    conditions: tuple[Conditions, ...] = ()  # by stage; empty where the machine does not report them

    def __post_init__(self) -> None:
        counts = [p.tokens for p in self.points]
        if counts != sorted(set(counts)) or not counts:
            raise ValueError("points need ascending, distinct token counts")
        if counts[-1] != self.vit.tokens:
            raise ValueError(f"points must include the unpruned count {self.vit.tokens}")

    @property
    def probes(self) -> int:
        """Latency measurements taken (samples of all points)."""
        return sum(len(p.latency.samples_ms) for p in self.points)

    @property
    def throttled(self) -> bool | None:
        """Were the GPU's clocks lowered while it was measured? None where that is unknown, for lack of counters."""
        if any(c.throttled for c in self.conditions):
            return True
        return False if self.conditions and all(c.after.events for c in self.conditions) else None


class Schedule(Record, frozen=True, kw_only=True):
    """The number of tokens that leave each block; it never rises."""

    schema: int = SCHEMA
    vit: Vit
    method: str
    policy: str
    tokens: tuple[int, ...]
    prefix_last: bool = False  # the last block computes only the prefix (lossless)
    predicted_ms: float | None = None
    staircase_sha256: str | None = None

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.vit, self.prefix_last)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Indices of the blocks that remove tokens."""
        before = (self.vit.tokens, *self.tokens)
        return tuple(i for i, n in enumerate(self.tokens) if n < before[i])


def check_tokens(tokens: Sequence[int], vit: Vit, prefix_last: bool = False) -> None:
    """Raise ValueError unless `tokens` is a schedule of `vit`: one count per block, never rising, above the prefix.

    With `prefix_last` the last count is that of the tokens entering the last block, and the head must read only the
    prefix.
    """
    if prefix_last and not vit.prefix_pooled:
        raise ValueError(f"the head of {vit.name} reads more than the prefix: it needs the whole last block")
    if prefix_last and len(tokens) > 1 and tokens[-1] != tokens[-2]:
        raise ValueError("a last block that computes only the prefix cannot remove tokens")
    if len(tokens) != vit.depth:
        raise ValueError(f"{len(tokens)} token counts for {vit.depth} blocks")
    before = vit.tokens
    for block, count in enumerate(tokens):
        if count > before:
            raise ValueError(f"tokens rise from {before} to {count} in block {block}")
        if count < vit.prefix + 1:
            raise ValueError(f"block {block} keeps {count}, below prefix + 1 = {vit.prefix + 1}")
        before = count


class Engine(Record, frozen=True, kw_only=True):
    """A compiled model; `path` is relative to the folder that holds it."""

    path: str
    sha256: str
    onnx_sha256: str
    size_bytes: int
    setup: Setup


class Int8Ranges(Record, frozen=True, kw_only=True):
    """INT8 calibration: the largest magnitude of each activation, and the layers that stay in floating point."""

    way: str  # percentile | entropy
    ranges: dict[str, float]
    kept: tuple[str, ...]  # layers for which quantisation loses too much
    kl: float  # to the fp32 model on the calibration pictures, nats; 1 - cosine of embeddings


class ClassFidelity(Record, frozen=True, kw_only=True, tag_field="task", tag="classify"):
    """Class predictions against those of the unpruned model on the same pictures; None where unknown."""

    cosine: ClassVar[None] = None
    kl: float | None = None  # nats
    agreement: float | None = None  # percent
    top1: float | None = None  # percent

    def __post_init__(self) -> None:
        check_figures([self.kl, self.agreement, self.top1], -1.0)


class EmbedFidelity(Record, frozen=True, kw_only=True, tag_field="task", tag="embed"):
    """Embeddings against those of the unpruned model on the same pictures; None where unknown, shares in percent."""

    kl: ClassVar[None] = None
    cosine: float | None = None  # mean over pictures
    cosine_p1: float | None = None  # 1st percentile over pictures
    neighbour_agreement: float | None = None  # the nearest other picture is the same
    recall5: float | None = None  # of the 5 nearest other pictures
    knn_top1: float | None = None  # leave-one-out with the labels of the pictures
    dense_knn_top1: float | None = None
    zero_shot_agreement: float | None = None  # the nearest of the given text embeddings is the same
    zero_shot_top1: float | None = None  # it is that of the label
    dense_zero_shot_top1: float | None = None

    def __post_init__(self) -> None:
        check_figures(msgspec.structs.astuple(self), -1.0)

    @property
    def agreement(self) -> float | None:
        """What stands in the place of the agreement of classes, percent."""
        return self.neighbour_agreement

    @property
    def top1(self) -> float | None:
        """What stands in the place of top-1, percent."""
        return self.knn_top1


class LayerFidelity(Record, frozen=True, kw_only=True):
    """Patch features of one layer against those of the unpruned model, on the full grid."""

    layer: int
    error: float  # length of the difference, all pictures together, relative to that of the unpruned features
    cosine: float  # mean over patches

    def __post_init__(self) -> None:
        check_figures([self.error, self.cosine], -1.0)


class DenseFidelity(Record, frozen=True, kw_only=True, tag_field="task", tag="dense"):
    """Patch features, and a head on them if one was given, against the unpruned ones; None where unknown."""

    kl: ClassVar[None] = None
    cosine: ClassVar[None] = None
    agreement: ClassVar[None] = None
    top1: ClassVar[None] = None
    error: float | None = None  # relative error of the head's output; without a head root mean square over layers
    layers: tuple[LayerFidelity, ...] = ()
    embedding_cosine: float | None = None  # mean over pictures
    head_error: float | None = None
    head_difference: float | None = None  # mean absolute difference of the head's output, in its unit

    def __post_init__(self) -> None:
        check_figures([self.error, self.embedding_cosine, self.head_error, self.head_difference], -1.0)


Fidelity = ClassFidelity | EmbedFidelity | DenseFidelity


class Unrecovered(Record, frozen=True, kw_only=True):
    """Figures of the same schedule with the original weights, on the same pictures as those of the report.

    Each error is the standard error of the mean change by recovery, paired by picture, in the unit of its figure.
    KL is of classes, cosine of embeddings, error of dense features, for which `features` has all figures.
    """

    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    top1: float | None = None
    error: float | None = None
    agreement_error: float | None = None
    kl_error: float | None = None
    cosine_error: float | None = None
    top1_error: float | None = None
    error_error: float | None = None
    features: DenseFidelity | None = None

    def __post_init__(self) -> None:
        check_figures([self.agreement, self.kl, self.cosine, self.top1, self.error], -1.0)
        check_figures(
            [self.agreement_error, self.kl_error, self.cosine_error, self.top1_error, self.error_error], 0.0
        )


class Report(Record, frozen=True, kw_only=True):
    """Measured figures: latency in ms, top-1 and agreement in percent, KL in nats; None where unknown.

    Of embeddings, top-1 is that of k nearest neighbours, agreement that of the nearest neighbour, and KL is None. Of
    dense features all four are None.
    """

    latency: Latency
    dense_latency: Latency | None = None
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None
    agreement: float | None = None
    kl: float | None = None
    top1: float | None = None
    dense_top1: float | None = None
    fidelity: Fidelity | None = None  # all figures of the task; None without pictures
    images: int = 0
    held_out: bool | None = None  # figures are of pictures used for nothing but to accept a precision; None: unknown
    probes: int = 0
    predicted_ms: float | None = None
    fusable_attention: int | None = None  # attention layers in the form that TensorRT fuses
    fused_attention: int | None = None  # those that the engine runs as one kernel; None: unknown
    unrecovered: Unrecovered | None = None  # None where the weights were not tuned

    def __post_init__(self) -> None:
        check_figures([self.speedup, *(self.speedup_interval or ()), self.predicted_ms])
        check_figures([self.agreement, self.kl, self.top1, self.dense_top1, self.images, self.probes], -1.0)


class Recovery(Record, frozen=True, kw_only=True):
    """How the weights of a pruned model were tuned to the unpruned one (vit/recovery.py).

    The loss is the KL in nats, 1 - cosine of embeddings, or the squared relative error of dense features.
    """

    task: str = "classify"
    images: int  # pictures that were used, those held out to choose the best state included
    validation_images: int  # of these, never trained on: all losses here are on them
    epochs: int  # of the state that was kept; 0: none was better, the weights are the original ones
    kl_before: float | None = None  # of classes alone
    kl_after: float | None = None
    curve: tuple[float, ...]  # loss before the first epoch and after each
    rate: float  # largest learning rate
    fake_int8: bool = False  # were linear layers computed with the rounding of INT8?
    seed: int
    weights_sha256: str  # of the kept weights

    def __post_init__(self) -> None:
        check_figures([self.kl_before, self.kl_after, *self.curve], -1.0)
        check_figures([self.images, self.validation_images], 1.0)
        check_task(self.task)
        if not 0 <= self.epochs < len(self.curve):
            raise ValueError("the curve needs a loss for every epoch")


class PrecisionResult(Record, frozen=True, kw_only=True):
    """A precision that `--precision auto` tried; figures as in Report, None where unknown."""

    precision: str
    latency: Latency | None = None  # of the pruned model; all of one build were timed together
    top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    error: float | None = None  # of dense features
    accepted: bool = False
    reason: str | None = None  # why it was not chosen


def check_task(task: str, labels: Sequence[str] | None = None, classes: int = 0) -> None:
    """Raise ValueError for an unknown task, or where `labels` do not name `classes` classes (none for embeddings)."""
    if task not in TASKS:
        raise ValueError(f"the task is one of {TASKS}, not {task!r}")
    classes = classes if task == "classify" else 0
    if labels is not None and len(labels) != classes:
        raise ValueError(f"{len(labels)} labels for {classes} classes")


class ModelMetadata(Record, frozen=True, kw_only=True):
    """Metadata in an ONNX file: everything that a bundle needs besides the graph."""

    schema: int = SCHEMA
    task: str = "classify"
    vit: Vit
    schedule: Schedule
    preprocessing: Preprocessing
    labels: tuple[str, ...]  # names of the classes; empty for embeddings
    recovery: Recovery | None = None

    def __post_init__(self) -> None:
        check_task(self.task)


class Candidate(Record, frozen=True):
    """A schedule with its predicted latency (ms) and its fidelity on the search pictures, as in Report."""

    tokens: tuple[int, ...]
    predicted_ms: float
    kl: float | None  # of classes
    agreement: float | None
    top1: float | None
    cosine: float | None = None  # of embeddings
    error: float | None = None  # of dense features

    def __post_init__(self) -> None:
        check_figures([self.predicted_ms])
        check_figures([self.kl, self.agreement, self.top1, self.cosine, self.error], -1.0)
        if (self.kl, self.cosine, self.error).count(None) != 2 or (self.agreement is None) != (
            self.error is not None
        ):
            raise ValueError("a candidate has a KL, a cosine or an error, and the first two an agreement")

    @property
    def loss(self) -> float:
        """What the search makes small: KL in nats, 1 - cosine, or the squared relative error."""
        if self.error is not None:
            return self.error**2
        if self.kl is not None:
            return self.kl
        assert self.cosine is not None
        return 1 - self.cosine

    @property
    def accuracy(self) -> float:
        """What the utility of a goal counts: the agreement, of dense features 1 - relative error; percent."""
        if self.agreement is not None:
            return self.agreement
        assert self.error is not None
        return 100 * max(1 - self.error, 0.0)


class Trial(Record, frozen=True, kw_only=True):
    """A schedule that was built, with its predicted and its measured latency."""

    tokens: tuple[int, ...]
    predicted_ms: float
    latency: Latency

    def __post_init__(self) -> None:
        check_figures([self.predicted_ms])


class Sample(Record, frozen=True, kw_only=True):
    """A picture of the evaluation set, and which token holds each patch after every cut."""

    picture: bytes  # a PNG or JPEG file
    label: str | None = None
    unpruned: str | None = None  # class predicted by the unpruned model; None for embeddings
    pruned: str | None = None
    cosine: float | None = None  # to the unpruned embedding; None for classes
    error: float | None = None  # relative error of dense features; None for the others
    groups: tuple[
        tuple[int, ...], ...
    ]  # by cut and patch (row by row): index of the token that holds the patch, -1: none

    def __post_init__(self) -> None:
        if any(len(cut) != len(self.groups[0]) for cut in self.groups):
            raise ValueError("groups need the same number of patches after every cut")


class BuildTrace(Record, frozen=True, kw_only=True):
    """How a build chose its schedule: what it evaluated, what it built, and the effect on a few pictures."""

    schema: int = SCHEMA
    asked: str = ""  # the goal
    candidates: tuple[Candidate, ...] = ()  # empty where nothing was searched
    trials: tuple[Trial, ...] = ()
    samples: tuple[Sample, ...] = ()  # empty without pictures, or where nothing is cut


class Manifest(Record, frozen=True, kw_only=True):
    """The manifest of a bundle: everything needed to check, run and rebuild it."""

    schema: int = SCHEMA
    task: str = "classify"
    edgeprune: str
    code: str = ""  # hash of the sources that wrote it
    vit: Vit
    engine: Engine
    schedule: Schedule
    report: Report
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    recovery: Recovery | None = None  # None where the weights are those of the model
    files: dict[str, str]  # name in the bundle -> sha256
    tolerance: float  # largest allowed difference between the golden output and a run

    def __post_init__(self) -> None:
        check_task(self.task, self.labels, self.vit.classes)
        if self.engine.path not in ENGINE_FILES:
            raise ValueError(f"the engine is one of {ENGINE_FILES}, not {self.engine.path!r}")
        for name in self.files:
            if not re.fullmatch(FILE_NAME, name):
                raise ValueError(f"{name!r} is not a valid name of a file in a bundle")


# Called with what is being done, how many items are done, and how many there are. A `what` may end with the unit
# ("measuring 14 token counts, round"), after which the command line puts "3 of 27". What is in brackets behind it
# may change while the work goes on.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""

"""The tail-effect model: latencies of a device from its public figures, deterministic, no hardware needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune import devices
from edgeprune.errors import DeviceError, EngineError, MissingError
from edgeprune.io import replacing, sha256_file
from edgeprune.onnx_graph.matmuls import Matmul, matmuls_of_onnx
from edgeprune.records import Device, Engine, Progress, Setup, Simulation, Vit, silent
from edgeprune.version import __version__

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

SLICE = 64  # inner elements per step of a thread block's main loop
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def matmuls_of_trunk(vit: Vit, tokens: int, batch: int) -> list[Matmul]:
    """The matrix products of all blocks of `vit` at a constant `tokens` (prefix included)."""
    rows, inside, gated = batch * tokens, vit.heads * vit.head_dim, vit.mlp_matrices - 1
    block = [
        Matmul(rows, 3 * inside, vit.width, weight=True),
        Matmul(tokens, tokens, vit.head_dim, batch * vit.heads),
        Matmul(tokens, vit.head_dim, tokens, batch * vit.heads),
        Matmul(rows, vit.width, inside, weight=True),
        Matmul(rows, gated * vit.mlp_width, vit.width, weight=True),
        Matmul(rows, vit.width, vit.mlp_width, weight=True),
    ]
    return block * vit.depth


def matmuls_of_ends(vit: Vit, batch: int) -> list[Matmul]:
    """The matrix products outside the blocks: patch embedding and head."""
    patches = (vit.image_px // vit.patch_px) ** 2
    return [
        Matmul(batch * patches, vit.width, 3 * vit.patch_px**2, weight=True),
        Matmul(batch, vit.classes, vit.width, weight=True),
    ]


def latency_ms(matmuls: Iterable[Matmul], device: Device, precision: str) -> float:
    """Time of the matrix products one after another, in ms, by the formula of SimulatedRuntime.

    Raises DeviceError for a device without a simulation or a precision it has no rate for.
    """
    model, sm_count = _model(device, precision)
    rates = model.fma_per_clock_per_sm
    rows, cols = model.tile
    total_us = 0.0
    for matmul in matmuls:
        kind = "fp16" if precision == "int8" and not matmul.weight and "fp16" in rates else precision
        tiles = ceil(matmul.rows / rows) * ceil(matmul.cols / cols) * matmul.count
        steps = ceil(tiles / sm_count) * rows * cols * ceil(matmul.inner / SLICE) * SLICE
        math_us = steps / (rates[kind] * model.clock_mhz)
        read = matmul.inner * matmul.cols * matmul.count * BYTES[kind] if matmul.weight else 0
        total_us += model.launch_us + max(math_us, read / (model.bandwidth_gb_per_s * 1e3))
    return total_us / 1e3


def _model(device: Device, precision: str) -> tuple[Simulation, int]:
    """Constants and SM count of a device. Raises DeviceError where there are none."""
    if device.simulation is None or device.sm_count is None:
        known = [name for name in devices.names() if devices.load_device(name).simulation]
        raise DeviceError(f"device {device.name} has no simulation: use --simulate with {', '.join(known)}")
    known = [kind for kind in BYTES if kind in device.simulation.fma_per_clock_per_sm]
    if precision not in known:
        raise DeviceError(f"device {device.name} has no rate for {precision!r}: choose {', '.join(known)}")
    return device.simulation, device.sm_count


class _Timed:
    """Base of the sessions below: the latency is computed once, there is nothing to free."""

    def __init__(self, matmuls: Iterable[Matmul], device: Device, precision: str) -> None:
        self._ms = latency_ms(matmuls, device, precision)

    def time_ms(self) -> float:
        """Simulated latency of one inference, ms; the same each time."""
        return self._ms

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class SimulatedMatmuls(_Timed):
    """A list of matrix products timed like a session, without torch or an ONNX file.

    Raises DeviceError as latency_ms does.
    """

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raises EngineError: a list of matrix products has no weights to compute with."""
        raise EngineError("a simulated trunk cannot infer: open an exported ONNX file")


class SimulatedSession(_Timed):
    """Simulated latency, real outputs: `infer` runs the ONNX on this CPU."""

    def __init__(self, path: Path, device: Device, precision: str) -> None:
        super().__init__(matmuls_of_onnx(path), device, precision)
        self.path = path
        self._ort: Any = None

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs of one static batch: (B, 3, H, W) to (B, classes) for a model that build exports.

        Raises EngineError on a wrong shape, MissingError without ONNX Runtime.
        """
        if self._ort is None:
            self._ort = _onnx_runtime(self.path)
        wanted = self._ort.get_inputs()[0]
        if list(images.shape) != list(wanted.shape):
            raise EngineError(f"{self.path}: input is {list(images.shape)}: pass {list(wanted.shape)}")
        kind = np.float16 if "float16" in wanted.type else np.float32
        return np.asarray(self._ort.run(None, {wanted.name: images.astype(kind)})[0], dtype=np.float32)


def _onnx_runtime(path: Path) -> Any:
    """ONNX Runtime's CPU session of a file. Raises MissingError, EngineError."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingError('ONNX Runtime is not installed: pip install "edgeprune[ort]"') from None
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base below this one
        detail = " ".join(str(error).split())[:200]
        raise EngineError(f"{path}: ONNX Runtime cannot load it ({detail}): export it again") from None


class SimulatedRuntime:
    """The tail-effect model of a device, used instead of its runtime.

    Every matrix product is cut into output tiles of `tile` rows × columns, for each item of its batch and
    each head; each tile is one thread block, and blocks fill the SMs in waves. The last wave costs as much
    as a full one, so latency over token counts is a staircase:

        tiles     = ceil(rows / tile_rows) · ceil(cols / tile_cols) · count
        waves     = ceil(tiles / sm_count)
        math_us   = waves · tile_rows · tile_cols · K / (fma_per_clock_per_sm · clock_mhz)
        time_us   = launch_us + max(math_us, weight bytes / bandwidth)

    K is the inner dimension rounded up to whole steps of SLICE, the granularity of a block's main loop.
    Linear layers count the batch as rows. Elementwise operators, normalisations and softmax are taken as
    fused into the matrix products and cost nothing; top-k, argmax, one-hot and gathers by computed indices cost one
    launch. At int8 products of two activations run at the fp16 rate: only linear layers are quantised.

    It models no caches, no choice of tile per matrix and no overlap: it is good for where the steps are, not for
    absolute times. Sources: NVIDIA, "Matrix Multiplication Background User's Guide", Dimension Quantization
    Effects (tile and wave quantization); arXiv 2407.05941 on the GPU tail effect behind token pruning.
    """

    suffix, parity = ".onnx", 1e-4

    def __init__(self, device: Device) -> None:
        self.device = device

    def setup(self, device: Device, precision: str, batch: int) -> Setup:
        """The setup of simulated latencies. Raises DeviceError as latency_ms does."""
        _model(device, precision)
        return Setup(
            device=device.name,
            machine=f"{device.title} (simulated)",
            runtime="simulated",
            runtime_version=__version__,
            precision=precision,
            batch=batch,
            noiseless=True,
        )

    def compile(self, onnx: Path, setup: Setup, out: Path, progress: Progress = silent) -> Engine:
        """Check that the model covers the ONNX file and copy it to `out`. Raises EngineError, OutputError."""
        matmuls_of_onnx(onnx)
        with replacing(out) as temporary:
            shutil.copyfile(onnx, temporary)
        digest, size = sha256_file(out), out.stat().st_size
        return Engine(path=out.name, sha256=digest, onnx_sha256=digest, size_bytes=size, setup=setup)

    def free_bytes(self) -> int | None:
        """No limit: nothing is loaded."""
        return None

    def open(self, path: Path, setup: Setup) -> SimulatedSession:
        """Load a compiled file. Raises EngineError, DeviceError."""
        return SimulatedSession(path, self.device, setup.precision)

"""The tail-effect model: latencies of a device from its public figures, deterministic, no hardware needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.features import packed
from edgeprune.io import replacing
from edgeprune.onnx_graph.onnx_runtime import outputs_of, session_of
from edgeprune.onnx_graph.operations import Attention, Elementwise, Matmul, Operation, operations_of_onnx
from edgeprune.records import Device, Progress, Setup, Vit, silent
from edgeprune.runtimes.kernel_times import latency_ms, model_of
from edgeprune.version import __version__

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self


def operations_of_trunk(vit: Vit, tokens: int, batch: int) -> list[Operation]:
    """The kernels of all blocks of `vit` at a constant `tokens` (prefix included): those of its exported trunk."""
    rows, inside, gated = batch * tokens, vit.heads * vit.head_dim, vit.mlp_matrices - 1
    norm = Elementwise(rows, 4 * vit.width)  # reads two summands, writes their sum and its norm
    block: list[Operation] = [
        Matmul(rows, 3 * inside, vit.width, linear=True),
        Attention(tokens, tokens, vit.head_dim, batch * vit.heads),
        Matmul(rows, vit.width, inside, linear=True, quantises=True),
        norm,
        Matmul(rows, gated * vit.mlp_width, vit.width, linear=True),
        Matmul(rows, vit.width, vit.mlp_width, linear=True, quantises=True),
    ]
    inner: list[Operation] = [*block, norm] * (vit.depth - 1)
    return [Elementwise(rows, 2 * vit.width), *inner, *block, Elementwise(rows, 3 * vit.width)]


def operations_of_ends(vit: Vit, batch: int) -> list[Operation]:
    """The kernels outside the blocks: patch embedding with positions, last norm and head."""
    rows, columns = vit.grid
    patches = rows * columns
    return [
        Matmul(batch * patches, vit.width, 3 * vit.patch_px**2),
        Elementwise(batch * vit.tokens, 2 * vit.width),
        Elementwise(batch * vit.tokens, 2 * vit.width),
        Matmul(batch, vit.classes, vit.width),
    ]


class _Timed:
    """Base of the sessions below: the latency is computed once, there is nothing to free."""

    def __init__(self, operations: Iterable[Operation], device: Device, precision: str) -> None:
        self._ms = latency_ms(operations, device, precision)

    def time_ms(self) -> float:
        """Simulated latency of one inference, ms; the same each time."""
        return self._ms

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class SimulatedKernels(_Timed):
    """A list of kernels timed like a session, without torch or an ONNX file.

    Raises DeviceError as latency_ms does.
    """

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raises EngineError: a list of kernels has no weights to compute with."""
        raise EngineError("a simulated trunk cannot infer: open an exported ONNX file")


class SimulatedSession(_Timed):
    """Simulated latency, real outputs: `infer` runs the ONNX on this CPU."""

    def __init__(self, path: Path, device: Device, precision: str) -> None:
        super().__init__(operations_of_onnx(path), device, precision)
        self.path = path
        self._ort: Any = None

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs of one static batch: (B, 3, H, W) to (B, values) for a model that build exports.

        Raises EngineError on a wrong shape, MissingError without ONNX Runtime.
        """
        if self._ort is None:
            self._ort = session_of(self.path)
        wanted = self._ort.get_inputs()[0]
        if list(images.shape) != list(wanted.shape):
            raise EngineError(f"{self.path}: input is {list(images.shape)}: pass {list(wanted.shape)}")
        kind = np.float16 if "float16" in wanted.type else np.float32
        found = outputs_of(self._ort, None, {wanted.name: images.astype(kind)}, self.path)
        return packed({o.name: array for o, array in zip(self._ort.get_outputs(), found, strict=True)})


class SimulatedRuntime:
    """The tail-effect model of a device (runtimes/kernel_times.py), used instead of its runtime.

    The kernels of an ONNX file are taken one after another, fused as onnx_graph/operations.py says. The ONNX file is
    always fp32; the precision is applied here. docs/benchmarks.md, "Simulated against published latencies", says how
    far off it is.
    """

    suffix, parity = ".onnx", 1e-4

    def __init__(self, device: Device) -> None:
        self.device = device

    def setup(self, device: Device, precision: str, batch: int) -> Setup:
        """The setup of simulated latencies. Raises DeviceError as latency_ms does."""
        model_of(device, precision)
        return Setup(
            device=device.name,
            machine=f"{device.title} (simulated)",
            runtime="simulated",
            runtime_version=__version__,
            precision=precision,
            batch=batch,
            noiseless=True,
        )

    def compile(self, onnx: Path, setup: Setup, out: Path, progress: Progress = silent) -> None:
        """Check that the model covers the ONNX file and copy it to `out`. Raises EngineError, OutputError."""
        operations_of_onnx(onnx)
        with replacing(out) as temporary:
            shutil.copyfile(onnx, temporary)

    def free_bytes(self) -> int | None:
        """No limit: nothing is loaded."""
        return None

    def open(self, path: Path, setup: Setup) -> SimulatedSession:
        """Load a compiled file. Raises EngineError, DeviceError."""
        return SimulatedSession(path, self.device, setup.precision)

"""TensorRT: compiles ONNX to plans and runs them, timed with CUDA events. The only module that uses pycuda."""

from __future__ import annotations

import atexit
import logging
import re
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from edgeprune.devices import check_is_here, this_machine
from edgeprune.devices.power import power_mode
from edgeprune.errors import DeviceError, EngineError, MissingError
from edgeprune.io import read_bytes, replacing, sha256_file, writable
from edgeprune.records import Device, Engine, Progress, Setup, TrtOptions, silent
from edgeprune.runtimes.cuda_graph import Graph
from edgeprune.runtimes.trt_builder import fusion_of, make_logger, plan_from_onnx, plan_refusal, tensorrt

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

DTYPES = {"FLOAT": "f4", "HALF": "f2", "INT32": "i4", "INT64": "i8", "BOOL": "?"}  # by name: nptype is broken on 8.6
MAX_PLAN_BYTES = 8 << 30
GRAPH_WARMUP = 2  # inferences before a capture: kernels must not be loaded during it


class TensorRT:
    """TensorRT 8.6, 10 and 11."""

    suffix, parity = ".engine", 2e-3

    def __init__(self, device: Device) -> None:
        self.device = device
        self.options = device.trt or TrtOptions()

    def setup(self, device: Device, precision: str, batch: int) -> Setup:
        """The setup here. Raises DeviceError for another machine or TensorRT, MissingError."""
        check_is_here(device)
        version = str(tensorrt().__version__)
        if device.tensorrt and not fits(version, device.tensorrt):
            source = f"JetPack {device.jetpack}" if device.jetpack else "such a version"
            raise DeviceError(
                f"device {device.name} needs TensorRT {device.tensorrt}, this is {version}: install "
                f"{source}, or pass your own .toml device file"
            )
        return Setup(
            device=device.name,
            machine=this_machine(),
            runtime="trt",
            runtime_version=version,
            precision=precision,
            batch=batch,
            power_mode=power_mode(device),
            compute_capability="{}.{}".format(*_gpu().compute_capability()),
            options=changed_options(self.options),
        )

    def compile(self, onnx: Path, setup: Setup, out: Path, progress: Progress = silent) -> Engine:
        """Build a plan; its log is written next to it as .log. Raises EngineError, OutputError."""
        free = _driver().mem_get_info()[0]
        logger = make_logger(tensorrt())
        slug = re.sub(r"[^a-z0-9]+", "-", f"{setup.machine} {setup.runtime_version}".lower()).strip("-")[:120]
        try:
            plan = plan_from_onnx(
                onnx, setup.precision, self.options, free, out.parent / f"timing-{slug}.cache", logger, progress
            )
        finally:
            with writable(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                text = "".join(f"{severity}: {line}\n" for severity, line in logger.lines)
                out.with_suffix(".log").write_text(text)
        with replacing(out) as temporary, writable(out):
            temporary.write_bytes(plan)
        return Engine(
            path=out.name,
            sha256=sha256_file(out),
            onnx_sha256=sha256_file(onnx),
            size_bytes=out.stat().st_size,
            setup=setup,
        )

    def free_bytes(self) -> int | None:
        """Free memory of the GPU, bytes; a Jetson shares it with the system."""
        return int(_driver().mem_get_info()[0])

    def open(self, path: Path, setup: Setup) -> TrtSession:
        """Load a plan. Raises EngineError where it is truncated, or built for another TensorRT or GPU."""
        return TrtSession(path)


class TrtSession:
    """A loaded plan; one input, one output, both static. GPU memory is freed on exit."""

    def __init__(self, path: Path) -> None:
        trt, cuda = tensorrt(), _driver()
        self._path, self._cuda, self._logger = path, cuda, make_logger(trt)
        self._runtime = trt.Runtime(self._logger)  # must live at least as long as the engine
        engine = self._runtime.deserialize_cuda_engine(read_bytes(path, MAX_PLAN_BYTES))
        if engine is None:
            raise EngineError(f"{path}: TensorRT {trt.__version__} refuses it: {plan_refusal(self._logger)}")
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(f"{path}: its {_memory(engine) >> 20} MiB do not fit in memory: close other programs")
        self._engine, self._context = engine, context
        self._stream, self._begin, self._end = cuda.Stream(), cuda.Event(), cuda.Event()
        self._host: dict[str, Any] = {}
        self._device: dict[str, Any] = {}
        for name, array in self._tensors(trt, engine):
            self._host[name] = cuda.pagelocked_empty(array.shape, array.dtype)
            self._device[name] = cuda.mem_alloc(max(array.nbytes, 1))
            context.set_tensor_address(name, int(self._device[name]))
        self.shape: tuple[int, ...] = self._host[self._input].shape
        self._fixed = np.random.default_rng(0).standard_normal(self.shape, dtype=np.float32)
        self._loaded = False
        self.graph = self._captured()

    def _tensors(self, trt: Any, engine: Any) -> list[tuple[str, NDArray[Any]]]:
        """Name and an empty array of its shape and type for each tensor; sets the names of input and output."""
        found: list[tuple[str, NDArray[Any]]] = []
        inputs: list[str] = []
        outputs: list[str] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            mode = engine.get_tensor_mode(name)
            (inputs if mode == trt.TensorIOMode.INPUT else outputs).append(name)
            shape = tuple(engine.get_tensor_shape(name))
            if min(shape, default=1) < 0:
                raise EngineError(f"{self._path}: tensor {name} is {shape}, not static: export it with edgeprune")
            found.append((name, np.empty(shape, DTYPES[engine.get_tensor_dtype(name).name])))
        if len(inputs) != 1 or len(outputs) != 1:
            raise EngineError(f"{self._path}: {len(inputs)} inputs, {len(outputs)} outputs: pass a classifier")
        self._input, self._output = inputs[0], outputs[0]
        return found

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, classes) fp32 outputs of one batch, fp32 of the static shape `shape`. Raises EngineError."""
        if images.shape != self.shape:
            raise EngineError(f"{self._path} takes {self.shape}, got {images.shape}: pass complete batches")
        self._load(images)
        self._launch()
        output = self._host[self._output]
        self._cuda.memcpy_dtoh_async(output, self._device[self._output], self._stream)
        self._stream.synchronize()
        self._loaded = False
        result: NDArray[np.float32] = output.astype(np.float32)
        return result

    def time_ms(self) -> float:
        """One inference on a fixed random input already on the GPU, between two CUDA events, ms."""
        if not self._loaded:
            self._load(self._fixed)
            self._loaded = True
        self._begin.record(self._stream)
        self._launch()
        self._end.record(self._stream)
        self._end.synchronize()
        return float(self._end.time_since(self._begin))

    def fused_attention(self) -> int | None:
        """Attention layers that run as one fused kernel; None where the plan does not say."""
        trt = tensorrt()
        inspector = self._engine.create_engine_inspector()
        fusion = fusion_of(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        return fusion.fused if fusion else None

    def memory_bytes(self) -> int:
        """Bytes: working memory (as TensorRT reports it), input, output, and the plan itself."""
        tensors: int = sum(array.nbytes for array in self._host.values())
        return _memory(self._engine) + tensors + self._path.stat().st_size

    def _load(self, images: NDArray[np.float32]) -> None:
        self._host[self._input][...] = images
        self._cuda.memcpy_htod_async(self._device[self._input], self._host[self._input], self._stream)

    def _launch(self) -> None:
        if self.graph is not None:
            self.graph.launch()
        elif not self._context.execute_async_v3(self._stream.handle):
            raise EngineError(
                f"{self._path}: TensorRT could not run it ({self._last_error()}): compile the ONNX again"
            )

    def _captured(self) -> Graph | None:
        """The inference as one CUDA graph, which saves kernel launches; None, and a warning, where capture fails."""
        self.graph = None
        self._load(self._fixed)
        for _ in range(GRAPH_WARMUP):
            self._launch()
        self._stream.synchronize()
        try:
            return Graph(self._stream.handle, lambda: self._context.execute_async_v3(self._stream.handle))
        except OSError as error:
            log.warning("%s: no CUDA graph (%s): kernels are launched one by one", self._path.name, error)
            return None

    def _last_error(self) -> str:
        errors = [text for severity, text in self._logger.lines if severity in ("ERROR", "INTERNAL_ERROR")]
        return errors[-1][:300] if errors else "no reason given"

    def __enter__(self) -> TrtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.graph is not None:
            self.graph.close()
        for memory in self._device.values():
            memory.free()
        self._host.clear()
        self._device.clear()
        del self._context, self._engine, self._runtime


def fits(version: str, wanted: str) -> bool:
    """Is a version such as "8.6.1.6" in a range such as ">=8.6,<11" (PEP 440)? Raises DeviceError for a bad range."""
    try:
        return SpecifierSet(wanted).contains(version, prereleases=True)
    except InvalidSpecifier:
        raise DeviceError(f"{wanted!r} is not a range of versions: write it as >=8.6,<11") from None


def changed_options(options: TrtOptions) -> str | None:
    """Builder options other than the defaults, "name=value …"; None where all are defaults."""
    default = TrtOptions()
    changed = [
        f"{f}={getattr(options, f)}" for f in options.__struct_fields__ if getattr(options, f) != getattr(default, f)
    ]
    return " ".join(changed) or None


def _memory(engine: Any) -> int:
    """Bytes of working memory of an execution context."""
    size = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
    return int(size)


@lru_cache(maxsize=1)
def _driver() -> Any:
    """pycuda's driver with the primary context of GPU 0, which TensorRT shares, current until the process ends.

    The context is popped at exit: pycuda aborts a process that ends with a context on its stack. Raises
    MissingError, DeviceError.
    """
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        raise MissingError(
            f"pycuda is missing ({error}): pip install pycuda (needs nvcc: on a Jetson, JetPack's)"
        ) from None
    try:
        cuda.init()
        primary = cuda.Device(0).retain_primary_context()
        primary.push()
    except cuda.Error as error:
        raise DeviceError(f"no CUDA device found ({error}): check the driver with nvidia-smi") from None
    atexit.register(primary.pop)
    return cuda


def _gpu() -> Any:
    return _driver().Device(0)

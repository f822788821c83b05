"""A loaded TensorRT plan: it is run with its own memory on a stream, and timed with CUDA events."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.features import packed
from edgeprune.io import read_bytes
from edgeprune.runtimes.cuda import driver, errors_of
from edgeprune.runtimes.cuda_graph import Graph
from edgeprune.runtimes.trt_builder import fusion_of, tensorrt
from edgeprune.runtimes.trt_log import last_error, logger_of, plan_refusal

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

DTYPES = {"FLOAT": "f4", "HALF": "f2", "INT32": "i4", "INT64": "i8", "BOOL": "?"}  # by name: nptype is broken on 8.6
MAX_PLAN_BYTES = 8 << 30
GRAPH_WARMUP = 2  # inferences before a capture: kernels must not be loaded during it
# TensorRT's warning for a plan of another GPU that it can run; it sometimes appears on the very board that built the
# plan (source: dusty-nv/jetson-inference#883).
OTHER_MODEL = "different models of devices"


class TrtSession:
    """A loaded plan; one input, one or more outputs, all static. GPU memory is freed on exit.

    `built_here`: is it known to have been built on a GPU like this one?
    """

    def __init__(self, path: Path, built_here: bool = False) -> None:
        trt, cuda = tensorrt(), driver()
        self._path, self._cuda, self._logger = path, cuda, logger_of(trt)
        self._logger.lines.clear()
        self._runtime = trt.Runtime(self._logger)  # must live at least as long as the engine
        engine = self._runtime.deserialize_cuda_engine(read_bytes(path, MAX_PLAN_BYTES))
        if engine is None:
            raise EngineError(f"{path}: TensorRT {trt.__version__} refuses it: {plan_refusal(self._logger)}")
        if any(OTHER_MODEL in text for _, text in self._logger.lines):
            if built_here:
                log.info("%s: TensorRT suspects another model of GPU, but it was built on one like this", path)
            else:
                log.warning("%s was built on another model of GPU: it may be slow, compile the ONNX here", path)
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(f"{path}: its {_memory(engine) >> 20} MiB do not fit in memory: close other programs")
        self._engine, self._context = engine, context
        self._host: dict[str, Any] = {}
        self._device: dict[str, Any] = {}
        with errors_of(str(path)):
            self._stream, self._begin, self._end = cuda.Stream(), cuda.Event(), cuda.Event()
            for name, array in self._tensors(trt, engine):
                self._host[name] = cuda.pagelocked_empty(array.shape, array.dtype)
                self._device[name] = cuda.mem_alloc(max(array.nbytes, 1))
                context.set_tensor_address(name, int(self._device[name]))
            self.shape: tuple[int, ...] = self._host[self._input].shape
            self._fixed = np.random.default_rng(0).standard_normal(self.shape, dtype=np.float32)
            self._loaded = False
            self.graph = self._captured()

    @property
    def cuda_graph(self) -> bool:
        """Does an inference run as one CUDA graph?"""
        return self.graph is not None

    def _tensors(self, trt: Any, engine: Any) -> list[tuple[str, NDArray[Any]]]:
        """Name and an empty array of its shape and type for each tensor; sets the names of input and outputs."""
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
        if len(inputs) != 1 or not outputs:
            found_here = f"{len(inputs)} inputs, {len(outputs)} outputs"
            raise EngineError(f"{self._path}: {found_here}: pass an engine that edgeprune built")
        self._input, self._outputs = inputs[0], tuple(outputs)
        return found

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, values) fp32 outputs of one batch, fp32 of the static shape `shape`. Raises EngineError."""
        if images.shape != self.shape:
            raise EngineError(f"{self._path} takes {self.shape}, got {images.shape}: pass complete batches")
        with errors_of(str(self._path)):
            self._host[self._input][...] = images
            self._run_with_copies()
        self._loaded = False
        return packed({name: self._host[name].copy() for name in self._outputs})

    def time_ms(self) -> float:
        """One inference on a fixed random input already on the GPU, between two CUDA events, ms; without copies.

        An untimed inference is queued first and nothing waits in between. The GPU is then still busy while the
        events and the timed inference are queued; on an idle stream the time would include the launch.
        """
        with errors_of(str(self._path)):
            if not self._loaded:
                self._host[self._input][...] = self._fixed
                self._copy_in()
                self._loaded = True
            self._launch()
            self._begin.record(self._stream)
            self._launch()
            self._end.record(self._stream)
            self._end.synchronize()
            return float(self._end.time_since(self._begin))

    def end_to_end_ms(self) -> float:
        """Wall time of one inference with both copies, from and to page-locked memory, after an untimed one, ms."""
        with errors_of(str(self._path)):
            self._run_with_copies()
            start = time.perf_counter_ns()
            self._run_with_copies()
            return (time.perf_counter_ns() - start) / 1e6

    def fused_attention(self) -> int | None:
        """Attention layers that run as one fused kernel; None where the plan does not say.

        The inspector of 8.x does not show kernels inside a fused region (NVIDIA/TensorRT#3243), so none found there
        means nothing; 10.x names them, for example `_gemm_mha_v2`.
        """
        trt = tensorrt()
        inspector = self._engine.create_engine_inspector()
        fusion = fusion_of(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        if fusion is None or (fusion.fused == 0 and str(trt.__version__).startswith("8.")):
            return None
        return fusion.fused

    def memory_bytes(self) -> int:
        """Bytes: working memory (as TensorRT reports it), input, outputs, and the plan itself."""
        tensors: int = sum(array.nbytes for array in self._host.values())
        return _memory(self._engine) + tensors + self._path.stat().st_size

    def _run_with_copies(self) -> None:
        self._copy_in()
        self._launch()
        for name in self._outputs:
            self._cuda.memcpy_dtoh_async(self._host[name], self._device[name], self._stream)
        self._stream.synchronize()

    def _copy_in(self) -> None:
        self._cuda.memcpy_htod_async(self._device[self._input], self._host[self._input], self._stream)

    def _launch(self) -> None:
        if self.graph is not None:
            try:
                self.graph.launch()
            except OSError as error:
                raise EngineError(f"{self._path}: {error}: run it again, and check dmesg if it persists") from None
        elif not self._context.execute_async_v3(self._stream.handle):
            raise EngineError(
                f"{self._path}: TensorRT could not run it ({last_error(self._logger)}): compile the ONNX again"
            )

    def _captured(self) -> Graph | None:
        """The inference as one CUDA graph, which saves kernel launches; None, and a warning, where capture fails."""
        self.graph = None
        self._host[self._input][...] = self._fixed
        self._copy_in()
        for _ in range(GRAPH_WARMUP):
            self._launch()
        self._stream.synchronize()
        try:
            return Graph(self._stream.handle, lambda: self._context.execute_async_v3(self._stream.handle))
        except OSError as error:
            log.warning("%s: no CUDA graph (%s): kernels are launched one by one", self._path.name, error)
            return None

    def __enter__(self) -> TrtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(self._cuda.Error, OSError):  # after an error of CUDA nothing can be freed
            if self.graph is not None:
                self.graph.close()
            for memory in self._device.values():
                memory.free()
        self._host.clear()
        self._device.clear()
        del self._context, self._engine, self._runtime


def _memory(engine: Any) -> int:
    """Bytes of working memory of an execution context."""
    size = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
    return int(size)

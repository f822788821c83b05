"""A TensorRT and a pycuda for machines without a GPU: the real call sequence, plans that ONNX Runtime executes.

What is checked with it is our side: which calls come in which order, what is said when one fails. Whether the names
exist in real TensorRT is checked in tests/trt_api, what they compute in tests/gpu.
"""

from __future__ import annotations

import enum
import json
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

MAGIC = b"fake plan\n"


class Fake:
    """One fake installation: its versions, the options it received, and the failures it simulates."""

    def __init__(self, version: str = "10.3.0") -> None:
        self.version = version
        self.gpu, self.capability, self.sm_count = "Orin", (8, 7), 8
        self.integrated = False
        self.free_bytes, self.total_bytes = 4 << 30, 64 << 30
        self.calls: list[str] = []  # on the stream, in order
        self.memory: dict[int, Any] = {}
        self.configs: list[Any] = []
        self.network_flags: list[int] = []
        self.fail_parse: dict[int, str] = {}  # error text by node
        self.fail_build: list[str] = []  # lines that the builder logs as errors before it returns None
        self.fail_levels: tuple[int | None, ...] | None = None  # fail only at these optimization levels
        self.fail_cuda = ""  # the name of a CUDA call that fails
        self.networks: list[Any] = []
        self.loggers: list[Any] = []  # TensorRT keeps the first and ignores others
        self.while_building: Callable[[], None] = lambda: None  # runs in a callback of the builder
        self.layers: list[Any] = [{"Name": "a", "TacticName": "_gemm_mha_v2"}, {"Name": "b", "TacticName": "x"}]
        self.launches = 0
        self.contexts = 0  # pushed and not popped: pycuda aborts a process that ends so
        self.trt, self.driver = tensorrt_module(self), driver_module(self)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Fake:
        """Make both modules importable for the time of a test."""
        from edgeprune.runtimes import cuda, trt_log

        pycuda = types.ModuleType("pycuda")
        pycuda.driver = self.driver  # type: ignore[attr-defined]
        for name, module in (("tensorrt", self.trt), ("pycuda", pycuda), ("pycuda.driver", self.driver)):
            monkeypatch.setitem(sys.modules, name, module)
        cuda.primary_context.cache_clear()
        trt_log.logger_of.cache_clear()
        monkeypatch.setattr("edgeprune.devices.nvidia_gpu", lambda: self.gpu)
        return self


def guarded(call: Callable[[], Any]) -> Any:
    """A call into Python as NVIDIA's bindings make it (pyCore.cpp): every exception is swallowed, also Ctrl-C."""
    try:
        return call()
    except BaseException as error:
        print(f"[ERROR] Exception caught: {error}", file=sys.stderr)
        return False


def tensorrt_module(fake: Fake) -> Any:  # noqa: C901 - a module's worth of small classes
    """The fake `tensorrt`."""
    trt: Any = types.ModuleType("tensorrt")
    trt.__spec__ = ModuleSpec("tensorrt", None)  # torch looks for it
    trt.__version__ = fake.version
    old = fake.version.startswith("8.")

    class ILogger:
        Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    trt.ILogger = ILogger
    severity = ILogger.Severity
    trt.TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    kinds = "CONSTANT CAST QUANTIZE DEQUANTIZE SHUFFLE ELEMENTWISE MATRIX_MULTIPLY SOFTMAX TOPK"
    trt.LayerType = enum.Enum("LayerType", kinds)
    trt.DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 BOOL")
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "DETAILED")
    trt.LayerInformationFormat = enum.Enum("LayerInformationFormat", "JSON")
    trt.BuilderFlag = enum.Enum("BuilderFlag", "FP16 INT8 TF32 OBEY_PRECISION_CONSTRAINTS")
    trt.TacticSource = enum.IntEnum("TacticSource", "EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS", start=3)
    flags = {"EXPLICIT_BATCH": 0} if old else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", flags)
    previews = {"DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805": 0} if old else {"OTHER": 0}
    trt.PreviewFeature = enum.IntEnum("PreviewFeature", previews)

    class Network:
        """One layer for each node; before TopK and ReduceMean one more, whose output has no name in the ONNX."""

        model: onnx.ModelProto

        def __init__(self) -> None:
            self.layers: list[Layer] = []
            fake.networks.append(self)

        @property
        def num_layers(self) -> int:
            return len(self.layers)

        def get_layer(self, index: int) -> Layer:
            return self.layers[index]

        def fill(self, model: onnx.ModelProto) -> None:
            self.model = model
            whole = onnx.shape_inference.infer_shapes(model)
            values = (*whole.graph.value_info, *whole.graph.input, *whole.graph.output)
            known = {v.name: v.type.tensor_type.elem_type for v in values}
            known |= {t.name: t.data_type for t in whole.graph.initializer}
            for node in whole.graph.node:
                ends = [[(name, known[name]) for name in part if name] for part in (node.input, node.output)]
                if node.op_type in ("TopK", "ReduceMean"):
                    unnamed = f"(Unnamed Layer* {len(self.layers)}) [Shuffle]_output"
                    self.layers.append(Layer("SHUFFLE", ends[0][:1], [(unnamed, ends[0][0][1])]))
                kind = {"Cast": "CAST", "TopK": "TOPK", "Constant": "CONSTANT", "MatMul": "MATRIX_MULTIPLY"}
                self.layers.append(Layer(kind.get(node.op_type, "ELEMENTWISE"), *ends))

    class Layer:
        """`precision` and `types` are None until they are set."""

        def __init__(self, kind: str, entering: list[tuple[str, int]], leaving: list[tuple[str, int]]) -> None:
            types = {1: "FLOAT", 10: "HALF", 9: "BOOL"}
            self.type = trt.LayerType[kind]
            self.ends = [
                [types_of(name, trt.DataType[types.get(type_, "INT32")]) for name, type_ in part]
                for part in (entering, leaving)
            ]
            self.num_inputs, self.num_outputs = map(len, self.ends)
            self.precision: Any = None
            self.types: list[Any] = [None] * self.num_outputs

        def get_input(self, index: int) -> Any:
            return self.ends[0][index]

        def get_output(self, index: int) -> Any:
            return self.ends[1][index]

        def set_output_type(self, index: int, type_: Any) -> None:
            self.types[index] = type_

    def types_of(name: str, type_: Any) -> Any:
        return types.SimpleNamespace(name=name, dtype=type_)

    class Cache:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> bytes:
            return self.data + b"t"

    class Config:
        def __init__(self) -> None:
            self.flags: set[str] = {"TF32"}
            self.pools: dict[str, int] = {}
            self.cache: Cache | None = None
            self.previews: set[str] = set()
            self.tactics: int | None = None
            if not old:
                self.progress_monitor: Any = None
            fake.configs.append(self)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.pools[pool.name] = size

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            self.flags.discard(flag.name)

        def set_tactic_sources(self, mask: int) -> bool:
            self.tactics = mask
            return True

        def set_preview_feature(self, feature: Any, on: bool) -> None:
            self.previews.add(feature.name)

        def create_timing_cache(self, data: bytes) -> Cache | None:
            return None if data.startswith(b"foreign") else Cache(data)

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return True

        def get_timing_cache(self) -> Cache | None:
            return self.cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            fake.loggers.append(logger)
            self.logger = fake.loggers[0]

        def create_network(self, flags: int) -> Network:
            fake.network_flags.append(flags)
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            skipped = "Skipping tactic 1: insufficient memory"
            guarded(lambda: (fake.while_building(), self.logger.log(severity.VERBOSE, skipped)))
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                guarded(lambda: monitor.phase_start("tactics", None, 3))
                for step in range(3):
                    if not guarded(partial(monitor.step_complete, "tactics", step)):
                        return None
                guarded(lambda: monitor.phase_finish("tactics"))
            level = getattr(config, "builder_optimization_level", None)
            if fake.fail_build and (fake.fail_levels is None or level in fake.fail_levels):
                for line in fake.fail_build:
                    guarded(partial(self.logger.log, severity.ERROR, line))
                return None
            head = json.dumps({"version": fake.version, "gpu": fake.gpu, "capability": fake.capability}).encode()
            body = network.model.SerializeToString()
            return MAGIC + len(body).to_bytes(8, "big") + head + b"\n" + body

    class OnnxParser:
        def __init__(self, network: Network, logger: Any) -> None:
            self.network = network
            self.num_errors = 0

        def parse_from_file(self, path: str) -> bool:
            self.network.fill(onnx.load(path))
            self.num_errors = len(fake.fail_parse)
            return not fake.fail_parse

        def get_error(self, index: int) -> Any:
            node, text = list(fake.fail_parse.items())[index]
            return types.SimpleNamespace(node=lambda: node, desc=lambda: text)

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.addresses = engine, {}  # type: ignore[var-annotated]

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            fake.launches += 1
            fake.calls.append("launch")
            session = self.engine.session
            [entering] = session.get_inputs()
            found = session.run(None, {entering.name: fake.memory[self.addresses[entering.name]]})
            for leaving, array in zip(session.get_outputs(), found, strict=True):
                fake.memory[self.addresses[leaving.name]] = array
            return True

    class Engine:
        device_memory_size_v2 = 1 << 20

        def __init__(self, body: bytes) -> None:
            self.session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
            self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
            self.num_io_tensors = len(self.tensors)

        def get_tensor_name(self, index: int) -> str:
            return str(self.tensors[index].name)

        def get_tensor_mode(self, name: str) -> Any:
            entering = name in [t.name for t in self.session.get_inputs()]
            return trt.TensorIOMode.INPUT if entering else trt.TensorIOMode.OUTPUT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            shape = next(t.shape for t in self.tensors if t.name == name)
            return tuple(n if isinstance(n, int) else -1 for n in shape)

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType.FLOAT

        def create_execution_context(self) -> Context:
            return Context(self)

        def create_engine_inspector(self) -> Any:
            text = json.dumps({"Layers": fake.layers, "Bindings": []})
            return types.SimpleNamespace(get_engine_information=lambda form: text)

    class Runtime:
        """Refuses plans in NVIDIA's own words: NVIDIA/TensorRT#2915 and #3848, #2983, #564."""

        def __init__(self, logger: Any) -> None:
            fake.loggers.append(logger)
            self.logger = fake.loggers[0]

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            size = int.from_bytes(plan[len(MAGIC) : len(MAGIC) + 8], "big")
            head, _, body = plan[len(MAGIC) + 8 :].partition(b"\n")
            if not plan.startswith(MAGIC):
                what = "plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed."
                return self.refuse(f"Error Code 1: Serialization (Serialization assertion {what})")
            if len(body) != size:
                what = "sizeRead == static_cast<uint64_t>(mEnd - mCurrent) failed."
                what += "Size specified in header does not match archive size"
                return self.refuse(f"Error Code 1: Serialization (Serialization assertion {what})")
            maker = json.loads(head)
            if maker["version"] != fake.version:
                text = (
                    "The engine plan file is not compatible with this version of TensorRT, expecting library version"
                )
                return self.refuse(f"{text} {fake.version} got {maker['version']}, please rebuild.")
            built, here = (".".join(map(str, pair)) for pair in (maker["capability"], fake.capability))
            if built != here:
                text = "The engine plan file is generated on an incompatible device, expecting compute"
                return self.refuse(f"{text} {here} got {built}, please rebuild.")
            if maker["gpu"] != fake.gpu:
                text = (
                    "Using an engine plan file across different models of devices is not recommended and is likely "
                )
                guarded(
                    partial(self.logger.log, severity.WARNING, text + "to affect performance or even cause errors.")
                )
            return Engine(body)

        def refuse(self, text: str) -> None:
            guarded(partial(self.logger.log, severity.ERROR, f"6: {text}"))
            what = "Error Code 4: Internal Error (Engine deserialization failed.)"
            guarded(partial(self.logger.log, severity.ERROR, f"4: [runtime.cpp::deserializeCudaEngine::65] {what}"))

    if not old:
        trt.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    return trt


def driver_module(fake: Fake) -> Any:  # noqa: C901 - a module's worth of small classes
    """The fake `pycuda.driver`."""
    cuda: Any = types.ModuleType("pycuda.driver")

    class Error(Exception):
        pass

    def may_fail(name: str) -> None:
        if name == fake.fail_cuda:
            raise Error(f"{name} failed: out of memory")

    class Memory:
        def __init__(self, size: int) -> None:
            may_fail("cuMemAlloc")
            self.address = 1 + max(fake.memory, default=0)
            fake.memory[self.address] = None

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            del fake.memory[self.address]

    class Stream:
        handle = 7

        def synchronize(self) -> None:
            fake.calls.append("wait")
            may_fail("cuStreamSynchronize")

    class Event:
        def record(self, stream: Stream) -> None:
            fake.calls.append("event")
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            fake.calls.append("wait")
            may_fail("cuEventSynchronize")

        def time_since(self, other: Event) -> float:
            return 1e3 * (self.at - other.at)

    def to_device(memory: Memory, array: Any, stream: Stream) -> None:
        fake.calls.append("copy in")
        fake.memory[memory.address] = array.copy()

    def to_host(array: Any, memory: Memory, stream: Stream) -> None:
        fake.calls.append("copy out")
        array[...] = fake.memory[memory.address]

    class Context:
        def push(self) -> None:
            fake.contexts += 1

        def pop(self) -> None:
            fake.contexts -= 1

    cuda.Error, cuda.Stream, cuda.Event, cuda.mem_alloc = Error, Stream, Event, Memory
    cuda.init = lambda: None
    cuda.device_attribute = types.SimpleNamespace(MULTIPROCESSOR_COUNT="sm_count", INTEGRATED="integrated")
    cuda.Device = lambda index: types.SimpleNamespace(
        retain_primary_context=Context,
        compute_capability=lambda: fake.capability,
        name=lambda: fake.gpu,
        total_memory=lambda: fake.total_bytes,
        get_attribute=lambda name: int(getattr(fake, name)),
    )
    cuda.mem_get_info = lambda: (fake.free_bytes, fake.total_bytes)
    cuda.pagelocked_empty = lambda shape, dtype: np.empty(shape, dtype)
    cuda.memcpy_htod_async, cuda.memcpy_dtoh_async = to_device, to_host
    return cuda

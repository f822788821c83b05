"""The network that the parser fills; after a parse, `layers`, `inputs` and `outputs` say what it asked for."""

from __future__ import annotations

import ctypes as C
import sys
from typing import Any

from support.trt86.abi import (
    FLOAT,
    KEPT,
    KINDS,
    LAYER,
    LAYERS,
    MAX,
    NETWORK,
    NOTHING,
    TENSOR,
    StandInError,
    as_dims,
    as_tuple,
    copied,
    cpp_object,
    vtable,
)
from support.trt86.adding import Adding
from support.trt86.rules import Rules

FIXED = {"isExecutionTensor": True, "getAllowedFormats": 0xFFFFFFFF, "setDynamicRange": True, "getDimensionName": b""}


class Tensor:
    """nvinfer1::ITensor: shape and type are those that its layer gives it."""

    def __init__(self, network: Network, layer: Layer | None, index: int, name: str, dims=None, dtype=None) -> None:
        self.network, self.layer, self.index, self.name = network, layer, index, name
        self._dims, self._dtype, self.location = dims, dtype, 0
        body = network.body("tensor", self)
        self.address = cpp_object(network.dead, body)
        network.objects[self.address] = self

    @property
    def dims(self) -> tuple[int, ...]:
        return self.layer.outputs()[self.index][0] if self.layer else self._dims

    @property
    def dtype(self) -> int:
        return self.layer.outputs()[self.index][1] if self.layer else self._dtype

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        """A function of nvinfer1::ITensor by name; what is not here answers 0 and changes nothing."""
        handler = getattr(self, f"_{name}", None)
        return handler(*args) if handler else FIXED.get(name, 0)

    def _getDimensions(self) -> Any:
        return as_dims(self.dims)

    def _getType(self) -> int:
        return self.dtype

    def _setName(self, name: bytes) -> None:
        self.name = name.decode()

    def _getName(self) -> bytes:
        return self.name.encode()

    def _setType(self, dtype: int) -> None:
        self._dtype = dtype

    def _setDimensions(self, dims: Any) -> None:
        self._dims = as_tuple(dims)

    def _isNetworkInput(self) -> bool:
        return self.layer is None

    def _isNetworkOutput(self) -> bool:
        return self in self.network.outputs

    def _setLocation(self, location: int) -> None:
        self.location = location

    def _getLocation(self) -> int:
        return self.location


class Layer:
    """nvinfer1::ILayer and the class of its kind: what was set is kept by name."""

    def __init__(self, network: Network, kind: str, inputs: list[Tensor], outputs: int = 1, **settings) -> None:
        self.network, self.kind, self.inputs = network, kind, inputs
        self.settings, self.precision, self.types = settings, None, {}
        self.name = f"(Unnamed Layer* {len(network.layers)}) [{kind}]"
        self._inferred: list | None = None
        network.layers.append(self)
        first = network.body("layer", self)
        own = network.body(kind, self)
        self.address = cpp_object(network.dead, first, own)
        network.objects[self.address] = self
        self.made = [Tensor(network, self, i, f"{self.name}_output_{i}") for i in range(outputs)]

    def outputs(self) -> list[tuple[tuple[int, ...], int]]:
        if self._inferred is None:
            self._inferred = self.network.infer(self)
        return self._inferred

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        """A function of nvinfer1::ILayer, or of the layer's own class, by name."""
        handler = getattr(self, f"_{name}", None)
        if handler is not None:
            return handler(*args)
        key = name[3:] if len(args) == name.startswith("set") else f"{name[3:]}{args[0]}"
        if name.startswith("set"):
            order = name.endswith("Transpose")
            self.settings[key] = tuple((C.c_int32 * MAX).from_address(args[0])) if order else copied(args[-1])
            self._inferred = None
            return None
        if name.endswith("Transpose"):
            order = (C.c_int32 * MAX)(*self.settings.get(key, range(MAX)))
            KEPT.append(order)
            return C.addressof(order)
        if key in self.settings:
            return self.settings[key]
        kind = next(word.partition(":")[2][0] for word in LAYERS[self.kind][1].split() if word.startswith(f"{name}:"))
        return KINDS[kind]() if kind in "DW" else b"" if kind == "s" else 0  # what no caller has set

    def _getType(self) -> int:
        return LAYERS[self.kind][0] if self.kind in LAYERS else 10

    def _getName(self) -> bytes:
        return self.name.encode()

    def _setName(self, name: bytes) -> None:
        self.name = name.decode()
        for tensor in self.made:
            tensor.name = f"{self.name}_output_{tensor.index}"

    def _getNbInputs(self) -> int:
        return len(self.inputs)

    def _getNbOutputs(self) -> int:
        return len(self.made)

    def _getInput(self, index: int) -> int | None:
        return self.inputs[index].address if 0 <= index < len(self.inputs) and self.inputs[index] else None

    def _getOutput(self, index: int) -> int | None:
        return self.made[index].address if 0 <= index < len(self.made) else None

    def _setInput(self, index: int, tensor: int) -> None:
        self.inputs += [None] * (index + 1 - len(self.inputs))
        self.inputs[index] = self.network.objects[tensor]
        self._inferred = None

    def _setPrecision(self, dtype: int) -> None:
        self.precision = dtype

    def _resetPrecision(self) -> None:
        self.precision = None

    def _getPrecision(self) -> int:
        return FLOAT if self.precision is None else self.precision

    def _precisionIsSet(self) -> bool:
        return self.precision is not None

    def _setOutputType(self, index: int, dtype: int) -> None:
        self.types[index] = dtype
        self._inferred = None

    def _resetOutputType(self, index: int) -> None:
        self.types.pop(index, None)
        self._inferred = None

    def _outputTypeIsSet(self, index: int) -> bool:
        return index in self.types

    def _getOutputType(self, index: int) -> int:
        return self.types.get(index, self.outputs()[index][1])


class Network(Adding, Rules):
    """What the parser fills; after a parse, `layers`, `inputs` and `outputs` say what it asked for."""

    def __init__(self) -> None:
        self.objects: dict[int, object] = {}
        self.layers: list[Layer] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.failures: list[str] = []  # of the stand-in
        self.breaches: dict[str, dict[str, str]] = {}  # of documented rules: rule, and the layers that break it
        self._tables: dict[str, int] = {}
        self.dead = vtable("", self._call)  # of interfaces, whose functions are all inline
        builder = vtable(" ".join(f"slot{i}:p" for i in range(24)), lambda this, name, args: self._builder(name))
        nothing = (C.c_void_p * 16)(*[C.cast(NOTHING, C.c_void_p)] * 16)  # a plugin registry without plugins
        KEPT.append(nothing)
        self._registry = cpp_object(C.addressof(nothing))
        self._made_builder = cpp_object(self.dead, cpp_object(builder))
        self.address = cpp_object(vtable("getBuilder:p", self._call), self.body("network", self))
        self.objects[self.address] = self

    def body(self, kind: str, thing: object) -> int:
        """The object behind the interface: a table of virtual functions, and known by its address."""
        if kind not in self._tables:
            methods = {"network": NETWORK, "tensor": TENSOR, "layer": LAYER}.get(kind) or LAYERS.get(kind, (0, ""))[1]
            unknown = kind not in LAYERS and kind not in ("network", "tensor", "layer")
            self._tables[kind] = vtable(" ".join(f"slot{i}:p" for i in range(40)) if unknown else methods, self._call)
        address = cpp_object(self._tables[kind])
        self.objects[address] = thing
        return address

    def _call(self, this: int, name: str, args: tuple):
        """From C++. An exception may not pass there: it is kept, and something harmless returned."""
        thing = self.objects[this]
        try:
            return thing.call(name, args)
        except Exception as error:
            text = str(error)
            if not isinstance(error, StandInError):
                text = f"{type(thing).__name__}.{name}: {type(error).__name__}: {text}"
            if text not in self.failures:
                self.failures.append(text)
            if name.endswith(("Dimensions", "Size", "Start", "Stride")):
                return as_dims(())
            return 0 if name.startswith("getN") else None

    def _builder(self, name: str) -> int | None:
        return self._registry if name == "slot20" else None  # getPluginRegistry

    # what the parser calls

    def call(self, name: str, args: tuple):
        handler = getattr(self, f"_{name}", None)
        if handler is not None:
            return handler(*args)
        if name.startswith("add"):
            self.failures.append(f"the stand-in does not know {name}")
            print(f"no verdict: {self.failures[-1]}", file=sys.stderr, flush=True)  # the parser may not survive it
            return Layer(self, name[3:], [], 3).address
        return 0

    def _t(self, address: int) -> Tensor:
        return self.objects[address]

    def _several(self, addresses: int, count: int) -> list[Tensor]:
        return [self._t(a) for a in (C.c_void_p * count).from_address(addresses)]

    def _add(self, kind: str, inputs: list[Tensor], outputs: int = 1, **settings) -> int:
        return Layer(self, kind, inputs, outputs, **{k: copied(v) for k, v in settings.items()}).address

    def _addInput(self, name, dtype, dims):
        self.inputs.append(Tensor(self, None, 0, name.decode(), as_tuple(dims), dtype))
        return self.inputs[-1].address

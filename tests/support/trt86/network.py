"""The network that the parser fills; after a parse, `layers`, `inputs` and `outputs` say what it asked for."""

from __future__ import annotations

import ctypes as C
import sys

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


class Tensor:
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

    def call(self, name: str, args: tuple):
        if name == "getDimensions":
            return as_dims(self.dims)
        if name == "getType":
            return self.dtype
        if name == "setName":
            self.name = args[0].decode()
        elif name == "getName":
            return self.name.encode()
        elif name == "setType":
            self._dtype = args[0]
        elif name == "setDimensions":
            self._dims = as_tuple(args[0])
        elif name == "isNetworkInput":
            return self.layer is None
        elif name == "isNetworkOutput":
            return self in self.network.outputs
        elif name == "setLocation":
            self.location = args[0]
        elif name == "getLocation":
            return self.location
        elif name == "isExecutionTensor":
            return True
        elif name == "getAllowedFormats":
            return 0xFFFFFFFF
        elif name == "setDynamicRange":
            return True
        elif name == "getDimensionName":
            return b""
        else:
            return 0
        return None


class Layer:
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

    def call(self, name: str, args: tuple):
        if name in ("getType", "getName", "getNbInputs", "getInput", "getNbOutputs", "getOutput"):
            if name == "getType":
                return LAYERS[self.kind][0] if self.kind in LAYERS else 10
            if name == "getName":
                return self.name.encode()
            if name.startswith("getNb"):
                return len(self.inputs if name == "getNbInputs" else self.made)
            things = self.inputs if name == "getInput" else self.made
            return things[args[0]].address if 0 <= args[0] < len(things) and things[args[0]] else None
        if name == "setName":
            self.name = args[0].decode()
            for tensor in self.made:
                tensor.name = f"{self.name}_output_{tensor.index}"
        elif name == "setInput":
            while len(self.inputs) <= args[0]:
                self.inputs.append(None)
            self.inputs[args[0]] = self.network.objects[args[1]]
        elif name in ("setPrecision", "resetPrecision"):
            self.precision = args[0] if args else None
        elif name == "getPrecision":
            return FLOAT if self.precision is None else self.precision
        elif name == "precisionIsSet":
            return self.precision is not None
        elif name == "setOutputType":
            self.types[args[0]] = args[1]
        elif name == "resetOutputType":
            self.types.pop(args[0], None)
        elif name == "outputTypeIsSet":
            return args[0] in self.types
        elif name == "getOutputType":
            return self.types.get(args[0], self.outputs()[args[0]][1])
        elif name == "setMetadata":
            self.settings["Metadata"] = args[0]
        elif name == "getMetadata":
            return self.settings.get("Metadata", b"")
        elif name.startswith("set") and name.endswith("Transpose"):
            self.settings[name[3:]] = tuple((C.c_int32 * MAX).from_address(args[0]))
        elif name.startswith("get") and name.endswith("Transpose"):
            order = (C.c_int32 * MAX)(*self.settings.get(name[3:], range(MAX)))
            KEPT.append(order)
            return C.addressof(order)
        elif name.startswith("set"):
            key = name[3:] if len(args) == 1 else f"{name[3:]}{args[0]}"
            value = args[-1]
            self.settings[key] = copied(value)
        elif name.startswith("get"):
            key = name[3:] if not args else f"{name[3:]}{args[0]}"
            found = self.settings.get(key)
            if found is None:  # what no caller has set: an empty struct or zero
                method = f" {name}:"
                kind = (" " + LAYERS[self.kind][1]).split(method)[1][0]
                found = KINDS[kind]() if kind in "DW" else b"" if kind == "s" else 0
            return found
        self._inferred = None
        return None


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

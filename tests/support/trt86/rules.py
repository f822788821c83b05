"""Shapes and types of layers by TensorRT's documented rules, and breaches of those rules."""

from __future__ import annotations

import ctypes as C
import math
from typing import TYPE_CHECKING

from support.trt86.abi import (
    BOOL,
    DTYPES,
    ELEMENTWISE,
    FLOAT,
    HALF,
    INT8,
    INT32,
    MAX,
    REAL,
    REDUCE,
    UNARY,
    StandInError,
    as_dims,
    as_tuple,
)

# This parser passes INT8 weights on, but libnvinfer 8.2, 8.4.1 and 8.4.3 refused them in these words (TRT#2163,
# TRT#2361), and NVIDIA's repository says so up to v9.3.0 (trt-engine-explorer/examples/pytorch/resnet/README.md).
# No report of 8.6 was found, either way.
INT8_WEIGHTS = "invalid weights type of Int8 (said by 8.2 to 8.4): quantise fp32 weights in the graph"

if TYPE_CHECKING:
    from support.trt86.network import Layer, Tensor

INTEGERS = {
    "SUM": int.__add__, "PROD": int.__mul__, "SUB": int.__sub__, "DIV": lambda x, y: int(x / y),
    "MAX": max, "MIN": min, "FLOOR_DIV": int.__floordiv__, "EQUAL": int.__eq__, "LESS": int.__lt__,
    "GREATER": int.__gt__,
}  # fmt: skip


class Rules:
    """What each layer makes of its inputs."""

    def infer(self, layer: Layer) -> list[tuple[tuple[int, ...], int]]:
        function = getattr(self, f"_infer_{layer.kind}", None)
        if function is None:
            raise StandInError(f"no rule for the shape of {layer.kind}")
        found = function(layer, layer.settings, *[(t.dims, t.dtype) if t else None for t in layer.inputs])
        return [(dims, layer.types.get(i, dtype)) for i, (dims, dtype) in enumerate(found)]

    def _must(self, true: bool, layer: Layer, rule: str) -> None:
        if not true:
            self.breaches.setdefault(rule, {})[layer.name] = layer.kind

    @property
    def complaints(self) -> list[str]:
        """Each breach once, with the first layer and how many more."""
        rows = [(rule, next(iter(found.items())), len(found) - 1) for rule, found in self.breaches.items()]
        return [f"{name} ({kind}){f' and {more} more' if more else ''}: {rule}" for rule, (name, kind), more in rows]

    def _infer_Convolution(self, layer, s, x, *_):
        dims, dtype = x
        kernel, stride, dilation = (as_tuple(s[k]) for k in ("KernelSizeNd", "StrideNd", "DilationNd"))
        before, after = (as_tuple(s.get(key) or s["PaddingNd"]) for key in ("PrePadding", "PostPadding"))
        self._must(len(dims) == len(kernel) + 2, layer, f"input {dims} for a kernel {kernel}")
        self._must(dtype in REAL, layer, f"input of type {DTYPES[dtype]}")
        weights = s["KernelWeights"].count
        wanted = s["NbOutputMaps"] * dims[1] // s["NbGroups"] * math.prod(kernel)
        self._must(weights in (0, wanted), layer, "kernel weights do not fit")
        space = [
            (size + a + b - d * (k - 1) - 1) // st + 1
            for size, a, b, d, k, st in zip(dims[2:], before, after, dilation, kernel, stride, strict=True)
        ]
        return [((dims[0], s["NbOutputMaps"], *space), dtype)]

    def values(self, tensor: Tensor) -> list[int]:
        """Integers known when the network is built: TensorRT calls such a thing a shape tensor."""
        layer = tensor.layer
        kind, s = (layer.kind, layer.settings) if layer else ("an input", {})
        if kind == "Constant":
            weights = s["Weights"]
            kinds = {FLOAT: C.c_float, INT8: C.c_int8, INT32: C.c_int32, BOOL: C.c_bool}
            if weights.type in kinds and weights.count <= 64:
                array = kinds[weights.type] * weights.count
                return [int(v) for v in array.from_address(weights.values)] if weights.count else []
        elif kind == "Shape":
            return list(layer.inputs[0].dims)
        elif kind in ("Identity", "Cast", "Shuffle") and not {"FirstTranspose", "SecondTranspose"} & s.keys():
            return self.values(layer.inputs[0])
        elif kind == "Concatenation":
            return [v for t in layer.inputs for v in self.values(t)]
        elif kind == "Gather" and len(layer.inputs[0].dims) == 1:
            data = self.values(layer.inputs[0])
            return [data[i] for i in self.values(layer.inputs[1])]
        elif kind == "Slice" and len(layer.inputs[0].dims) == 1:
            data = self.values(layer.inputs[0])
            (start,), (size,), (stride,) = (as_tuple(s[key]) for key in ("Start", "Size", "Stride"))
            return [data[start + i * stride] for i in range(size)]
        elif kind == "ElementWise":
            a, b = (self.values(t) for t in layer.inputs)
            n = max(len(a), len(b))
            if (op := ELEMENTWISE[s["Operation"]]) in INTEGERS:
                pairs = zip(a * (n // len(a)), b * (n // len(b)), strict=True)
                return [int(INTEGERS[op](x, y)) for x, y in pairs]
        raise StandInError(f"{tensor.name}: values of {kind} are not known when the network is built")

    def _same(self, layer, s, x, *_):
        return [x]

    _infer_Activation = _infer_Scale = _same

    def _infer_SoftMax(self, layer, s, x):
        self._must(x[1] in REAL, layer, f"input of type {DTYPES[x[1]]}")
        self._must(bin(s.get("Axes", 0)).count("1") == 1, layer, "one axis must be given")
        return [x]

    def _infer_Identity(self, layer, s, x):
        return [x]

    def _infer_Cast(self, layer, s, x):
        return [(x[0], s["ToType"])]

    def _infer_Concatenation(self, layer, s, *inputs):
        axis, first = s.get("Axis", 0), inputs[0][0]
        for dims, dtype in inputs:
            rest = len(dims) == len(first) and all(dims[i] == first[i] for i in range(len(first)) if i != axis)
            self._must(rest and dtype == inputs[0][1], layer, f"inputs {[(d, DTYPES[t]) for d, t in inputs]}")
        return [((*first[:axis], sum(d[axis] for d, _ in inputs), *first[axis + 1 :]), inputs[0][1])]

    def _broadcast(self, layer, *shapes):
        self._must(len({len(d) for d in shapes}) == 1, layer, f"ranks differ: {shapes}")
        for sizes in zip(*shapes, strict=True):
            self._must(len({n for n in sizes if n != 1}) < 2, layer, f"shapes do not broadcast: {shapes}")
        return tuple(max(sizes) for sizes in zip(*shapes, strict=True))

    def _infer_ElementWise(self, layer, s, a, b):
        op = ELEMENTWISE[s["Operation"]]
        self._must(a[1] == b[1], layer, f"{op} of {DTYPES[a[1]]} and {DTYPES[b[1]]}")
        logical = op in ("AND", "OR", "XOR")
        self._must((a[1] == BOOL) == logical or (op == "EQUAL" and a[1] == BOOL), layer, f"{op} of {DTYPES[a[1]]}")
        compares = logical or op in ("EQUAL", "GREATER", "LESS")
        return [(self._broadcast(layer, a[0], b[0]), BOOL if compares else a[1])]

    def _infer_Unary(self, layer, s, x):
        op = UNARY[s["Operation"]]
        allowed = (
            (BOOL,)
            if op == "NOT"
            else (FLOAT, HALF, INT8, INT32)
            if op in ("ABS", "NEG", "SIGN")
            else (FLOAT, HALF, INT8)
        )
        self._must(x[1] in allowed, layer, f"{op} of {DTYPES[x[1]]}")
        return [(x[0], BOOL if op == "ISINF" else x[1])]

    def _infer_Shuffle(self, layer, s, x, *given):
        dims, dtype = x
        if given and given[0]:
            s["ReshapeDimensions"] = as_dims(self.values(layer.inputs[1]))
        first = s.get("FirstTranspose", range(MAX))[: len(dims)]
        shape = tuple(dims[i] for i in first)
        if "ReshapeDimensions" in s and s["ReshapeDimensions"].n >= 0:
            asked, total = list(as_tuple(s["ReshapeDimensions"])), math.prod(dims)
            if s.get("ZeroIsPlaceholder", True):
                asked = [shape[i] if n == 0 and i < len(shape) else n for i, n in enumerate(asked)]
            known = math.prod(n for n in asked if n != -1)
            asked = [total // max(known, 1) if n == -1 else n for n in asked]
            self._must(math.prod(asked) == total, layer, f"cannot reshape {shape} to {asked}")
            shape = tuple(asked)
        second = s.get("SecondTranspose", range(MAX))[: len(shape)]
        return [(tuple(shape[i] for i in second), dtype)]

    def _infer_Reduce(self, layer, s, x):
        dims, dtype = x
        self._must(s["ReduceAxes"] != 0, layer, "no axis")
        self._must(dtype in (*REAL, INT8, INT32), layer, f"{REDUCE[s['Operation']]} of {DTYPES[dtype]}")
        cut = [bool(s["ReduceAxes"] >> i & 1) for i in range(len(dims))]
        if s["KeepDimensions"]:
            return [(tuple(1 if c else n for n, c in zip(dims, cut, strict=True)), dtype)]
        return [(tuple(n for n, c in zip(dims, cut, strict=True) if not c), dtype)]

    def _infer_TopK(self, layer, s, x, *given):
        dims, dtype = x
        if given and given[0]:
            s["K"] = self.values(layer.inputs[1])[0]  # this parser hands K over as a tensor
        axes = [i for i in range(len(dims)) if s["ReduceAxes"] >> i & 1]
        self._must(len(axes) == 1, layer, f"one axis must be given: {axes}")
        self._must(dtype in REAL, layer, f"input of type {DTYPES[dtype]}")
        self._must(0 < s["K"] <= min(3840, dims[axes[0]]), layer, f"K = {s['K']} of {dims[axes[0]]}")
        shape = tuple(s["K"] if i in axes else n for i, n in enumerate(dims))
        return [(shape, dtype), (shape, INT32)]

    def _infer_Gather(self, layer, s, data, indices):
        self._must(indices[1] == INT32, layer, f"indices of type {DTYPES[indices[1]]}")
        axis, batch = s["GatherAxis"], s["NbElementWiseDims"]
        if s["Mode"] == 0:
            return [((*data[0][:axis], *indices[0][batch:], *data[0][axis + 1 :]), data[1])]
        if s["Mode"] == 1:
            return [(indices[0], data[1])]
        return [((*indices[0][:-1], *data[0][batch + indices[0][-1] :]), data[1])]

    def _infer_MatrixMultiply(self, layer, s, a, b):
        (x, dtype), (y, other) = a, b
        self._must(dtype == other and dtype in REAL, layer, f"{DTYPES[dtype]} times {DTYPES[other]}")
        if s["Operation0"] == 1:
            x = (*x[:-2], x[-1], x[-2])
        if s["Operation1"] == 1:
            y = (*y[:-2], y[-1], y[-2])
        rows, columns = () if s["Operation0"] == 2 else x[-2:-1], () if s["Operation1"] == 2 else y[-1:]
        left, right = x[: -1 if s["Operation0"] == 2 else -2], y[: -1 if s["Operation1"] == 2 else -2]
        inner = (x[-1], y[-1] if s["Operation1"] == 2 else y[-2])
        self._must(inner[0] == inner[1], layer, f"{x} times {y}")
        return [((*self._broadcast(layer, left, right), *rows, *columns), dtype)]

    def _infer_Constant(self, layer, s):
        dims = as_tuple(s["Dimensions"])
        self._must(s["Weights"].type != INT8 or math.prod(dims) <= 1, layer, INT8_WEIGHTS)
        self._must(s["Weights"].count == math.prod(dims), layer, f"{s['Weights'].count} weights for {dims}")
        return [(dims, s["Weights"].type)]

    def _infer_Slice(self, layer, s, x, *given):
        for name, tensor in zip(("Start", "Size", "Stride"), layer.inputs[1:], strict=False):
            if tensor:
                s[name] = as_dims(self.values(tensor))
        dims, start, size, stride = x[0], as_tuple(s["Start"]), as_tuple(s["Size"]), as_tuple(s["Stride"])
        self._must(len(dims) == len(start) == len(size) == len(stride), layer, f"{start} {size} {stride} of {dims}")
        for n, a, m, st in zip(dims, start, size, stride, strict=True):
            self._must(
                m == 0 or (0 <= a < n and 0 <= a + (m - 1) * st < n), layer, f"{start} {size} {stride} leaves {dims}"
            )
        return [(size, x[1])]

    def _infer_Shape(self, layer, s, x):
        return [((len(x[0]),), INT32)]

    def _infer_Select(self, layer, s, condition, a, b):
        self._must(condition[1] == BOOL, layer, f"condition of type {DTYPES[condition[1]]}")
        self._must(a[1] == b[1], layer, f"{DTYPES[a[1]]} or {DTYPES[b[1]]}")
        return [(self._broadcast(layer, condition[0], a[0], b[0]), a[1])]

    def _scales(self, layer, s, x, scale, zero):
        count = math.prod(scale[0])
        self._must(scale[1] == FLOAT, layer, f"scale of type {DTYPES[scale[1]]}")
        self._must(
            count == 1 or count == x[0][s["Axis"]], layer, f"{count} scales for axis {s.get('Axis')} of {x[0]}"
        )

    def _infer_Quantize(self, layer, s, x, scale, zero=None):
        self._scales(layer, s, x, scale, zero)
        self._must(x[1] in REAL, layer, f"input of type {DTYPES[x[1]]}")
        return [(x[0], INT8)]

    def _infer_Dequantize(self, layer, s, x, scale, zero=None):
        self._scales(layer, s, x, scale, zero)
        self._must(x[1] == INT8, layer, f"input of type {DTYPES[x[1]]}")
        return [(x[0], FLOAT)]

    def _infer_Assertion(self, layer, s, x):
        return []

    def _infer_OneHot(self, layer, s, indices, values, depth):
        raise StandInError("the depth of OneHot")

    def _infer_Normalization(self, layer, s, x, scale, bias):
        for name, other in (("scale", scale), ("bias", bias)):
            fits = len(other[0]) == len(x[0]) and all(a == b or a == 1 for a, b in zip(other[0], x[0], strict=True))
            self._must(fits, layer, f"{name} {other[0]} for {x[0]}")
        self._must(
            x[1] == scale[1] == bias[1] and x[1] in REAL, layer, f"types {[DTYPES[t[1]] for t in (x, scale, bias)]}"
        )
        return [x]

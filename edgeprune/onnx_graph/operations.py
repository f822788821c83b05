"""What a GPU runs for an ONNX graph: matmuls, fused attention and elementwise kernels, and their multiply-adds.

Elementwise operators are taken as TensorRT 10 fuses them. Work that only follows one matmul (bias, GELU, a scale) is
part of that matmul's kernel; all other work between two matmuls (residual, LayerScale and norm, for example) is one
kernel, and attention in the fusable form another. This gives 7 kernels per block. Source: an engine of ViT-B/16 by
TensorRT 10.3 has 89 layers, 7 for each of 12 blocks and 5 more (onnxsim, scripts/nvidia/README.md, "Transformer").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgeprune.errors import EngineError
from edgeprune.onnx_graph.attention_fusion import AttentionNodes, attentions

MATMULS = ("MatMul", "Gemm", "Conv")
# Operators that are always kernels of their own, with the input that decides: constant indices make a slice.
KERNELS = {"TopK": 0, "ArgMax": 0, "OneHot": 0, "Gather": 1, "GatherElements": 1, "GatherND": 1}
# They move nothing: another shape of the same values, or values that the next kernel reads from other places.
VIEWS = {
    "Cast", "DequantizeLinear", "Flatten", "Gather", "Identity", "QuantizeLinear", "Reshape", "Slice", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
UNKNOWN = {"Attention", "ConvTranspose", "Einsum", "If", "Loop", "Scan", "MatMulInteger", "QLinearMatMul"}

Fixed = tuple[int, ...]
Shape = tuple[int | str, ...]  # a dimension without a number has its name or "?"


@dataclass(frozen=True)
class Matmul:
    """`count` independent matmuls (rows × inner) · (inner × cols) and the elementwise work that only follows them."""

    rows: int
    cols: int
    inner: int
    count: int = 1  # for example batch · heads
    linear: bool = False  # a linear layer of a block, which INT8 quantises
    quantises: bool = False  # its input comes from a matmul or attention: at INT8, another kernel quantises it


@dataclass(frozen=True)
class Attention:
    """softmax(Q·Kᵀ)·V of `count` heads: (queries × dim) · (dim × keys) · (keys × dim), in the form that is fused."""

    queries: int
    keys: int
    dim: int
    count: int  # batch · heads

    def parts(self) -> tuple[Operation, ...]:
        """The kernels where it is not fused."""
        return (
            Matmul(self.queries, self.keys, self.dim, self.count),
            Elementwise(self.count * self.queries, 2 * self.keys),
            Matmul(self.queries, self.dim, self.keys, self.count),
        )


@dataclass(frozen=True)
class Elementwise:
    """One kernel that is limited by memory: `rows` rows, each with `values` values read and written in all."""

    rows: int
    values: int


Operation = Matmul | Attention | Elementwise


def flops_of_onnx(path: Path) -> int:
    """Floating-point operations of one inference: two for each multiply-add of its matmuls.

    Raises EngineError as operations_of_onnx does.
    """
    parts = (p for o in operations_of_onnx(path) for p in (o.parts() if isinstance(o, Attention) else (o,)))
    return sum(2 * p.rows * p.cols * p.inner * p.count for p in parts if isinstance(p, Matmul))


def operations_of_onnx(path: Path) -> list[Operation]:
    """The kernels of an ONNX file with static shapes, in an order in which they can run; a Conv as implicit GEMM.

    Raises EngineError for a file that is not ONNX, a tensor without static shape (naming it), and an operator whose
    cost is not known.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        return _Walk(graph, attentions(model)).operations()
    except EngineError as error:
        raise EngineError(f"{path}: {error}") from None
    except Exception as error:  # protobuf, onnx and the operating system each raise their own
        detail = " ".join(str(error).split())[:200]
        raise EngineError(f"{path}: cannot be read as ONNX ({detail}): export it again") from None


@dataclass
class _Stage:
    """Everything with the same number of kernels before it: elementwise work, then the kernels that follow it."""

    reads: dict[str, int] = field(default_factory=dict)  # values by tensor, from other stages
    writes: dict[str, int] = field(default_factory=dict)  # values by tensor, for later kernels
    reduces: bool = False  # a norm or a softmax is in it
    kernels: list[Any] = field(default_factory=list)  # nodes


class _Walk:
    """One pass over a graph, node by node."""

    def __init__(self, graph: Any, found: Iterable[AttentionNodes]) -> None:
        self.graph = graph
        self.shapes = _shapes(graph)
        self.constants = {"", *(tensor.name for tensor in graph.initializer)}
        self.stages: dict[int, _Stage] = {}
        self.stage: dict[str, int] = {value.name: 0 for value in graph.input}  # by tensor: kernels before its use
        self.origin: dict[str, str] = {}  # of a view: the tensor whose values it has
        self.elementwise: dict[str, int] = {}  # by tensor that an elementwise operator makes: its stage
        self.by_matmul: set[str] = set()  # tensors that matmuls make
        fused = [a for a in found if a.fusable and not self._with_weights(a)]
        self.inside = {n.output[0] for a in fused for n in (a.scores, a.bias, a.softmax) if n is not None}
        self.fused = {a.out.output[0]: a.scores for a in fused if a.out is not None}

    def operations(self) -> list[Operation]:
        """All kernels by stage. Raises EngineError."""
        for node in self.graph.node:
            self._add(node)
        for value in self.graph.output:
            self._use(value.name, None)
        stages = (self.stages[number] for number in sorted(self.stages))
        return [o for stage in stages for o in (*self._elementwise(stage), *map(self._kernel, stage.kernels))]

    def _with_weights(self, found: AttentionNodes) -> bool:
        return any(name in self.constants for n in (found.scores, found.out) if n is not None for name in n.input)

    def _add(self, node: Any) -> None:
        kind, inputs = node.op_type, [name for name in node.input if name not in self.constants]
        if kind in UNKNOWN or node.domain not in ("", "ai.onnx"):
            raise EngineError(f"the cost of operator {kind} is not known: export a model without it")
        if not inputs or kind == "Shape":
            self.constants.update(node.output)
            return
        number = max(self.stage[name] for name in inputs)
        kernel = kind in MATMULS or (kind in KERNELS and node.input[KERNELS[kind]] not in self.constants)
        inside = node.output[0] in self.inside
        own = kernel and not inside
        for name in node.output:
            self.stage[name] = number + own
        if own:
            self.stages.setdefault(number, _Stage()).kernels.append(node)
            self.by_matmul.update(node.output if kind in MATMULS else ())
        if kernel or inside:
            for name in inputs:
                self._use(name, None)
        elif kind in VIEWS:
            self.origin.update({name: self._origin(inputs[0]) for name in node.output})
        else:
            self._add_elementwise(node, number, inputs)

    def _add_elementwise(self, node: Any, number: int, inputs: Sequence[str]) -> None:
        stage = self.stages.setdefault(number, _Stage())
        stage.reduces |= node.op_type in ("LayerNormalization", "Softmax") or node.op_type.startswith("Reduce")
        for name in inputs:
            origin = self._origin(name)
            if self.elementwise.get(origin) != number:
                read = stage.reads.get(origin, 0) + self._values(name)
                stage.reads[origin] = min(read, self._values(origin))
                self._use(name, number)
        self.elementwise.update(dict.fromkeys(node.output, number))

    def _use(self, name: str, number: int | None) -> None:
        """A tensor is used by a kernel (None) or by elementwise work of a stage: its own stage writes it."""
        origin = self._origin(name)
        made = self.elementwise.get(origin)
        if made is not None and made != number:
            self.stages[made].writes[origin] = self._values(origin)

    def _elementwise(self, stage: _Stage) -> Iterable[Operation]:
        """The elementwise kernel of a stage; none where it has no such work, or where it only follows one matmul."""
        if stage.reads and not self._is_part_of_matmul(stage):
            sizes = {**stage.reads, **stage.writes}
            largest = max(sizes, key=lambda name: sizes[name])
            rows = max(sizes[largest] // max(_static(largest, self.shapes)[-1:], default=1), 1)
            yield Elementwise(rows, ceil((sum(stage.reads.values()) + sum(stage.writes.values())) / rows))

    def _is_part_of_matmul(self, stage: _Stage) -> bool:
        return not stage.reduces and len(stage.reads) == 1 and self.by_matmul.issuperset(stage.reads)

    def _kernel(self, node: Any) -> Operation:
        out = _static(node.output[0], self.shapes)
        if node.output[0] in self.fused:
            keys, dim = _static(node.input[1], self.shapes)[-2:]
            return Attention(out[-2], keys, dim, prod(out[:-2]))
        if node.op_type in MATMULS:
            left, right = (_static(name, self.shapes) for name in node.input[:2])
            origin = self._origin(node.input[0])
            made = self.elementwise.get(origin)
            alone = self.stage.get(origin, 0) > 0 if made is None else self._is_part_of_matmul(self.stages[made])
            return _matmul(node, left, right, out, node.input[1] in self.constants, alone)
        made = sum(self._values(name) for name in node.output if name)
        read = (self._values(name) for name in node.input if name not in self.constants)
        gathers = node.op_type.startswith("Gather")  # reads no more than it writes
        rows = max(prod(out[:-1]), 1)
        return Elementwise(rows, ceil((made + sum(min(n, made) if gathers else n for n in read)) / rows))

    def _origin(self, name: str) -> str:
        return self.origin.get(name, name)

    def _values(self, name: str) -> int:
        return prod(_static(name, self.shapes))


def _shapes(graph: Any) -> dict[str, Shape]:
    """The shape of each tensor of a graph with inferred shapes, as far as it is known."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes.setdefault(value.name, tuple(d.dim_value or d.dim_param or "?" for d in dims))
    return shapes


def _static(name: str, shapes: dict[str, Shape]) -> Fixed:
    """The shape of a tensor. Raises EngineError unless it is known and every dimension is a number."""
    shape = shapes.get(name, ("?",))
    fixed = tuple(size for size in shape if isinstance(size, int))
    if len(fixed) < len(shape):
        found = ", ".join(map(str, shape))
        raise EngineError(f"tensor {name!r} has no static shape [{found}]: export with fixed sizes")
    return fixed


def _matmul(node: Any, left: Fixed, right: Fixed, out: Fixed, weight: bool, quantises: bool) -> Matmul:
    """One MatMul, Gemm or Conv node as a Matmul, from the shapes of its first two inputs and its output."""
    if node.op_type == "Conv":  # (B, C, *in) and (M, C / group, *kernel) give (B, M, *out)
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        return Matmul(out[0] * prod(out[2:]), out[1] // groups, prod(right[1:]), groups)
    if node.op_type == "Gemm":
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        return Matmul(out[0], out[1], left[0 if turned else 1])
    left, right = (1, *left) if len(left) == 1 else left, (*right, 1) if len(right) == 1 else right
    if len(right) == 2:  # a linear layer: the batch is more rows
        return Matmul(prod(left[:-1]), right[1], left[-1], linear=weight, quantises=weight and quantises)
    count = prod(np.broadcast_shapes(left[:-2], right[:-2]))
    return Matmul(left[-2], right[-1], left[-1], count)

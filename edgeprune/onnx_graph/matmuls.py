"""The matmuls of an ONNX graph, and the floating-point operations in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgeprune.errors import EngineError

MATMULS = ("MatMul", "Gemm", "Conv")
# Operators that run as separate kernels, with the input that decides: constant indices make a slice that is fused.
LAUNCHES = {"TopK": 0, "ArgMax": 0, "OneHot": 0, "Gather": 1, "GatherElements": 1, "GatherND": 1}
UNKNOWN = {"Attention", "ConvTranspose", "Einsum", "If", "Loop", "Scan", "MatMulInteger", "QLinearMatMul"}

Fixed = tuple[int, ...]
Shape = tuple[int | str, ...]  # a dimension without a number has its name or "?"


@dataclass(frozen=True)
class Matmul:
    """`count` independent matmuls (rows × inner) · (inner × cols); with inner 0 only a kernel launch."""

    rows: int
    cols: int
    inner: int
    count: int = 1  # for example batch · heads
    weight: bool = False  # the right operand is a weight, which is read from memory


LAUNCH = Matmul(rows=1, cols=1, inner=0)
SMALLEST = 16  # rows and columns of a linear layer's weight matrix


def linear_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """MatMul nodes with a weight matrix, in order: the linear layers of the blocks."""
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "MatMul":
            shape = shapes.get(node.input[1], ())
            if len(shape) == 2 and min(shape) >= SMALLEST:
                found.append(node)
    return found


def flops_of_onnx(path: Path) -> int:
    """Floating-point operations of one inference: two for each multiply-add of its matmuls.

    Raises EngineError as matmuls_of_onnx does.
    """
    return sum(2 * p.rows * p.cols * p.inner * p.count for p in matmuls_of_onnx(path))


def matmuls_of_onnx(path: Path) -> list[Matmul]:
    """Every MatMul, Gemm, Conv (as implicit GEMM) and separate kernel launch of an ONNX file with static shapes.

    Raises EngineError for a file that is not ONNX, a matmul without static shape (naming the tensor), and an
    operator whose cost is not known.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        return list(_walk(onnx.shape_inference.infer_shapes(model, data_prop=True).graph))
    except EngineError as error:
        raise EngineError(f"{path}: {error}") from None
    except Exception as error:  # protobuf, onnx and the operating system each raise their own
        detail = " ".join(str(error).split())[:200]
        raise EngineError(f"{path}: cannot be read as ONNX ({detail}): export it again") from None


def _walk(graph: Any) -> Iterator[Matmul]:
    """The matmuls of an ONNX graph with inferred shapes, in order. Raises EngineError."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes.setdefault(value.name, tuple(d.dim_value or d.dim_param or "?" for d in dims))
    constants = {"", *(tensor.name for tensor in graph.initializer)}
    for node in graph.node:
        if node.op_type in UNKNOWN or node.domain not in ("", "ai.onnx"):
            raise EngineError(f"the cost of operator {node.op_type} is not known: export a model without it")
        if constants.issuperset(node.input):
            constants.update(node.output)
        elif node.op_type in MATMULS:
            left, right, out = (_static(name, shapes) for name in (*node.input[:2], node.output[0]))
            yield _matmul(node, left, right, out, node.input[1] in constants)
        elif node.op_type in LAUNCHES and node.input[LAUNCHES[node.op_type]] not in constants:
            yield LAUNCH


def _static(name: str, shapes: dict[str, Shape]) -> Fixed:
    """The shape of a tensor. Raises EngineError unless it is known and every dimension is a number."""
    shape = shapes.get(name, ("?",))
    fixed = tuple(size for size in shape if isinstance(size, int))
    if len(fixed) < len(shape):
        found = ", ".join(map(str, shape))
        raise EngineError(f"tensor {name!r} has no static shape [{found}]: export with fixed sizes")
    return fixed


def _matmul(node: Any, left: Fixed, right: Fixed, out: Fixed, weight: bool) -> Matmul:
    """One MatMul, Gemm or Conv node as a Matmul, from the shapes of its first two inputs and its output."""
    if node.op_type == "Conv":  # (B, C, *in) and (M, C / group, *kernel) give (B, M, *out)
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        return Matmul(out[0] * prod(out[2:]), out[1] // groups, prod(right[1:]), groups, weight)
    if node.op_type == "Gemm":
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        return Matmul(out[0], out[1], left[0 if turned else 1], weight=weight)
    left, right = (1, *left) if len(left) == 1 else left, (*right, 1) if len(right) == 1 else right
    if len(right) == 2:  # a linear layer: the batch is more rows
        return Matmul(prod(left[:-1]), right[1], left[-1], weight=weight)
    count = prod(np.broadcast_shapes(left[:-2], right[:-2]))
    return Matmul(left[-2], right[-1], left[-1], count, weight)

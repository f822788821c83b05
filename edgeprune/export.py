"""A pruned ViT, or the bare trunk at any number of tokens, from PyTorch to ONNX in which every shape is static."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, shape_inference
from onnx.external_data_helper import set_external_data, write_external_data_tensors

from edgeprune.errors import ExportError
from edgeprune.graph import INLINE_BYTES, canonical_gelu, lower_opset, static_or_raise, strip_traces
from edgeprune.records import replacing, writable

if TYPE_CHECKING:
    from torch import Tensor, nn

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]
OUTSIDE_BYTES = 1024  # weights of a trunk from this size on lie in its weights file


def unchanged(model: onnx.ModelProto) -> onnx.ModelProto:
    """The conversion that does nothing."""
    return model


def onnx_from_module(
    module: nn.Module,
    example: Tensor,
    path: Path,
    names: tuple[str, str] = ("images", "logits"),
    convert: Convert = unchanged,
) -> None:
    """Export `module` at the static shape of `example`, then `convert` it. Raises ExportError, OutputError."""
    model = convert(_exported(module, example, names, None))
    static_or_raise(model)
    _save(model, path)


def trunk_from_module(module: nn.Module, example: Tensor, path: Path, convert: Convert = unchanged) -> None:
    """Export the trunk with a symbolic token axis, weights in `<name>.weights` beside it.

    The weights stay out of the ONNX so that all static probes share them. Raises ExportError, OutputError.
    """
    model = convert(_exported(module, example, ("x", "y"), 1))
    folded = [node.op_type for node in model.graph.node if node.op_type == "Shape"]
    if folded:
        raise ExportError(f"the trunk computes {len(folded)} shapes at run time: report this model")
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[1].HasField("dim_value"):
            value.type.tensor_type.shape.dim[1].dim_param = "tokens"
    del model.graph.value_info[:]
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = path.with_suffix(".weights")
        weights.unlink(missing_ok=True)  # onnx appends to an existing file
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= OUTSIDE_BYTES:
                set_external_data(tensor, weights.name)
        write_external_data_tensors(model, str(path.parent))
    with replacing(path) as temporary:  # last: where the graph is, its weights are whole
        temporary.write_bytes(model.SerializeToString())


def _exported(
    module: nn.Module, example: Tensor, names: tuple[str, str], symbolic_axis: int | None
) -> onnx.ModelProto:
    """torch's dynamo exporter, cleaned: opset 17, inferred shapes, no traces of the exporting machine."""
    import torch

    dynamic: Any = None
    if symbolic_axis is not None:
        dynamic = ({symbolic_axis: torch.export.Dim.DYNAMIC},)
    with _quiet(), unfused(module), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=18,  # the exporter's lowest; lower_opset takes it to 17
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    lower_opset(model)
    canonical_gelu(model)
    strip_traces(model)
    if symbolic_axis is None:
        model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return model


def _save(model: onnx.ModelProto, path: Path) -> None:
    size = sum(_bytes_of(tensor) for tensor in model.graph.initializer)
    if size > INLINE_BYTES:
        raise ExportError(f"{size / 2**30:.1f} GiB of weights do not fit into one ONNX file: use a smaller model")
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _bytes_of(tensor: TensorProto) -> int:
    return len(tensor.raw_data) or tensor.ByteSize()


@contextmanager
def unfused(module: nn.Module) -> Iterator[None]:
    """timm's own explicit attention for the time of an export.

    torch's fused operator exports as two scalings and reshapes with computed shapes; timm's explicit form
    is what TensorRT fuses.
    """
    attentions: list[Any] = [m for m in module.modules() if getattr(m, "fused_attn", False)]
    for attention in attentions:
        attention.fused_attn = False
    try:
        yield
    finally:
        for attention in attentions:
            attention.fused_attn = True


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its opset conversion on every call; real failures raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    others = [logging.getLogger(n) for n in ("onnxscript", "onnx_ir")]
    levels = [other.level for other in others]
    for other in others:
        other.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for other, old in zip(others, levels, strict=True):
            other.setLevel(old)

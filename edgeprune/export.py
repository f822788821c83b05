"""A pruned ViT, or the bare trunk at n tokens, as ONNX in which every shape is static.

Promises, each checked before a file is handed on: opset 17 (TensorRT 8.6 reads no later one), every
dimension a number, logits equal to PyTorch's, attention of blocks without a cut in the form that
TensorRT fuses (scale before the first product, one consumer of the softmax).
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto, shape_inference
from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors

from edgeprune.errors import ExportError, InputError
from edgeprune.records import replacing, writable

if TYPE_CHECKING:
    from torch import Tensor, nn

OPSET = 17
REDUCTIONS = {
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}
CHANGED_IN_18 = {"Split", "Pad", "Resize", "ScatterElements", "ScatterND", "GroupNormalization"}
INLINE_BYTES = 1 << 30  # weights above this go to a file beside the ONNX: protobuf ends at 2 GiB


def onnx_from_module(
    module: nn.Module, example: Tensor, path: Path, names: tuple[str, str] = ("images", "logits")
) -> None:
    """Export `module` at the static shape of `example`. Raises ExportError, OutputError."""
    model = _exported(module, example, names, None)
    static_or_raise(model)
    _save(model, path)


def trunk_from_module(module: nn.Module, example: Tensor, path: Path) -> None:
    """Export the trunk with a symbolic token axis, weights in `<name>.weights` beside it.

    The weights stay out of the ONNX so that all static probes share them. Raises ExportError, OutputError.
    """
    model = _exported(module, example, ("x", "y"), 1)
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
        convert_model_to_external_data(model, location=weights.name, size_threshold=1024)
        write_external_data_tensors(model, str(path.parent))
    with replacing(path) as temporary:  # last: where the graph is, its weights are whole
        temporary.write_bytes(model.SerializeToString())


def fix_tokens(trunk: Path, tokens: int, out: Path) -> None:
    """Write the trunk with its token axis fixed to `tokens`; needs no torch and takes milliseconds.

    `out` must lie beside `trunk`, whose weights file it shares. Raises ExportError when a shape stays
    dynamic, InputError when `trunk` is no such file.
    """
    if out.parent != trunk.parent:
        raise InputError(f"{out} must lie beside {trunk}, whose weights it shares")
    model = load_graph(trunk)
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) != 3:
            raise InputError(f"{trunk}: {value.name} is not (batch, tokens, width): export it with edgeprune")
        if not dims[1].HasField("dim_value"):  # the last block's output is the prefix, whatever enters it
            dims[1].dim_value = tokens
    model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    static_or_raise(model)
    with replacing(out) as temporary:
        temporary.write_bytes(model.SerializeToString())


def load_graph(path: Path) -> onnx.ModelProto:
    """An ONNX file without its external weights. Raises InputError."""
    try:
        if path.stat().st_size > 4 * INLINE_BYTES:
            raise InputError(f"{path}: too large for an ONNX file")
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node:  # protobuf reads an empty file as an empty model
            raise ValueError("no graph")
        return model
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except Exception as error:  # protobuf raises its own DecodeError, which onnx does not re-export
        raise InputError(f"{path}: not an ONNX file ({type(error).__name__}): export it again") from None


def static_or_raise(model: onnx.ModelProto) -> None:
    """Raise ExportError naming the first value whose shape is not a list of numbers."""
    graph = model.graph
    known = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
    for name in (*(o for node in graph.node for o in node.output if o), *(v.name for v in graph.input)):
        value = known.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            raise ExportError(f"the shape of {name} is unknown after shape inference: report this model")
        dims = value.type.tensor_type.shape.dim
        if not all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in dims):
            text = ", ".join(dim.dim_param or str(dim.dim_value or "?") for dim in dims)
            raise ExportError(f"{name} has the dynamic shape ({text}): report this model")


def attention_forms(model: onnx.ModelProto) -> list[bool]:
    """For each softmax over attention scores, in order: does it stand in the form that TensorRT fuses?

    Mul (scale) -> MatMul -> [Add bias] -> Softmax -> MatMul, no other consumer of any link.
    Source: TensorRT developer guide, "Multi-head attention fusion".
    """
    producer = {output: node for node in model.graph.node for output in node.output}
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(value.name for value in model.graph.output)
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    forms = []
    for node in model.graph.node:
        if node.op_type != "Softmax":
            continue
        scores = producer.get(node.input[0])
        links = [node.input[0], node.output[0]]
        if scores is not None and scores.op_type == "Add":  # log of token sizes
            scores = next((producer[i] for i in scores.input if i in producer), None)
        if scores is None or scores.op_type != "MatMul":
            continue
        links.append(scores.output[0])
        scaled = any(producer.get(i) is not None and producer[i].op_type == "Mul" for i in scores.input)
        after = consumers.get(node.output[0], [])
        alone = all(uses[name] == 1 for name in links)
        forms.append(scaled and alone and bool(after) and after[0].op_type == "MatMul")
    return forms


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
    strip_traces(model)
    if symbolic_axis is None:
        model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return model


def lower_opset(model: onnx.ModelProto) -> None:
    """Opset 18 to 17: the one difference a ViT meets is that reductions take their axes as an attribute.

    Raises ExportError, naming the operator, for any other operator that changed in opset 18.
    """
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in REDUCTIONS and len(node.input) == 2:
            axes = onnx.numpy_helper.to_array(constants[node.input.pop()])
            kept = [a for a in node.attribute if a.name == "keepdims"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("axes", axes.tolist())])
        elif node.op_type in CHANGED_IN_18:
            raise ExportError(f"{node.op_type} has no opset-{OPSET} form here: report this model")
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = OPSET
    used = {name for node in model.graph.node for name in node.input}
    weights = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    model.ir_version = 8  # the ONNX IR of opset 17


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove stack traces and source paths that the exporter leaves: a file must not depend on its maker."""
    graph = model.graph
    model.producer_name, model.producer_version, model.doc_string = "edgeprune", "", ""
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    model.ClearField("metadata_props")


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

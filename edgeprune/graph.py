"""ONNX graphs, without torch: loaded, fixed to a token count, cleaned after export, checked.

Promises that a graph is held to: opset 17 (TensorRT 8.6 reads no later one), every dimension a number,
attention of blocks without a cut in the form that TensorRT fuses (scale before the first product, one
consumer of the softmax).
"""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import shape_inference

from edgeprune.errors import ExportError, InputError
from edgeprune.records import Card, decode, encode, replacing

OPSET = 17
REDUCTIONS = {
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}
CHANGED_IN_18 = {"Split", "Pad", "Resize", "ScatterElements", "ScatterND", "GroupNormalization"}
CARD = "edgeprune"  # key of the card in an ONNX file's metadata
INLINE_BYTES = 1 << 30  # weights above this go to a file beside the ONNX: protobuf ends at 2 GiB


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


def precision_of(model: onnx.ModelProto) -> str:
    """fp32, fp16 or int8: what a graph's weights are, as far as most of them go."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "int8"
    return "fp16" if any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer) else "fp32"


def input_shape(model: onnx.ModelProto) -> tuple[int, ...]:
    """Static shape of a graph's input, (B, 3, P, P) of a whole model; 0 where an axis is dynamic."""
    return tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)


def attach(card: Card, model: onnx.ModelProto) -> None:
    """Put a card into a graph's metadata."""
    onnx.helper.set_model_props(model, {CARD: encode(card).decode()})


def card_of(path: Path) -> Card | None:
    """The card in an ONNX file; None in one that has none. Raises InputError, RecordError."""
    found = [entry.value for entry in load_graph(path).metadata_props if entry.key == CARD]
    return decode(found[0].encode(), Card, f"{path}, metadata") if found else None


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


def canonical_gelu(model: onnx.ModelProto) -> None:
    """x * (0.5 * (1 + erf)), as torch exports GELU, to (x * (1 + erf)) * 0.5, which runtimes fuse; exact.

    Source of the pattern: ONNX Runtime's GeluFusion. Unfused it is five operators over the widest tensor.
    """
    made = {output: node for node in model.graph.node for output in node.output}
    erf = {output for output, node in made.items() if node.op_type == "Erf"}
    plus_one = {output for output, node in made.items() if node.op_type == "Add" and erf & set(node.input)}
    for outer in (node for node in model.graph.node if node.op_type == "Mul"):
        for x, product in permutations(list(outer.input)):
            inner = made.get(product)
            if inner is None or inner.op_type != "Mul" or not plus_one & set(inner.input):
                continue
            plus, half = sorted(inner.input, key=lambda name: name not in plus_one)
            inner.input[:] = [x, plus]
            outer.input[:] = [product, half]


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove stack traces and source paths that the exporter leaves: a file must not depend on its maker."""
    graph = model.graph
    model.producer_name, model.producer_version, model.doc_string = "edgeprune", "", ""
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    model.ClearField("metadata_props")


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

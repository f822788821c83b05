"""ONNX graphs without torch: load, save, fix to a token count, check.

Requirements on a graph: opset 17 (the newest that TensorRT 8.6 reads), every dimension a number.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto, shape_inference
from onnx.external_data_helper import ExternalDataInfo

from edgeprune.errors import REPORT, ExportError, InputError
from edgeprune.io import decode, encode, replacing
from edgeprune.records import ModelMetadata

METADATA_KEY = "edgeprune"  # key of the metadata in an ONNX file's metadata
PROTOBUF_BYTES = 2 << 30  # protobuf's limit
INLINE_BYTES = 1 << 30  # larger weights are in a separate file next to the ONNX
OUTSIDE_BYTES = 1024  # tensors from this size on move to that file
SMALLEST = 16  # rows and columns of a linear layer's weight matrix
MOST_SORTED = 3840  # tokens in TensorRT's TopK
ALIGNED_BYTES = 4096  # alignment of tensors in it, so that it can be memory-mapped (onnx/docs/ExternalData.md)


def load_graph(path: Path) -> onnx.ModelProto:
    """An ONNX file without its external weights. Raises InputError."""
    try:
        if path.stat().st_size > PROTOBUF_BYTES:
            raise ValueError("too large")
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node:  # protobuf reads an empty file as an empty model
            raise ValueError("no graph")
        return model
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except Exception as error:  # protobuf raises its own DecodeError, which onnx does not re-export
        raise InputError(f"{path}: not an ONNX file ({type(error).__name__}): export it again") from None


def save_graph(model: onnx.ModelProto, path: Path, folder: Path | None = None) -> None:
    """Write a model atomically, weights of more than INLINE_BYTES to `<name>-<hash>.weights` in the same folder.

    The hash is that of the weights, so that the bytes of the ONNX file, and every key computed from them, depend on
    the weights. `folder` holds the weights that are already outside `model`. Raises OutputError.
    """
    tensors = model.graph.initializer
    if sum(map(_bytes_of, tensors)) > INLINE_BYTES or any(map(_is_outside, tensors)):
        digest = hashlib.sha256()
        for tensor in filter(_is_large, tensors):
            digest.update(_content(tensor, folder))
        save_apart(model, path, path.with_name(f"{path.stem}-{digest.hexdigest()[:16]}.weights"), folder)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def save_apart(model: onnx.ModelProto, path: Path, weights: Path, folder: Path | None = None) -> None:
    """Write the large tensors of a model to the file `weights`, then the rest to `path`. Raises OutputError."""
    outline = _outline(model)
    with replacing(weights) as temporary, open(temporary, "wb") as file:
        for tensor, empty in zip(model.graph.initializer, outline.graph.initializer, strict=True):
            if not _is_large(tensor):
                continue
            file.write(b"\0" * (-file.tell() % ALIGNED_BYTES))
            content, empty.data_location = _content(tensor, folder), TensorProto.EXTERNAL
            for key, value in (("location", weights.name), ("offset", file.tell()), ("length", len(content))):
                empty.external_data.add(key=key, value=str(value))
            file.write(content)
    with replacing(path) as temporary:
        temporary.write_bytes(outline.SerializeToString())


def weights_of(path: Path) -> tuple[Path, ...]:
    """The separate weight files of an ONNX file; empty if it holds all weights itself. Raises InputError."""
    tensors = load_graph(path).graph.initializer
    names = {ExternalDataInfo(tensor).location for tensor in tensors if _is_outside(tensor)}
    return tuple(path.with_name(Path(name).name) for name in sorted(names))


def copy_graph(path: Path, out: Path) -> None:
    """Copy an ONNX file after its weight files, which keep their names. Raises InputError, OutputError."""
    for source, place in (*((file, out.with_name(file.name)) for file in weights_of(path)), (path, out)):
        with replacing(place) as temporary:
            shutil.copyfile(source, temporary)


def infer(model: onnx.ModelProto) -> None:
    """Infer all shapes in place. onnx gets the graph without its weights, because it accepts at most 2 GiB.

    Raises onnx's InferenceError for a graph that contradicts itself.
    """
    known = shape_inference.infer_shapes(_outline(model), strict_mode=True, data_prop=True).graph
    for name in ("value_info", "output"):
        del getattr(model.graph, name)[:]
        getattr(model.graph, name).extend(getattr(known, name))


def _outline(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model with empty large tensors."""
    graph = model.graph
    outline = onnx.ModelProto(
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        opset_import=model.opset_import,
        metadata_props=model.metadata_props,
    )
    outline.graph.name = graph.name
    for name in ("node", "input", "output", "value_info"):
        getattr(outline.graph, name).extend(getattr(graph, name))
    for tensor in graph.initializer:
        empty = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        outline.graph.initializer.append(empty if _is_large(tensor) else tensor)
    return outline


def _is_large(tensor: TensorProto) -> bool:
    return _is_outside(tensor) or len(tensor.raw_data) >= OUTSIDE_BYTES


def _is_outside(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _bytes_of(tensor: TensorProto) -> int:
    return ExternalDataInfo(tensor).length or 0 if _is_outside(tensor) else len(tensor.raw_data) or tensor.ByteSize()


def _content(tensor: TensorProto, folder: Path | None) -> bytes:
    """The bytes of a large tensor, from the tensor itself or from its file in `folder`."""
    if not _is_outside(tensor):
        return bytes(tensor.raw_data)
    assert folder is not None, f"{tensor.name} is outside the model"
    place = ExternalDataInfo(tensor)
    with open(folder / place.location, "rb") as file:
        file.seek(place.offset or 0)
        return file.read(place.length or -1)


def precision_of(model: onnx.ModelProto) -> str:
    """The precision of a graph: fp32, fp16, int8 or fp8."""
    if any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer):
        return "fp8"
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "int8"
    return "fp16" if any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer) else "fp32"


def onnx_precision_of(model: onnx.ModelProto) -> str:
    """precision_of, or int8-fp16 where everything that is not INT8 is fp16, as TensorRT needs it."""
    halves = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    precision = precision_of(model)
    return "int8-fp16" if precision == "int8" and halves else precision


def input_shape(model: onnx.ModelProto) -> tuple[int, ...]:
    """Shape of a graph's input, (B, 3, P, P) for a whole model; 0 for a dynamic axis. Raises InputError."""
    if not model.graph.input:
        raise InputError("the ONNX file has no input: export it with edgeprune export")
    return tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)


def attach(metadata: ModelMetadata, model: onnx.ModelProto) -> None:
    """Add the record to the metadata of a graph."""
    onnx.helper.set_model_props(model, {METADATA_KEY: encode(metadata).decode()})


def metadata_in(path: Path) -> ModelMetadata | None:
    """The record in the metadata of an ONNX file; None if there is none. Raises InputError, RecordError."""
    found = [entry.value for entry in load_graph(path).metadata_props if entry.key == METADATA_KEY]
    return decode(found[0].encode(), ModelMetadata, f"{path}, metadata") if found else None


def fix_tokens(trunk: Path, tokens: int, out: Path) -> None:
    """Write the trunk with its token axis fixed to `tokens`; takes milliseconds.

    `out` must be in the folder of `trunk`, because both share the weights file. Raises ExportError if a shape stays
    dynamic, InputError if `trunk` is not such a file, OutputError.
    """
    if out.parent != trunk.parent:
        raise InputError(f"{out} shares the weights of {trunk}: choose a path in the same folder")
    model = load_graph(trunk)
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) != 3:
            raise InputError(f"{trunk}: {value.name} is not (batch, tokens, width): export it with edgeprune")
        if not dims[1].HasField("dim_value"):  # not for the last block, whose output is always the prefix
            dims[1].dim_value = tokens
    try:
        infer(model)
    except (shape_inference.InferenceError, ValueError) as error:
        detail = " ".join(str(error).split())[:160]
        raise InputError(f"{trunk}: its shapes are inconsistent ({detail}): export it with edgeprune") from None
    static_or_raise(model)
    with replacing(out) as temporary:
        temporary.write_bytes(model.SerializeToString())


def static_or_raise(model: onnx.ModelProto) -> None:
    """Raise ExportError, naming the first value whose shape is unknown or dynamic."""
    graph = model.graph
    known = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
    for name in (*(o for node in graph.node for o in node.output if o), *(v.name for v in graph.input)):
        value = known.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            raise ExportError(f"the shape of {name} is unknown after shape inference: {REPORT}")
        dims = value.type.tensor_type.shape.dim
        if not all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in dims):
            text = ", ".join(dim.dim_param or str(dim.dim_value or "?") for dim in dims)
            raise ExportError(f"{name} has the dynamic shape ({text}): {REPORT}")


def sorts_or_raise(model: onnx.ModelProto) -> None:
    """Raise ExportError where a cut sorts more tokens than TensorRT can.

    Its TopK takes at most 3840 (NVIDIA TensorRT operator documentation, TopK), and fold, evit and tome sort all
    tokens, not only those that they keep. ONNX Runtime has no limit.
    """
    counts = {t.name: int(onnx.numpy_helper.to_array(t).max()) for t in model.graph.initializer if _is_count(t)}
    most = max((counts.get(node.input[1], 0) for node in model.graph.node if node.op_type == "TopK"), default=0)
    if most > MOST_SORTED:
        raise ExportError(
            f"a cut sorts {most} tokens, but TensorRT at most {MOST_SORTED}: cut later, use --method topk or "
            "pomt, or a model with fewer tokens"
        )


def _is_count(tensor: TensorProto) -> bool:
    return bool(tensor.data_type == TensorProto.INT64 and tuple(tensor.dims) in ((), (1,)))


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

"""Export from PyTorch to ONNX: a pruned ViT with static shapes, or the trunk with a symbolic token axis."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx.external_data_helper import load_external_data_for_model

from edgeprune.errors import REPORT, ExportError
from edgeprune.io import writable
from edgeprune.onnx_graph import graph
from edgeprune.onnx_graph.chain import Repeatable, repeatable
from edgeprune.onnx_graph.graph import attach, infer, save_apart, save_graph, sorts_or_raise, static_or_raise
from edgeprune.onnx_graph.passes import canonical_gelu, drop_idle_casts, lower_opset, strip_traces
from edgeprune.onnx_graph.precision import Convert
from edgeprune.records import ModelMetadata
from edgeprune.tasks import output_names
from edgeprune.vit.torch_exporter import quiet_and_fast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from edgeprune.vit.families import Family
    from edgeprune.vit.models import Model
    from edgeprune.vit.rotary import Rotation


def onnx_from_module(
    module: nn.Module,
    example: Tensor,
    path: Path,
    names: tuple[str, ...] = ("images", "logits"),
    convert: Convert | None = None,
    metadata: ModelMetadata | None = None,
    tensorrt: bool = False,
) -> None:
    """Export `module` at the static shape of `example`, `convert` the graph and attach `metadata`.

    `names` are those of the input and of the outputs. Raises ExportError, with `tensorrt` also where a cut is beyond
    TensorRT's limits, and OutputError.
    """
    with _scratch(path) as folder:
        model = _exported(module, example, names, None, convert, folder)
        if tensorrt:
            sorts_or_raise(model)
        if metadata is not None:
            attach(metadata, model)
        static_or_raise(model)
        save_graph(model, path, folder)


def onnx_of_schedule(
    model: Model,
    method: str,
    tokens: Sequence[int],
    prefix_last: bool,
    batch: int,
    path: Path,
    convert: Convert | None = None,
    metadata: ModelMetadata | None = None,
    tensorrt: bool = False,
) -> None:
    """Export a model with a schedule at a static batch; arguments and errors are those of onnx_from_module."""
    import torch

    from edgeprune.vit.fidelity import pruned_module

    example = torch.zeros(batch, 3, *model.vit.size)
    module = pruned_module(model, method, tokens, prefix_last)
    names = ("images", *output_names(model.task, model.vit))
    onnx_from_module(module, example, path, names, convert, metadata, tensorrt)


def trunk_from_module(module: nn.Module, example: Tensor, path: Path, convert: Convert | None = None) -> None:
    """Export the trunk with a symbolic token axis, and its weights to `<name>.weights` in the same folder.

    The weights are a separate file, which the trunks at all token counts share. Raises ExportError, OutputError.
    """
    with _scratch(path) as folder:
        save_trunk(_exported(module, example, ("x", "y"), 1, convert, folder), path, folder)


def save_trunk(model: onnx.ModelProto, path: Path, folder: Path | None = None) -> None:
    """Write a graph with a symbolic token axis; arguments and errors are those of save_apart, and ExportError."""
    folded = [node.op_type for node in model.graph.node if node.op_type == "Shape"]
    if folded:
        raise ExportError(f"the trunk computes {len(folded)} shapes at run time: {REPORT}")
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[1].HasField("dim_value"):
            value.type.tensor_type.shape.dim[1].dim_param = "tokens"
    del model.graph.value_info[:]
    save_apart(model, path, path.with_suffix(".weights"), folder)


def graph_of_block(
    block: nn.Module, family: Family, example: Tensor, rotation: Rotation | None = None
) -> Repeatable | None:
    """The graph of a block without a cut on (B, N, C), to be repeated with other weights; None as in `repeatable`.

    It is exported with random weights: no two are equal, so that each is found in the graph. Raises ExportError.
    """
    import torch

    from edgeprune.vit.pruned import Trunk

    own, generator = copy.deepcopy(block), torch.Generator().manual_seed(0)
    for tensor in own.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    with tempfile.TemporaryDirectory() as folder:
        model = _exported(Trunk([own], family, rotation), example, ("x", "y"), 1, None, Path(folder))
        load_external_data_for_model(model, folder)
    return repeatable(model, weight_arrays(own))


def weight_arrays(block: nn.Module) -> dict[str, NDArray[np.float32]]:
    """The weights of a block by name."""
    return {name: tensor.numpy() for name, tensor in block.state_dict().items() if tensor.is_floating_point()}


def _exported(
    module: nn.Module,
    example: Tensor,
    names: tuple[str, ...],
    symbolic_axis: int | None,
    convert: Convert | None,
    folder: Path,
) -> onnx.ModelProto:
    """The converted graph; weights of more than graph.INLINE_BYTES are in `folder`, unless `convert` needed them."""
    model = traced(module, example, names, symbolic_axis, folder)
    if convert is not None:
        load_external_data_for_model(model, str(folder))
        model = convert(model)
    return model


def traced(
    module: nn.Module, example: Tensor, names: tuple[str, ...], symbolic_axis: int | None, folder: Path
) -> onnx.ModelProto:
    """The graph from torch's dynamo exporter, with opset 17, inferred shapes and no paths of this machine.

    Weights of more than graph.INLINE_BYTES are in `folder`. Raises ExportError.
    """
    import torch

    dynamic: Any = None
    if symbolic_axis is not None:
        dynamic = ({symbolic_axis: torch.export.Dim.DYNAMIC},)
    with quiet_and_fast(), unfused(module), fixed_size(module), fixed_places(module), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=18,  # the lowest that the exporter supports; lower_opset converts to 17
                input_names=[names[0]],
                output_names=list(names[1:]),
                dynamic_shapes=dynamic,
                optimize=symbolic_axis is not None,
                verbose=False,
            )
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # its own derives from RuntimeError
            detail = " ".join(str(error.__cause__ or error).split())[:200]
            raise ExportError(f"torch cannot export the model ({detail}): {REPORT}") from error
        if symbolic_axis is None:
            simplify(program.model)
    weights = program.model.graph.initializers.values()
    if sum(weight.const_value.nbytes for weight in weights) > graph.INLINE_BYTES:
        with writable(folder):
            program.save(folder / "exported.onnx", external_data=True)
        model = onnx.load(folder / "exported.onnx", load_external_data=False)
    else:
        model = program.model_proto
    lower_opset(model)
    canonical_gelu(model)
    strip_traces(model)
    if symbolic_axis is None:
        infer(model)
        drop_idle_casts(model)
    return model


def simplify(model: Any) -> None:
    """Fold constants and merge equal values in an onnx_ir.Model, in place; remove casts and reshapes without effect.

    For static shapes this and drop_idle_casts give the graphs of the exporter's own optimisation. That one also looks
    for some forty patterns that no ViT has, which takes a third of the time of an export.
    """
    from onnx_ir import passes
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    for _ in range(2):  # the second round folds what the first has made constant
        optimizer.fold_constants(model)
        rewriter.rewrite(
            model,
            [
                rules.no_op_cast_rule,
                rules.cast_cast_rule,
                rules.reshape_reshape_rule,
                rules.unsqueeze_unsqueeze_rule,
                rules.squeeze_reshape_1d_rule,
            ],
        )
        passes.Sequential(
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
        )(model)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path` during its export. Raises OutputError."""
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    with folder as name:
        yield Path(name)


@contextmanager
def unfused(module: nn.Module) -> Iterator[None]:
    """Use timm's explicit attention during an export.

    torch's fused operator exports as two scalings and reshapes with computed shapes; timm's explicit form is what
    TensorRT fuses.
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
def fixed_size(module: nn.Module) -> Iterator[None]:
    """Fix the image size of models that take any size during an export; timm would resample position embeddings."""
    sizeless: list[Any] = [m for m in module.modules() if getattr(m, "dynamic_img_size", False)]
    for model in sizeless:
        model.dynamic_img_size, model.patch_embed.flatten = False, True
    try:
        yield
    finally:
        for model in sizeless:
            model.dynamic_img_size, model.patch_embed.flatten = True, False


@contextmanager
def fixed_places(module: nn.Module) -> Iterator[None]:
    """Make the table of rotary positions a constant during an export; timm may compute it in every call."""
    from edgeprune.vit.pruned import PrunedViT

    pruned = [m for m in module.modules() if isinstance(m, PrunedViT)]
    for each in pruned:
        table = each.family.rotary(each.model)
        each.rotary = None if table is None else table.detach()
    try:
        yield
    finally:
        for each in pruned:
            each.rotary = None

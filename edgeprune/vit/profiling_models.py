"""Exports the ONNX files that a staircase is measured on: trunk, block, last block, embedding with head, cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from edgeprune.io import save
from edgeprune.latency.depth import LEAST_BLOCKS, PAIR
from edgeprune.latency.profiling import check_profiling_models, cut_file, cut_pairs
from edgeprune.onnx_graph.chain import Repeatable, chained
from edgeprune.onnx_graph.precision import CONVERSIONS, Convert
from edgeprune.records import Progress, silent
from edgeprune.tasks import output_names
from edgeprune.vit import export
from edgeprune.vit.models import Model
from edgeprune.vit.pruned import CutBlock, Fixed, LastBlock, PrunedViT, Trunk
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.rotary import Rotation


def export_profiling_models(
    model: Model,
    methods: Sequence[str],
    batch: int,
    folder: Path,
    precision: str = "fp32",
    progress: Progress = silent,
    tensorrt: bool = False,
) -> None:
    """Write trunk, block, fixed and dense ONNX files, and one block with a cut per method and `cut_pairs`.

    With `tensorrt` also two blocks, which can stand for the trunk where all blocks have one shape (latency/depth.py).

    Existing files are kept. `vit.json` in the same folder describes the model, so that the folder is all that
    `profile --trunk` needs. `precision` is that of the ONNX files (onnx_precision). INT8 ranges are nominal: latency
    does not depend on them. Raises InputError where the folder holds files of another model, batch size or
    precision, ExportError, with `tensorrt` also where a cut is beyond TensorRT's limits, and OutputError.
    """
    vit, module, family = model.vit, model.module, model.family
    blocks: Any = module.blocks
    middle = blocks[vit.depth // 2]
    reducers = {method: reducer_named(method) for method in methods}
    check_profiling_models(folder, vit, batch, precision)
    stream = torch.zeros(batch, vit.tokens, vit.width)
    images = torch.zeros(batch, 3, *vit.size)
    rotation = rotation_of(model)
    dense = PrunedViT(module, family, vit, (vit.tokens,) * vit.depth, None)
    convert = CONVERSIONS.get(precision)

    trunks = _Trunks(model, stream, convert)
    paired = tensorrt and vit.depth >= LEAST_BLOCKS and trunks.alike
    total = 5 + paired + vit.prefix_pooled + sum(len(cut_pairs(vit)) for reducer in reducers.values() if reducer)
    done = 0

    def missing(name: str, write: Callable[[Path], None]) -> None:
        nonlocal done
        if not (folder / name).exists():
            progress("exporting models to profile", done, total)
            write(folder / name)
        done += 1

    ends = ("images", *output_names(model.task, vit))
    missing("vit.json", lambda p: save(vit, p))
    missing("trunk.onnx", lambda p: trunks.write(p, blocks))
    missing("fixed.onnx", lambda p: export.onnx_from_module(Fixed(module, family, vit), images, p, ends, convert))
    missing("dense.onnx", lambda p: export.onnx_from_module(dense, images, p, ends, convert))
    missing("block.onnx", lambda p: trunks.write(p, [middle]))
    if paired:
        missing(PAIR, lambda p: trunks.write(p, [blocks[vit.depth // 2 - 1], middle]))
    if vit.prefix_pooled:
        last = LastBlock(middle, family, vit.prefix, rotation)
        missing("last.onnx", lambda p: export.trunk_from_module(last, stream, p, convert=convert))
    for method, reducer in reducers.items():
        for entering, leaving in cut_pairs(vit) if reducer else ():
            assert reducer is not None
            cut = CutBlock(middle, family, vit, leaving, reducer, rotation)
            example = stream[:, :1].expand(-1, entering, -1).contiguous()
            name = cut_file(folder, method, (entering, leaving)).name
            missing(name, lambda p, c=cut, e=example: export.onnx_from_module(  # type: ignore[misc]
                c, e, p, ("x", "y", "z") if vit.layers else ("x", "y"), convert, tensorrt=tensorrt))  # fmt: skip


class _Trunks:
    """Writes trunks of the blocks of a model; where all are alike only one is exported."""

    def __init__(self, model: Model, stream: torch.Tensor, convert: Convert | None) -> None:
        self.family, self.stream, self.convert = model.family, stream, convert
        self.rotation = rotation_of(model)
        blocks: Any = model.module.blocks
        self.middle = blocks[model.vit.depth // 2]
        self.alike = alike(blocks)

    @cached_property
    def block(self) -> Repeatable | None:
        """The graph to repeat; None where blocks have to be exported together."""
        return export.graph_of_block(self.middle, self.family, self.stream, self.rotation) if self.alike else None

    def write(self, path: Path, blocks: Sequence[torch.nn.Module]) -> None:
        """Write the trunk of some blocks. Raises ExportError, OutputError."""
        if self.block is None:
            export.trunk_from_module(Trunk(blocks, self.family, self.rotation), self.stream, path, self.convert)
            return
        model = chained(self.block, [export.weight_arrays(each) for each in blocks])
        export.save_trunk(model if self.convert is None else self.convert(model), path)


def alike(blocks: Sequence[torch.nn.Module]) -> bool:
    """Do all blocks have the same layers with the same settings, and parameters of the same shapes?"""

    def shape(block: torch.nn.Module) -> list[object]:
        layers: list[object] = [str(block), getattr(block.attn, "scale", None)]
        return layers + [(name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()]

    return all(shape(block) == shape(blocks[0]) for block in blocks)


def rotation_of(model: Model) -> Rotation | None:
    """The Rotation of a model; None without rotary positions."""
    table = model.family.rotary(model.module)
    return None if table is None else Rotation(table.shape[1], table.shape[3] // 2, model.vit.prefix)

"""The ONNX files that a staircase is measured on: trunk, block, last block, ends, cuts; exported from a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from edgeprune.io import save
from edgeprune.latency.profiling import check_probes, cut_pairs
from edgeprune.onnx_graph.precision import CONVERSIONS
from edgeprune.vit import export
from edgeprune.vit.models import Model
from edgeprune.vit.pruned import CutBlock, Fixed, LastBlock, PrunedViT, Trunk
from edgeprune.vit.reducers import reducer_named


def export_probes(model: Model, methods: Sequence[str], batch: int, folder: Path, precision: str = "fp32") -> None:
    """Write trunk, block, fixed and dense ONNX files, and a cut block per pair; those that exist stay.

    `vit.json` beside them says what they are: with it the folder is all that `profile --trunk` needs. INT8
    ranges are nominal: latency does not depend on them.
    """
    vit, module, family = model.vit, model.module, model.family
    blocks: Any = module.blocks
    middle = blocks[vit.depth // 2]
    reducers = {method: reducer_named(method) for method in methods}
    check_probes(folder, vit, batch, precision)
    stream = torch.zeros(batch, vit.tokens, vit.width)
    images = torch.zeros(batch, 3, vit.image_px, vit.image_px)
    dense = PrunedViT(module, family, vit, (vit.tokens,) * vit.depth, None)
    convert = CONVERSIONS.get(precision)

    def missing(name: str, write: Callable[[Path], None]) -> None:
        if not (folder / name).exists():
            write(folder / name)

    missing("vit.json", lambda p: save(vit, p))
    missing("trunk.onnx", lambda p: export.trunk_from_module(Trunk(list(blocks), family), stream, p, convert=convert))
    missing("fixed.onnx", lambda p: export.onnx_from_module(Fixed(module, family), images, p, convert=convert))
    missing("dense.onnx", lambda p: export.onnx_from_module(dense, images, p, convert=convert))
    missing("block.onnx", lambda p: export.trunk_from_module(Trunk([middle], family), stream, p, convert=convert))
    if vit.prefix_pooled:
        last = LastBlock(middle, family, vit.prefix)
        missing("last.onnx", lambda p: export.trunk_from_module(last, stream, p, convert=convert))
    for method, reducer in reducers.items():
        for entering, leaving in cut_pairs(vit) if reducer else ():
            assert reducer is not None
            cut = CutBlock(middle, family, vit, leaving, reducer)
            example = stream[:, :1].expand(-1, entering, -1).contiguous()
            name = f"cut-{method}-{entering}-{leaving}.onnx"
            missing(name, lambda p, c=cut, e=example: export.onnx_from_module(c, e, p, ("x", "y"), convert))  # type: ignore[misc]

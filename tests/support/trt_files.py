"""The files that NVIDIA's judges are given: methods, prefix_last on and off, batch 1 and 4, precisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.defaults import METHODS
from edgeprune.onnx_graph.precision import CONVERSIONS, onnx_precision

BATCHES = (1, 4)
PRECISIONS = tuple(onnx_precision(name, "trt") for name in ("fp32", "fp16", "int8", "fp8"))
CUTS = (13, 9)  # tokens that leave the first cut and the second, of 17


def every(precisions: Sequence[str] = PRECISIONS) -> Any:
    """Parametrises a test by method, prefix_last, batch and precision."""
    cases = [
        pytest.param(m, last, batch, precision, id=f"{m}-{'prefix' if last else 'whole'}-{batch}-{precision}")
        for m in METHODS
        for last in (True, False)
        for batch in BATCHES
        for precision in precisions
    ]
    return pytest.mark.parametrize(("method", "prefix_last", "batch", "precision"), cases)


def converted(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """An fp32 graph in a precision of PRECISIONS."""
    return CONVERSIONS[precision](model) if precision in CONVERSIONS else model


def all_at_once(model: Any) -> Any:
    """A module with the logits of every method, with and without prefix_last, beside each other: one export for all.

    Its steps are those of PrunedViT. An export takes seconds, so that a file for each would take minutes.
    """
    import torch

    from edgeprune.vit.pruned import step
    from edgeprune.vit.reducers import reducer_named
    from edgeprune.vit.tokens import Stream

    class Methods(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.module

        def forward(self, images: Any) -> Any:
            family, vit, blocks = model.family, model.vit, self.model.blocks
            logits, start = [], family.embed(self.model, images)
            for method in METHODS:
                reducer = reducer_named(method)
                keep, again = CUTS if reducer else (start.shape[1],) * 2
                stream = step(family, blocks[0], Stream(start), keep, vit, reducer)
                if stream.sizes is not None and len(images) > 1:  # a second cut weighs tokens by their sizes
                    stream = step(family, blocks[1], stream, again, vit, reducer)
                x, sizes = stream.x, stream.sizes
                last = family.prefix_only(blocks[2], x, sizes, vit.prefix), family.block(blocks[2], x, sizes)
                logits += [family.classify(self.model, each) for each in last]
            return torch.cat(logits, dim=1)

    return Methods().eval()


def networks(model: Any, folder: Path) -> Callable[..., onnx.ModelProto]:
    """f(method, prefix_last, batch, precision) is the model as the files for TensorRT are."""
    import torch

    from edgeprune.vit import export

    @cache
    def exported(batch: int) -> tuple[onnx.ModelProto, list[str]]:
        path = folder / f"all-{batch}.onnx"
        export.onnx_from_module(all_at_once(model), torch.zeros(batch, 3, 16, 16), path, tensorrt=True)
        whole = onnx.load(path)
        [end] = [node for node in whole.graph.node if "logits" in node.output]
        assert end.op_type == "Concat" and len(end.input) == 2 * len(METHODS)
        return whole, list(end.input)

    @cache
    def made(method: str, prefix_last: bool, batch: int, precision: str) -> onnx.ModelProto:
        whole, logits = exported(batch)
        name = logits[2 * METHODS.index(method) + (not prefix_last)]
        one = onnx.utils.Extractor(whole).extract_model(["images"], [name])
        return converted(one, precision)

    return made


def of_node(node: onnx.NodeProto, shape: list[int], leaving: int = TensorProto.FLOAT, **tensors: Any) -> Any:
    """A graph of one node from x, fp32 of a shape, to y of the same shape."""
    ends = [helper.make_tensor_value_info(n, kind, shape) for n, kind in (("x", TensorProto.FLOAT), ("y", leaving))]
    weights = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = helper.make_graph([node], "control", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def topk(count: int) -> Any:
    """A graph that sorts `count` values."""
    node = helper.make_node("TopK", ["x", "k"], ["y", "places"], "sort")
    return of_node(node, [1, count], k=np.array([count]))


def controls() -> dict[str, tuple[onnx.ModelProto, str]]:
    """Graphs that must be refused, with a word that the reason must hold."""
    mixed = helper.make_node("Add", ["x", "half"], ["y"], "mixed")
    return {
        "an unknown operator": (of_node(helper.make_node("Nonsense", ["x"], ["y"]), [2, 4]), "Nonsense"),
        "mixed types": (of_node(mixed, [2, 4], half=np.ones((2, 4), np.float16)), "mixed"),
        "a TopK above 3840": (topk(3841), "3840"),
    }

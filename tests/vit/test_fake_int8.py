"""Fake quantisation rounds as the INT8 file does, and lets gradients through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from support.graphs import images

from edgeprune.errors import ExportError
from edgeprune.io import sha256_bytes
from edgeprune.onnx_graph.graph import linear_layers
from edgeprune.onnx_graph.int8 import Int8Layer, int8, int8_layers
from edgeprune.records import Int8Ranges
from edgeprune.vit.export import onnx_of_schedule
from edgeprune.vit.fake_int8 import FakeInt8
from edgeprune.vit.fidelity import pruned_module

TOKENS = (9, 5, 5)


def unoptimised(model: onnx.ModelProto, feed: Any) -> Any:
    """The first output, with QuantizeLinear and DequantizeLinear computed one by one."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: feed})[0]


@pytest.mark.parametrize("kind", ["cls", "map", "eva", "eva02"])
def test_outputs_are_those_of_the_int8_file(kind: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Fused and separate q, k, v, with joined biases; gated MLPs; pooling by attention, whose query is a constant."""
    model = tiny(kind)
    onnx_of_schedule(model, "fold", TOKENS, model.vit.prefix_pooled, 2, tmp_path / "model.onnx")
    full = onnx.load(tmp_path / "model.onnx")
    nodes = linear_layers(full)
    ranges = {name: 2.0 + 0.1 * place for place, name in enumerate(sorted({node.input[0] for node in nodes}))}
    found = Int8Ranges(way="entropy", ranges=ranges, kept=(nodes[1].name, nodes[-1].name), kl=0.0)
    pruned = pruned_module(model, "fold", TOKENS, model.vit.prefix_pooled)
    with torch.no_grad():
        exact = pruned(torch.from_numpy(images())).numpy()
        with FakeInt8(int8_layers(full, found)):
            rounded = pruned(torch.from_numpy(images())).numpy()
    wanted = unoptimised(int8(full, found.ranges, found.kept), images())
    lost = np.abs(wanted - exact).max()
    assert lost > 1e-3 and np.abs(rounded - wanted).max() < 0.05 * lost
    assert [layer.limit for layer in int8_layers(full, found)].count(None) == 2


def test_gradients_pass_and_other_layers_are_refused(tiny: Callable[..., Any]) -> None:
    module = tiny("cls").module
    weights = [p for name, p in module.blocks.named_parameters() if p.ndim == 2]
    layers = [Int8Layer(sha256_bytes(weight.detach().numpy().T.tobytes()), 3.0) for weight in weights]
    module.requires_grad_(True)
    with FakeInt8(layers):
        module(torch.from_numpy(images())).sum().backward()
    for name, parameter in module.blocks.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    module.zero_grad()
    module.requires_grad_(False)
    wrong = FakeInt8([layers[0], Int8Layer("another", 3.0), *layers[2:]])
    with pytest.raises(ExportError, match="layer 2 of the ONNX file is not in the model"), wrong:
        module(torch.from_numpy(images()))

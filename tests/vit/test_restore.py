"""Dense features: timm's own where nothing is cut, the full grid after cuts, and the same in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgeprune.defaults import REDUCERS
from edgeprune.errors import InputError
from edgeprune.features import packed, unpacked, with_layers
from edgeprune.onnx_graph.attention_fusion import attention_forms
from edgeprune.onnx_graph.fp16 import fp16
from edgeprune.records import Schedule
from edgeprune.vit import export, restore
from edgeprune.vit.fidelity import Evaluator, logits_of_schedule, packed_outputs, pruned_module
from edgeprune.vit.pruned import pruned_from_module

LAYERS = (1, 3)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dense(tiny: Callable[..., Any]) -> Callable[..., Any]:
    """dense(kind) is the tiny model of three blocks with features of LAYERS."""

    def make(kind: str) -> Any:
        model = tiny(kind)
        return replace(model, vit=with_layers(model.vit, LAYERS), task="dense")

    return make


KINDS = [
    "cls",
    "distilled",
    "registers",
    "gap",
    "map",
    "post-norm",
    "norms",
    "any-size",
    "eva02",
    "dinov3",
    "mixed",
    "pe",
]


@pytest.mark.parametrize("kind", KINDS)
def test_unpruned_features_are_those_of_timm(kind: str, dense: Callable[..., Any]) -> None:
    model = dense(kind)
    with torch.inference_mode():
        *features, embedding = pruned_module(model, "none", (model.vit.tokens,) * 3)(IMAGES)
        wanted = model.module.forward_intermediates(
            IMAGES, indices=[0, 2], norm=True, output_fmt="NCHW", intermediates_only=True
        )
        whole = model.module(IMAGES)
    for found, each in zip(features, wanted, strict=True):
        assert found.shape == (2, 4, 4, 48)
        torch.testing.assert_close(found.permute(0, 3, 1, 2), each, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embedding, whole, atol=1e-5, rtol=1e-5)


def test_a_patch_keeps_its_own_stream_and_gets_the_updates_of_the_token_that_stands_for_it() -> None:
    random = torch.Generator().manual_seed(1)
    whole = torch.randn(2, 7, 64, generator=random)
    places = torch.tensor([[0, 1, 2, 1, 0], [4, 2, 0, 2, 4]])
    ones = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    first = torch.stack([whole[0, :5], whole[1, 2:]])  # two patches of each picture are gone
    grid = restore.after_cut(whole, first, None)
    assert torch.equal(grid.held[0, :5], ones[0]) and torch.equal(grid.held[1, 2:], ones[1])
    torch.testing.assert_close(restore.patches(first, grid), whole)  # nothing is lost at the cut itself
    update = torch.randn(2, 5, 64, generator=random)
    moved = restore.patches(first + update, grid)
    for image in range(2):
        torch.testing.assert_close(moved[image], whole[image] + update[image, grid.held[image]])
    second = torch.stack([(first + update)[image, places[image, :3]] for image in range(2)])
    again = restore.after_cut(first + update, second, grid)
    torch.testing.assert_close(restore.patches(second, again), moved)
    later = restore.patches(second * 2, again)
    for image in range(2):
        assert set(again.held[image].tolist()) <= {0, 1, 2}
        torch.testing.assert_close(later[image], moved[image] + second[image, again.held[image]])
    assert torch.equal(restore.nearest(whole * 3, whole), torch.arange(7).expand(2, -1)), "lengths do not count"


@pytest.mark.parametrize("method", REDUCERS)
def test_onnx_has_the_outputs_of_the_module_for_every_method(
    method: str, dense: Callable[..., Any], tmp_path: Path
) -> None:
    """Features before and after two cuts, static, without scatter, attention as fusable as without them."""
    model, tokens = dense("cls"), (13, 13, 9)
    export.onnx_of_schedule(model, method, tokens, False, 2, tmp_path / "model.onnx", tensorrt=True)
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    shapes = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in graph.graph.output}
    assert shapes == {"features_1": [2, 4, 4, 48], "features_3": [2, 4, 4, 48], "embedding": [2, 7]}
    assert not [node for node in graph.graph.node if node.op_type.startswith(("Scatter", "GatherElements"))]
    cut = method == "tome"  # reads keys alone
    assert attention_forms(graph) == [cut, True, cut]
    with torch.inference_mode():
        wanted = packed_outputs(pruned_module(model, method, tokens)(IMAGES))
    for name, each in unpacked(outputs_of(graph, tmp_path), model.vit.outputs).items():
        other = unpacked(wanted, model.vit.outputs)[name]
        assert np.linalg.norm(each - other) / np.linalg.norm(other) < 1e-5, name
    half = unpacked(outputs_of(fp16(graph), tmp_path), model.vit.outputs) if method == "fold" else {}
    for name, each in half.items():
        other = unpacked(wanted, model.vit.outputs)[name]
        assert 0 < np.linalg.norm(each - other) / np.linalg.norm(other) < 0.02, name


def outputs_of(graph: onnx.ModelProto, folder: Path) -> np.ndarray:
    """All outputs of a graph for IMAGES in ONNX Runtime, packed."""
    onnx.save(graph, folder / "run.onnx")
    session = onnxruntime.InferenceSession(str(folder / "run.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": IMAGES.numpy()})
    return packed({o.name: each for o, each in zip(session.get_outputs(), found, strict=True)})


@pytest.mark.parametrize("kind", ["cls", "dinov3"])
def test_the_evaluator_has_the_outputs_of_the_pruned_model(kind: str, dense: Callable[..., Any]) -> None:
    model = dense(kind)
    whole, prefix = model.vit.tokens, model.vit.prefix
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    evaluator = Evaluator(model, "fold", pixels)
    base, other = (whole - 4, whole - 4, whole - 4), (whole - 4, whole - 4, prefix + 6)
    evaluator.base(base)
    for tokens in ((whole,) * 3, base, other, (whole, prefix + 6, prefix + 6)):
        wanted = logits_of_schedule(model, "fold", tokens, pixels)
        np.testing.assert_allclose(evaluator.logits(tokens), wanted, atol=1e-4)
    errors = [evaluator.fidelity(tokens).error for tokens in ((whole,) * 3, base, other)]  # type: ignore[union-attr]
    assert errors[0] == pytest.approx(0, abs=1e-6) and errors[0] < errors[1] < errors[2] < 1  # type: ignore[operator]


def test_prune_gives_a_module_with_the_outputs_of_a_schedule(dense: Callable[..., Any]) -> None:
    model = dense("cls")
    schedule = Schedule(vit=model.vit, method="fold", policy="search", tokens=(17, 9, 9))
    found = pruned_from_module(model.module, schedule)(IMAGES)
    assert [tuple(each.shape) for each in found] == [(2, 4, 4, 48), (2, 4, 4, 48), (2, 7)]


def test_layers_that_the_model_does_not_have(tiny: Callable[..., Any]) -> None:
    for layers, wrong in (((4,), 4), ((0, 1), 0), ((-1,), -1)):
        with pytest.raises(InputError, match=rf"layer {wrong} is out of range: pass --layers of the blocks 1 to 3"):
            with_layers(tiny("cls").vit, layers)
    assert with_layers(tiny("cls").vit, (3, 1, 3)).layers == (1, 3)

"""Models at other sizes of pictures: what timm itself computes there, in PyTorch and in ONNX."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from onnxruntime import InferenceSession
from safetensors.torch import save_file
from support.models import EVA_KINDS, KINDS, shake
from timm.models import eva, vision_transformer

import edgeprune
from edgeprune import zoo
from edgeprune.errors import ExportError, InputError, WeightsError
from edgeprune.images import image_size
from edgeprune.io import save
from edgeprune.onnx_graph.graph import load_graph, sorts_or_raise
from edgeprune.pipeline.export import export_model
from edgeprune.records import Schedule, Vit
from edgeprune.vit.fidelity import pruned_module
from edgeprune.vit.models import load_model
from edgeprune.vit.reducers import check_sorted, sorted_tokens

SHAPE = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
SIZE = (96, 160)


def made(kind: str, **options: Any) -> Any:
    """timm's module of a kind, of 64 px unless `options` say otherwise."""
    torch.manual_seed(0)
    if kind in EVA_KINDS:
        return eva.Eva(**SHAPE | EVA_KINDS[kind] | options)
    return vision_transformer.VisionTransformer(**SHAPE | KINDS[kind] | options)


def in_folder(folder: Path, module: Any, kind: str) -> str:
    """A VisionTransformer as timm's `local-dir:` takes it."""
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "model_args": SHAPE | KINDS[kind]}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"crop_pct": 0.875}}))
    return f"local-dir:{folder}"


def resampled_by_the_loader(kind: str, module: Any) -> Any:
    """timm's model made for SIZE, with the positions that timm resamples where it loads a checkpoint."""
    other = made(kind, img_size=SIZE)
    source: Any = eva if kind in EVA_KINDS else vision_transformer
    other.load_state_dict(source.checkpoint_filter_fn(module.state_dict(), other), strict=True)
    return other.eval()


@pytest.mark.parametrize("kind", ["cls", "registers", "any-size", "eva02-small", "dinov3", "mixed"])
def test_the_unpruned_onnx_computes_what_timm_does_at_that_size(kind: str, tmp_path: Path) -> None:
    module = shake(made(kind))
    given = module if kind in EVA_KINDS else in_folder(tmp_path / kind, module, kind)
    model = load_model(given, image_size=SIZE)
    assert module.patch_embed.img_size == (64, 64)
    assert (model.vit.image_px, model.vit.grid, model.vit.patch_px) == (SIZE, (6, 10), 16)
    assert model.vit.tokens == 60 + model.vit.prefix
    assert (model.preprocessing.image_px, model.preprocessing.resize_px) == (SIZE, (109, 182))
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = resampled_by_the_loader(kind, module)(images)
    path = export_model(model, None, 1, tmp_path / "model.onnx")
    (found,) = InferenceSession(path).run(None, {"images": images.numpy()})
    assert wanted.std() > 0.01
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        for method in ("fold", "tome", "pomt"):
            tokens = (model.vit.tokens, model.vit.prefix + 20)
            assert pruned_module(model, method, tokens)(images).isfinite().all(), method


def test_positions_of_a_file(tmp_path: Path) -> None:
    """Of the model's own size they are resampled, also to as many patches; of the asked size they are kept."""
    module = shake(timm.create_model("test_vit"))
    save_file(module.state_dict(), tmp_path / "own.safetensors")
    module.set_input_size(img_size=(160, 640))  # 10 x 40 patches
    resized = module.state_dict()
    save_file(resized, tmp_path / "resized.safetensors")
    same = load_model("test_vit", str(tmp_path / "resized.safetensors"), image_size=(160, 640))
    torch.testing.assert_close(same.module.state_dict(), resized, atol=0, rtol=0)
    again = load_model("test_vit", str(tmp_path / "own.safetensors"), image_size=(160, 640))
    torch.testing.assert_close(again.module.state_dict(), resized, atol=1e-6, rtol=0)
    module.set_input_size(img_size=(96, 96))
    save_file(module.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match=r"pos_embed has shape \(1, 37, 64\), .*: pass --image-size 96$"):
        load_model("test_vit", str(tmp_path / "small.safetensors"))
    assert load_model("test_vit", str(tmp_path / "small.safetensors"), image_size=(96, 96)).vit.image_px == 96
    module.set_input_size(img_size=(96, 160))
    save_file(module.state_dict(), tmp_path / "oblong.safetensors")
    with pytest.raises(WeightsError, match=r"pass a checkpoint of this model$"):
        load_model("test_vit", str(tmp_path / "oblong.safetensors"))
    as_many = load_model("test_vit", str(tmp_path / "own.safetensors"), image_size=(80, 320))
    assert as_many.vit.tokens == 101 and as_many.vit.grid == (5, 20)
    grid = as_many.module.state_dict()["pos_embed"][:, 1:].reshape(5, 20, -1)
    before = load_model("test_vit", str(tmp_path / "own.safetensors")).module.state_dict()["pos_embed"][:, 1:]
    means = before.reshape(10, 10, -1).mean(dim=(0, 1))
    torch.testing.assert_close(grid.mean(dim=(0, 1)), means, atol=0.02, rtol=0)
    assert not torch.equal(grid.reshape(1, 100, -1), before)


# --- what is asked for ---


def test_one_number_is_a_square() -> None:
    assert image_size(None) is None
    assert image_size("96,160") == image_size((96, 160)) == (96, 160)
    assert image_size("96") == image_size(96) == (96, 96)


@pytest.mark.parametrize(
    "given", ["0", "96,0", "-96", "1,2,3", "a", "", "96,", "96x160", "9000", 96.5, (1, 2, 3), ()]
)
def test_what_is_no_size_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"image_size .*: pass H,W in pixels, or one number"):
        image_size(given, "image_size")


def test_patches_have_to_divide_it() -> None:
    with pytest.raises(InputError, match=r"97,161 .* patches of vit_tiny_patch16_224, 16x16 px: pass 96,160$"):
        load_model("vit_tiny_patch16_224", "random", image_size=(97, 161))
    with pytest.raises(InputError, match=r"gives vit_digits 16777217 tokens, above 131072"):
        load_model(zoo.EMBEDDED, image_size=(8192, 8192))


# --- TensorRT's TopK ---


@pytest.mark.parametrize("method", ["fold", "evit", "tome"])
def test_the_count_that_is_checked_is_that_in_the_graph(
    method: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("cls", 1)
    schedule = Schedule(vit=model.vit, method=method, policy="search", tokens=(12,))
    save(schedule, tmp_path / "schedule.json")
    graph = load_graph(export_model(model, tmp_path / "schedule.json", 1, tmp_path / "model.onnx"))
    count = sorted_tokens(method, model.vit)
    monkeypatch.setattr("edgeprune.onnx_graph.graph.MOST_SORTED", count)
    sorts_or_raise(graph)
    monkeypatch.setattr("edgeprune.onnx_graph.graph.MOST_SORTED", count - 1)
    with pytest.raises(ExportError, match=f"sorts {count} tokens"):
        sorts_or_raise(graph)


def test_too_many_tokens_for_tensorrt_are_refused_by_name(make_vit: Callable[..., Vit], tmp_path: Path) -> None:
    large = make_vit(name="large", image_px=(1024, 1008), tokens=4033)
    for method in ("topk", "pomt", "tome", "none"):
        check_sorted(method, large)
    with pytest.raises(
        InputError, match="evit sorts 4032 tokens of large at 1024x1008 px, TensorRT at most 3840: use"
    ):
        check_sorted("evit", large)
    options: dict[str, Any] = {"device": "orin-nano", "image_size": 128, "simulate": True, "work": tmp_path / "work"}
    for run in (edgeprune.build, edgeprune.profile):
        with pytest.raises(InputError, match="fold sorts 4097 tokens of vit_digits at 128 px"):
            run(method="fold", **options)
    assert not list((tmp_path / "work").glob("*.onnx"))

"""Folders of Hugging Face transformers: outputs against its own, preprocessing, labels, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import shake
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from edgeprune.errors import EdgepruneError
from edgeprune.vit.fidelity import pruned_module
from edgeprune.vit.hugging_face_models import ARCHITECTURES
from edgeprune.vit.models import class_labels, load_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
WIDE = {**SHAPE, "intermediate_size": 40}
TANH = {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False}
NAMES = {"id2label": {0: "cat", 1: "dog", 2: "emu"}, "label2id": {"cat": 0, "dog": 1, "emu": 2}}
PROCESSOR = {
    "size": {"height": 16, "width": 16}, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
    "do_resize": True, "do_rescale": True, "rescale_factor": 0.00392156862745098, "do_normalize": True,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # architecture, class of its config, options
    "vit": ("ViTForImageClassification", "ViTConfig", WIDE | NAMES),
    "vit-tanh": ("ViTForImageClassification", "ViTConfig", WIDE | TANH),
    "deit": ("DeiTForImageClassification", "DeiTConfig", WIDE | NAMES),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", WIDE | NAMES),
    "dinov2": ("Dinov2Model", "Dinov2Config", SHAPE),
    "dinov2-gated": ("Dinov2Model", "Dinov2Config", SHAPE | {"use_swiglu_ffn": True}),
    "dinov2-other-size": ("Dinov2Model", "Dinov2Config", SHAPE | {"image_size": 28}),
    "dinov2-classes": ("Dinov2ForImageClassification", "Dinov2Config", SHAPE | NAMES),
    "registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SHAPE | {"image_size": 28}),
    "registers-classes": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", SHAPE | NAMES),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", WIDE | {"num_register_tokens": 4}),
    "dinov3-gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        WIDE | {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False}
        | {"num_register_tokens": 0, "image_size": 32},
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", WIDE),
    "clip-projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", WIDE | {"projection_dim": 8}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", WIDE),
    "siglip-rest": ("SiglipVisionModel", "SiglipVisionConfig", WIDE | {"patch_size": 3}),  # as 384 px by 14
    "vit-rest": ("ViTForImageClassification", "ViTConfig", WIDE | {"patch_size": 3}),
    "dinov2-rest": ("Dinov2Model", "Dinov2Config", SHAPE | {"patch_size": 3}),
    "dinov3-rest": ("DINOv3ViTModel", "DINOv3ViTConfig", WIDE | {"patch_size": 3}),
}  # fmt: skip


def made(folder: Path, case: str) -> Any:
    """A random model of transformers, saved in a folder with an image processor's config."""
    architecture, config, options = CASES[case]
    torch.manual_seed(0)
    model = shake(getattr(transformers, architecture)(getattr(transformers, config)(**options)))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


def output(found: Any) -> Tensor:
    """What edgeprune gives of a transformers output: logits, else an embedding."""
    for name in ("logits", "image_embeds", "pooler_output"):
        value = getattr(found, name, None)
        if value is not None:
            return value  # type: ignore[no-any-return]
    raise AssertionError(found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    @cache
    def make(case: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp(case)
        return folder, made(folder, case)

    return make


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_transformers(case: str, saved: Callable[[str], tuple[Path, Any]]) -> None:
    """Unpruned and as PrunedViT; with position embeddings resampled where the pictures have another size."""
    folder, theirs = saved(case)
    model = load_model(str(folder))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = output(theirs(images))
        dense = pruned_module(model, "none", (model.vit.tokens,) * 2)
        assert wanted.std() > 1e-3 and wanted.shape == (2, model.vit.classes)
        torch.testing.assert_close(model.module(images), wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(dense(images), wanted, atol=1e-4, rtol=0)
        full = model.vit.tokens
        assert pruned_module(model, "fold", (full - 4, full - 8))(images).isfinite().all()
    how = model.preprocessing
    assert (how.image_px, how.resize_px, how.crop_mode, how.interpolation) == (16, 16, "squash", "bilinear")
    assert (how.mean, how.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert model.vit.name == folder.name
    if "id2label" in CASES[case][2]:
        assert class_labels(model, None) == ("cat", "dog", "emu")
        assert class_labels(model, ("a", "b", "c")) == ("a", "b", "c")
        assert class_labels(model, ("emu", "dog", "cat")) == ("cat", "dog", "emu")
    else:
        assert model.labels is None


def test_every_architecture_is_tried() -> None:
    tried = {architecture for architecture, _, _ in CASES.values()}
    assert tried == set(ARCHITECTURES) - {"CLIPModel", "SiglipModel"}


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_image_tower_of_a_model_with_text(kind: str, tmp_path: Path) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 9, "max_position_embeddings": 5, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    text |= {"projection_size": 32}
    shape = {"projection_dim": 8} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=WIDE, **shape)
    torch.manual_seed(0)
    theirs = shake(getattr(transformers, f"{kind}Model")(config))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = theirs.get_image_features(images)
        wanted = found if isinstance(found, Tensor) else found.pooler_output
        torch.testing.assert_close(load_model(str(tmp_path)).module(images), wanted, atol=1e-4, rtol=0)


def test_several_files_of_weights(saved: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, theirs = saved("vit")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    assert load_model(str(tmp_path)).vit.weights_sha256 == load_model(str(folder)).vit.weights_sha256


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [  # image_px, resize_px, crop_mode
        ({"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
         "16 20 center"),
        ({"size": {"height": 20, "width": 20}, "do_center_crop": True, "crop_size": 16}, "16 20 squash"),
        ({"size": 20, "crop_size": 16, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"},
         "16 20 center"),
        ({"size": 16}, "16 16 squash"),
    ],
)  # fmt: skip
def test_preprocessing(
    changes: dict[str, Any], wanted: str, saved: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder = changed(saved("vit")[0], tmp_path, "preprocessor_config.json", changes)
    how = load_model(str(folder), "random").preprocessing
    assert f"{how.image_px} {how.resize_px} {how.crop_mode}" == wanted
    assert load_model(str(folder), "random", {"interpolation": "bicubic"}).preprocessing.interpolation == "bicubic"


@pytest.mark.parametrize("case", ["vit", "registers", "dinov3"])
def test_another_size(case: str, saved: Callable[[str], tuple[Path, Any]]) -> None:
    """timm's resampling from the size in the config; rotary positions are those of transformers at any size."""
    folder, theirs = saved(case)
    model = load_model(str(folder), image_size=(24, 32))
    assert (model.vit.grid, model.preprocessing.resize_px, model.preprocessing.crop_mode) == (
        (6, 8),
        (24, 32),
        "squash",
    )
    if case == "dinov3":
        images = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(model.module(images), output(theirs(images)), atol=1e-4, rtol=0)
        return
    key = next(key for key in theirs.state_dict() if key.endswith("position_embeddings"))
    side = CASES[case][2]["image_size"] // 4
    wanted = resample_abs_pos_embed(theirs.state_dict()[key], new_size=[6, 8], old_size=[side, side])
    found = model.module.state_dict()["pos_embed"]
    torch.testing.assert_close(found, wanted[:, -found.shape[1] :], atol=1e-6, rtol=0)


def changed(source: Path, folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """A copy of a folder with other values in a JSON file; None removes one."""
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


CONFIG, PROCESS = "config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("case", "file", "changes", "reason"),
    [
        (
            "vit",
            CONFIG,
            {"architectures": ["BertModel"]},
            "architecture BertModel is not supported: use one of ViTFor",
        ),
        (
            "vit",
            CONFIG,
            {"architectures": None, "architecture": "vit_tiny"},
            "a timm checkpoint: pass --model local",
        ),
        ("vit", CONFIG, {"hidden_act": "mish"}, "hidden_act mish is not one of gelu"),
        ("vit", CONFIG, {"num_channels": 1}, "num_channels is 1, not 3"),
        ("vit", CONFIG, {"num_hidden_layers": 3}, "tensor encoder.layer.2.layernorm_before.weight is missing"),
        ("vit", CONFIG, {"num_hidden_layers": 1}, "tensor encoder.layer.1.* has no counterpart"),
        ("vit", CONFIG, {"hidden_size": 64}, r"has shape .*, the model needs"),
        ("vit", CONFIG, {"image_size": 32}, "image_size is 32, but preprocessor_config.json makes pictures of 16 px"),
        ("vit", CONFIG, {"image_size": [16, 8]}, "image_size and patch_size must be square"),
        ("vit", CONFIG, {"hidden_size": "wide"}, "cannot be used"),
        ("vit", CONFIG, {"architectures": [["ViT"]]}, "architecture unnamed is not supported"),
        ("vit", CONFIG, {"num_attention_heads": 5}, "cannot be used"),
        ("vit", CONFIG, {"num_hidden_layers": 0}, "no counterpart|cannot be used"),
        ("vit", CONFIG, {"patch_size": 64}, "pictures of 16x16 px are smaller than one patch"),
        ("vit", CONFIG, {"hidden_size": -48}, "cannot be used"),
        ("dinov3", CONFIG, {"key_bias": True}, "key_bias is True, which timm's Eva does not have"),
        ("dinov3", CONFIG, {"hidden_act": "silu"}, "hidden_act is silu, but timm's Eva has gelu"),
        ("dinov3", CONFIG, {"use_gated_mlp": True}, "timm's gated MLP has silu"),
        ("siglip", CONFIG, {"vision_use_head": False}, "vision_use_head is false"),
        ("vit", PROCESS, {"size": {"height": 16, "width": 8}}, "pictures of 16x8, only square ones"),
        ("vit", PROCESS, {"size": {"shortest_edge": 16}}, "leaves pictures of any shape"),
        ("vit", PROCESS, {"do_rescale": False}, "do_resize and do_rescale must be true"),
        ("vit", PROCESS, {"rescale_factor": 1.0}, "rescale_factor 1.0 is not 1/255"),
        ("vit", PROCESS, {"image_mean": None}, "no 'image_mean'"),
        ("vit", PROCESS, {"image_std": [0, 0, 0]}, "std .* pass three numbers"),
        ("vit", PROCESS, {"image_mean": [0.5]}, "mean .* pass three numbers"),
        ("vit", PROCESS, {"image_mean": ["a", "b", "c"]}, "mean .* pass three numbers"),
        (
            "clip",
            PROCESS,
            {"size": {"shortest_edge": -5}, "do_center_crop": True, "crop_size": 16},
            "crop_pct .* is out",
        ),
        ("vit", PROCESS, {"resample": 5}, "interpolation '5' is not supported"),
    ],
)
def test_bad_input_is_one_line(
    case: str,
    file: str,
    changes: dict[str, Any],
    reason: str,
    saved: Callable[[str], tuple[Path, Any]],
    tmp_path: Path,
) -> None:
    folder = changed(saved(case)[0], tmp_path, file, changes)
    with pytest.raises(EdgepruneError, match=reason) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value) and ": " in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_one_line(
    name: str, saved: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder = changed(saved("vit")[0], tmp_path, "config.json", {})
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    with pytest.raises(EdgepruneError, match=rf"{name}: not a .*save_pretrained of transformers"):
        load_model(str(folder))
    (folder / name).unlink()
    with pytest.raises(EdgepruneError, match=rf"{name}: no such file: save_pretrained of transformers"):
        load_model(str(folder))


def test_a_name_of_the_hub_is_not_a_folder() -> None:
    with pytest.raises(EdgepruneError, match=r"facebook/dinov2-small: no such folder: .*hf download"):
        load_model("facebook/dinov2-small")

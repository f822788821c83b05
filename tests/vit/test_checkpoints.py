"""Checkpoints as they lie on disks: what their tensors and a config.json beside them say about the model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.models import shake

import edgeprune
from edgeprune.errors import ModelError, WeightsError
from edgeprune.vit.checkpoints import class_names
from edgeprune.vit.models import class_labels, load_model

NAME = "test_vit"
NAMES = ["dog", "cat", "emu"]


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    return shake(timm.create_model(NAME, **options))


def saved(folder: Path, module: Any, **config: Any) -> str:
    """The path of a checkpoint; with keys for its config.json, that is beside it."""
    folder.mkdir(exist_ok=True)
    save_file(module.state_dict(), folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": NAME, "pretrained_cfg": {}} | config))
    return str(folder / "model.safetensors")


def same(found: Any, module: Any) -> None:
    images = torch.randn(2, 3, *found.vit.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(found.module(images), module(images))


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"global_pool": "avg", "fc_norm": False}, {"global_pool": "avg", "model_args": {"fc_norm": False}}),
        ({"img_size": 96, "dynamic_img_size": True}, {"pretrained_cfg": {"input_size": [3, 96, 96]}}),
        ({"img_size": 96}, {"model_args": {"img_size": 96}}),
        ({"global_pool": "max", "fc_norm": False}, {"model_args": {"global_pool": "max", "fc_norm": False}}),
    ],
    ids=["pooling", "input size", "image size", "arguments"],
)
def test_a_config_beside_the_weights_is_honoured(options: Any, config: Any, tmp_path: Path) -> None:
    """Also where the tensors would fit the model without it."""
    module = made(**options)
    found = load_model(f"{NAME}.r160_in1k", saved(tmp_path, module, **config))
    assert found.vit.image_px == module.patch_embed.img_size[0] and found.vit.name == f"{NAME}.r160_in1k"
    assert found.module.global_pool == module.global_pool
    same(found, module)


def test_a_config_loads_nothing(tmp_path: Path) -> None:
    """A checkpoint_path would be unpickled by older versions of timm."""
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    loads = {"checkpoint_path": str(tmp_path / "x.pth"), "pretrained": True, "img_size": 96}
    found = load_model(NAME, saved(tmp_path, made(img_size=96), model_args=loads))
    assert found.vit.image_px == 96


def test_a_config_of_another_model_gives_preprocessing_alone(tmp_path: Path) -> None:
    config = {
        "architecture": "vit_tiny_patch16_224",
        "global_pool": "avg",
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]},
    }
    found = load_model(NAME, saved(tmp_path, made(), **config))
    assert found.module.global_pool == "token" and found.preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("options", "task", "told"),
    [
        ({"num_classes": 0}, "embed", "num_classes=0"),
        ({"num_classes": 0, "global_pool": "avg"}, "dense", "global_pool=avg, fc_norm=True, num_classes=0"),
        ({"global_pool": "avg"}, None, "global_pool=avg, fc_norm=True"),
        ({"class_token": False, "global_pool": "avg"}, None, "fc_norm=True, class_token=False"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, None, "class_token=False, global_pool=avg"),
        ({"reg_tokens": 4}, None, "reg_tokens=4"),
        ({}, None, ""),
    ],
    ids=lambda value: str(value),
)
def test_what_the_tensors_show_is_taken_and_told(
    options: Any, task: str | None, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edgeprune")
    module = made(**options)
    found = load_model(NAME, saved(tmp_path, module), task=task)
    same(found, module)
    assert [told in record.getMessage() for record in caplog.records] == ([True] if told else [])


def test_a_missing_head_names_the_task(tmp_path: Path) -> None:
    path = saved(tmp_path, made(num_classes=0))
    with pytest.raises(WeightsError, match=r"2 keys missing .*: pass --task embed for a model without a head"):
        load_model(NAME, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    module = made()
    with torch.no_grad():
        module.blocks[1].mlp.fc1.bias[3] = value
    for model, path in ((NAME, saved(tmp_path, module)), (module, None)):
        with pytest.raises(WeightsError, match=r"not all values are finite in blocks\.1\.mlp\.fc1\.bias: pass a"):
            load_model(model, path)


# --- class names ---


def test_class_names_of_a_local_folder(tmp_path: Path) -> None:
    """Folders with its short names are numbered as its classes; the descriptions are shown."""
    module, described = made(num_classes=3), {"cat": "a cat", "dog": "a dog"}
    saved(tmp_path / "pets", module, num_classes=3, label_names=NAMES, label_descriptions=described)
    found = load_model(f"local-dir:{tmp_path / 'pets'}")
    assert found.labels == class_labels(found, None) == ("a dog", "a cat", "emu")
    assert found.labels_like(["cat", "dog", "emu"]) == ("dog", "cat", "emu")
    assert found.labels_like(["a cat"]) == ("a dog", "a cat", "emu")
    assert class_labels(found, ("cat", "dog", "emu")) == ("a dog", "a cat", "emu")
    beside = load_model(NAME, str(tmp_path / "pets" / "model.safetensors"))
    assert beside.labels == found.labels


def test_a_thousand_classes_of_ones_own_are_not_those_of_imagenet(tmp_path: Path) -> None:
    mine = [f"part {index}" for index in range(1000)]
    saved(tmp_path / "parts", made(), label_names=mine)
    assert class_labels(load_model(f"local-dir:{tmp_path / 'parts'}"), None) == tuple(mine)
    assert class_labels(load_model(NAME, "random"), None)[0].startswith("tench")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"1": "b", "0": "a"}, ("a", "b")),
        ({"0": "a", "2": "b"}, ()),
        ("ab", ()),
        (None, ()),
        (["a", 1], ("a", "1")),
    ],
)
def test_class_names_as_timm_writes_them(names: Any, found: tuple[str, ...]) -> None:
    assert class_names({"label_names": names}) == (found, found)


def test_folders_without_a_certain_order_name_no_classes() -> None:
    model: Any = SimpleNamespace(vit=SimpleNamespace(classes=3, name="m"), labels=None, short_labels=None)
    assert class_labels(model, ("class_1", "class_2", "class_3")) == ("class_1", "class_2", "class_3")
    assert class_labels(model, ("class_1", "class_10", "class_2")) == ("0", "1", "2")
    model.labels = ("x", "y", "z")
    assert class_labels(model, ("Zebra", "apple", "x")) == ("x", "y", "z"), "one of them is the checkpoint's"


# --- what a model may be ---


def test_a_path_is_a_model_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "mine", made(), num_classes=1000)
    with pytest.raises(ModelError, match=r"this is a timm checkpoint: pass --model local-dir:"):
        edgeprune.build(tmp_path / "mine", work=tmp_path / "work")
    for wrong in (None, 3):
        with pytest.raises(ModelError, match=r"a (NoneType|int) is not a model: pass a name, a path or"):
            edgeprune.build(wrong, work=tmp_path / "work")  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path / "mine")
    assert load_model("local-dir:.").vit.name == load_model("local-dir:../mine/").vit.name == "mine"

"""A folder in the format of Hugging Face `transformers`: config.json, safetensors, preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeprune.errors import InputError, ModelError, WeightsError
from edgeprune.io import read_bytes
from edgeprune.vit.checkpoints import in_order

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # numbers of Pillow
EXPECT = "save_pretrained of transformers writes it"
# What timm raises for sizes that do not fit together.
UNUSABLE = (
    KeyError,
    TypeError,
    ValueError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    IndexError,
    RuntimeError,
)


@dataclass(frozen=True)
class Checkpoint:
    """A timm module of a folder's shape, with what edgeprune needs beside it."""

    module: nn.Module
    state: dict[str, Tensor] | None  # timm's names; None if weights are to be random
    data: dict[str, Any]  # timm's data config
    labels: tuple[str, ...] | None
    classifies: bool  # False: the outputs are embeddings, of a projection where there is one


def is_folder(model: str, base: Path = Path()) -> bool:
    """Is this the path of a folder, relative to `base`, and not a name of timm's?"""
    path = base / model
    with suppress(OSError):  # a name that is too long
        return path.is_dir() and ((path / CONFIG).is_file() or not _of_timm(model))
    return False


def _of_timm(model: str) -> bool:
    import timm

    return bool(timm.is_model(model))


def read(folder: Path, random: bool = False, image_size: tuple[int, int] | None = None) -> Checkpoint:
    """The timm module that computes what the folder's model does, and its tensors under timm's names.

    Image size, mean, std and interpolation are those of preprocessor_config.json; an image processor that cannot be
    expressed as a resize, a centre crop and a normalisation is refused. With `image_size`, to which the module is
    resized later, it has the size of config.json. Raises ModelError, WeightsError, InputError.
    """
    from edgeprune.vit.hugging_face_models import ARCHITECTURES, build

    config = _json(folder / CONFIG)
    if "architecture" in config and "architectures" not in config:
        raise ModelError(f"{folder}: this is a timm checkpoint: pass --model local-dir:{folder}")
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else None
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{folder}: architecture {name or 'unnamed'} is not supported: use one of {', '.join(ARCHITECTURES)}"
        )
    data, side = _data(folder / PREPROCESSOR)
    state = None if random else _tensors(folder)
    try:
        module, state = build(name, config, side if image_size is None else None, state)
    except UNUSABLE as error:
        detail = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
        raise ModelError(f"{folder / CONFIG}: cannot be used ({detail}): {EXPECT}") from None
    classifies = "Classification" in name
    return Checkpoint(module, state, data, _labels(config) if classifies else None, classifies)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file: {EXPECT}")
    try:
        return msgspec.json.decode(read_bytes(path, 16 << 20), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a JSON object ({error}): {EXPECT}") from None


def _labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes; None if the config has only placeholders."""
    found = config.get("id2label")
    labels = in_order(found) if isinstance(found, dict) else None
    return None if all(label == f"LABEL_{index}" for index, label in enumerate(labels or ())) else labels


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or of the files of its index. Raises WeightsError, InputError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / f"{WEIGHTS}.index.json"
    files = [folder / WEIGHTS]
    if not files[0].is_file() and index.is_file():
        files_of = _json(index).get("weight_map")
        if not isinstance(files_of, dict):
            raise WeightsError(f"{index}: has no weight_map: {EXPECT}")
        names = set(map(str, files_of.values()))
        files = [folder / Path(name).name for name in sorted(names)]
    found: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file}: no such file: {EXPECT}, with safe_serialization where it is an option")
        try:
            found |= load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            detail = " ".join(str(error).split())[:160]
            raise WeightsError(f"{file}: not a safetensors file ({detail}): {EXPECT}") from None
    return found


def _data(path: Path) -> tuple[dict[str, Any], int]:
    """timm's data config of an image processor, and the side of its pictures in pixels. Raises InputError."""
    how = _json(path)
    try:
        return _config(how)
    except KeyError as error:
        reason = f"no {error}"
    except (TypeError, ValueError) as error:
        reason = str(error)
    raise InputError(f"{path}: cannot be used ({reason}): pass a processor with resize, centre crop, mean and std")


def _config(how: dict[str, Any]) -> tuple[dict[str, Any], int]:
    if not how.get("do_resize", True) or not how.get("do_rescale", True):
        raise ValueError("do_resize and do_rescale must be true")
    if abs(float(how.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor {how['rescale_factor']} is not 1/255")
    clip = "CLIP" in str(how.get("image_processor_type") or how.get("feature_extractor_type") or "")
    size = how["size"]
    if isinstance(size, int):  # of older versions
        size = {"shortest_edge": size} if clip else {"height": size, "width": size}
    squashed = "height" in size
    resized = _side(size) if squashed else int(size["shortest_edge"])
    cropped = how.get("do_center_crop", False)
    if not cropped and not squashed:
        raise ValueError("shortest_edge without do_center_crop leaves pictures of any shape")
    crop = how.get("crop_size", resized)
    side = (crop if isinstance(crop, int) else _side(crop)) if cropped else resized
    normal = how.get("do_normalize", True)
    return {
        "crop_pct": side / (resized + 1e-6),  # so that timm's floor gives `resized` again
        "crop_mode": "squash" if squashed else "center",
        "interpolation": RESAMPLE.get(how["resample"], str(how["resample"])),
        "mean": tuple(how["image_mean"]) if normal else (0.0, 0.0, 0.0),
        "std": tuple(how["image_std"]) if normal else (1.0, 1.0, 1.0),
    }, side


def _side(size: dict[str, Any]) -> int:
    if size["height"] != size["width"]:
        raise ValueError(f"pictures of {size['height']}x{size['width']}, only square ones are supported")
    return int(size["height"])

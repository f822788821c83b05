"""Load a timm model with its weights, its Vit record and its preprocessing."""

from __future__ import annotations

import copy
import difflib
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeprune import zoo
from edgeprune.errors import InputError, MissingError, ModelError, WeightsError, install
from edgeprune.features import with_layers
from edgeprune.images import differently_sorted
from edgeprune.preprocessing import OVERRIDES, checked
from edgeprune.records import Preprocessing, Vit, pixels_of, sides_of
from edgeprune.vit import hugging_face
from edgeprune.vit.checkpoints import (
    check_finite,
    class_names,
    config_beside,
    data_of,
    described_by,
    fill,
    read_state,
    shown_by,
)
from edgeprune.vit.families import Family, family_of
from edgeprune.vit.image_size import made_for, resize

if TYPE_CHECKING:
    from torch import Tensor, nn


# Of layers: what changes their output besides their state. Only these, because timm adds attributes in new versions.
SETTINGS = (
    "eps", "scale", "num_heads", "approximate", "global_pool", "pool_include_prefix", "no_embed_class", "rotate_half",
    "temperature", "ref_feat_shape", "grid_offset", "grid_indexing", "max_res", "in_pixels",
)  # fmt: skip
SCALARS = (bool, int, float, str, tuple)
WITHOUT_EFFECT = ("Identity", "Dropout", "DropPath", "PatchDropout")  # when a model is evaluated
SOURCES = ("hf-hub", "hf_hub", "local-dir", "local_dir")  # prefixes of names that timm resolves itself


@dataclass(frozen=True)
class Model:
    """A timm model in eval mode, never changed, with its family, record and preprocessing."""

    module: nn.Module
    family: Family
    vit: Vit
    preprocessing: Preprocessing
    task: str = "classify"  # of records.TASKS
    labels: tuple[str, ...] | None = None  # names of the classes, where the checkpoint has them
    short_labels: tuple[str, ...] | None = None  # where `labels` are descriptions of these

    def labels_like(self, folders: Sequence[str] | None) -> tuple[str, ...] | None:
        """Names of the classes, those that class folders have too if there are two kinds."""
        short = self.short_labels or ()
        return self.short_labels if set(short) & set(folders or ()) else self.labels


def load_model(
    model: str | os.PathLike[str] | nn.Module,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    task: str | None = None,
    image_size: tuple[int, int] | None = None,
    layers: Sequence[int] = (),
) -> Model:
    """A model by name with `weights`, or a timm module with the weights it has.

    Names are timm's, `hf-hub:ORG/NAME`, `local-dir:PATH`, the embedded model's, or the path of a folder in the format
    of transformers (vit/hugging_face.py). Weights are pretrained, embedded, random, or a file (.safetensors, or .pth
    as tensors only) whose tensors, and a config.json next to it, shape the model (vit/checkpoints.py); default:
    embedded for the embedded model, else pretrained. A module is copied, to fp32 on the CPU. `overrides` replaces
    keys of the data config (preprocessing.py). `task` is what the output is for, by default embed without a head,
    else classify. `image_size` (height, width) resizes the model (vit/image_size.py); positions in a file are of the
    model's own size or of that one. With `layers` (numbers of blocks, from 1) it is dense, and their patch features
    are outputs; dense alone means the last. Raises ModelError, WeightsError, MissingError, InputError.
    """
    _require_timm()
    from torch import nn

    if layers and task not in (None, "dense"):
        raise InputError(f"--layers is for dense features: pass --task dense instead of {task}, or leave it out")
    model = str(os.fspath(model)) if isinstance(model, os.PathLike) else model
    if not isinstance(model, str | nn.Module):
        raise ModelError(f"a {type(model).__name__} is not a model: pass a name, a path or a timm module")
    overrides = checked(overrides or {})
    source = _source_of(model, weights, image_size, bool(layers) or task in ("embed", "dense"))
    module, state, name = source.module, source.state, source.name
    task = "dense" if layers else task or source.task
    key, family = family_of(module)
    if image_size is not None and state is not None and not made_for(module, state):
        resize(module, image_size, name)
    if state is not None:
        fill(module, state, str(source.weights))
    if image_size is not None:
        resize(module, image_size, name)
    check_finite(module, name if state is None else str(source.weights))
    vit = family.describe(module, name, model_sha256(module))
    assert vit.family == key
    if task == "dense":
        vit = with_layers(vit, layers or (vit.depth,))
    how = _preprocessing(module, vit, source.config, overrides)
    names = (source.labels, source.labels) if source.labels else class_names(_config_of(module))
    labels, short = (each if each and len(each) == vit.classes else None for each in names)
    return Model(module.eval(), family, vit, how, task or task_of(module), labels, short)


class _Source(NamedTuple):
    """A timm module as it is made, and what is to be filled into it."""

    module: Any
    name: str
    weights: str | None = None  # where they are from, for messages
    state: dict[str, Tensor] | None = None  # to fill in; None: the module has its weights
    config: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    task: str | None = None


def _source_of(
    model: str | nn.Module, weights: str | None, image_size: tuple[int, int] | None, headless: bool
) -> _Source:
    """What `load_model` starts from; `headless`: no head is needed. Other arguments and errors are its own."""
    if not isinstance(model, str):
        if weights is not None:
            raise WeightsError("a module already has weights: pass its timm name to load other weights")
        name = str(_config_of(model).get("architecture") or type(model).__name__)
        return _Source(copy.deepcopy(model).cpu().float(), name)
    if hugging_face.is_folder(model):
        if weights not in (None, "pretrained", "random"):
            raise WeightsError(f"{model} has weights of its own: leave out --weights")
        found = hugging_face.read(Path(model), weights == "random", image_size)
        name, task = Path(model).resolve().name, "classify" if found.classifies else "embed"
        return _Source(found.module, name, model, found.state, found.data, found.labels, task)
    weights, name = weights or "pretrained", _short_name(model)
    if model == zoo.EMBEDDED and weights == "pretrained":
        weights = "embedded"
    if weights == "embedded" and model != zoo.EMBEDDED:
        raise WeightsError(f"only {zoo.EMBEDDED} has embedded weights: pass --weights FILE or pretrained")
    state: dict[str, Tensor] | None = None
    config: dict[str, Any] = {}
    if weights == "embedded":
        state = read_state(zoo.WEIGHTS)
    elif weights not in ("pretrained", "random"):
        state, config = read_state(Path(weights)), config_beside(Path(weights))
    return _Source(_create(model, weights, state, config, headless), name, weights, state, data_of(config))


def task_of(module: Any) -> str:
    """What the output of a timm model is for: embed without a head."""
    from torch import nn

    return "embed" if isinstance(module.head, nn.Identity) else "classify"


def weights_sha256(module: nn.Module) -> str:
    """Hash of a module's state: names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_sha256(module: nn.Module) -> str:
    """Hash of what a model of given shape computes with: its state, its layers without one, and their settings."""
    lines = [weights_sha256(module)]
    for name, part in module.named_modules():
        kind = type(part).__name__
        layer = kind if not any(part.children()) and kind not in WITHOUT_EFFECT else ""
        found = {key: value for key in SETTINGS if isinstance(value := getattr(part, key, None), SCALARS) and value}
        if layer or found:
            lines.append(f"{name} {layer} {found}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _config_of(module: Any) -> dict[str, Any]:
    """timm's pretrained_cfg of a module; empty for one that has none."""
    found = getattr(module, "pretrained_cfg", None) or {}
    return found if isinstance(found, dict) else dict(vars(found))


def _short_name(model: str) -> str:
    """The last part of a name from a hub or a folder; folders and files of a bundle are named after it."""
    source, colon, place = model.partition(":")
    if not colon or source not in SOURCES:
        return model
    return Path(os.path.abspath(place) if source.startswith("local") else place).name or place


def _require_timm() -> None:
    try:
        import timm  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingError(f"building a model needs torch and timm ({error}): {install('export')}") from None


def _create(
    name: str, weights: str, state: dict[str, Tensor] | None, config: Mapping[str, Any], headless: bool
) -> nn.Module:
    """A timm model by name, shaped by the tensors and the config.json that will fill it."""
    import timm

    if name == zoo.EMBEDDED:
        embedded: nn.Module = zoo.vit_digits()
        return embedded
    if "/" in name and name.partition(":")[0] not in SOURCES:
        raise ModelError(
            f"{name}: no such folder: for a model of the hub, `hf download {name} --local-dir DIR` first"
        )
    options = described_by(config, name)
    if state is not None and "head.weight" in state and state["head.weight"].ndim == 2:
        options["num_classes"] = state["head.weight"].shape[0]
    if name.partition(":")[0] not in SOURCES and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(["*vit*", "deit*", "eva*"]), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `timm.list_models('vit_*')`"
        raise ModelError(f"timm has no model {name!r}: {hint}")
    try:
        if weights == "pretrained":  # before they are downloaded
            _check_family(name)
        if state is not None:
            options |= shown_by(state, name, options, headless)
        module: nn.Module = timm.create_model(name, pretrained=weights == "pretrained", **options)
    except ModelError:
        raise
    except Exception as error:  # hub, disk and timm raise different errors; the advice is the same
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if weights == "pretrained":
            raise WeightsError(
                f"pretrained weights of {name} could not be fetched ({first[:160]}): "
                "pass a local checkpoint with --weights FILE.safetensors"
            ) from None
        advice = "choose another model" + (", or remove the config.json next to the weights" if config else "")
        raise ModelError(f"timm cannot create {name} ({first[:160]}): {advice}") from None
    return module


def _check_family(name: str) -> None:
    """Raise ModelError if no family supports a model; needs neither its weights nor much memory."""
    import timm
    import torch

    with (
        suppress(RuntimeError, NotImplementedError, ValueError, TypeError),
        torch.device("meta"),
    ):  # some models need real tensors
        family_of(timm.create_model(name))


def _preprocessing(
    module: Any, vit: Vit, config: dict[str, Any] | None, overrides: Mapping[str, Any]
) -> Preprocessing:
    from timm.data import resolve_data_config

    data = resolve_data_config(dict(overrides), pretrained_cfg=config or {}, model=None if config else module)
    checked({name: data[name] for name in OVERRIDES})
    return Preprocessing(
        image_px=vit.image_px,
        resize_px=pixels_of(*(math.floor(side / data["crop_pct"]) for side in sides_of(vit.image_px))),
        interpolation=data["interpolation"],
        crop_mode=data["crop_mode"],
        mean=_triple(data["mean"]),
        std=_triple(data["std"]),
    )


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def class_labels(model: Model, folders: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the classes: of the image folders, the checkpoint, the embedded model or ImageNet, else numbers.

    Folders do not count where some of their names are the checkpoint's, nor where their order is not certain.
    """
    vit = model.vit
    known = {*(model.labels or ()), *(model.short_labels or ())}
    if folders and len(folders) == vit.classes and not known & set(folders) and not differently_sorted(folders):
        return folders
    if model.labels is not None:
        return model.labels
    if vit.name == zoo.EMBEDDED and vit.classes == len(zoo.CLASS_NAMES):
        return zoo.CLASS_NAMES
    if vit.classes == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return tuple(info.index_to_description(i) for i in range(1000))
    return tuple(str(i) for i in range(vit.classes))

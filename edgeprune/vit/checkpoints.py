"""Checkpoints of timm models: tensors, read safely, and what they and a config.json say about the model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeprune.errors import InputError, WeightsError
from edgeprune.io import read_bytes
from edgeprune.vit.image_size import POSITIONS, square_side

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

LOADING = {  # options of timm.create_model that load something, which a config.json must not
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable",
    "exportable", "no_jit",
}  # fmt: skip
# Tensors that only a checkpoint has, tensors that only timm's default model has, and the options that they show.
SHOWN: tuple[tuple[set[str], set[str], dict[str, Any]], ...] = (
    ({"fc_norm"}, {"norm"}, {"global_pool": "avg", "fc_norm": True}),
    (set(), {"cls_token"}, {"class_token": False}),
    ({"reg_token"}, set(), {"reg_tokens": None}),  # as many as the tensor has
    (set(), {"head"}, {"num_classes": 0}),  # only where no head is needed
)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; nothing in the file is executed. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file: pass --weights FILE (.safetensors or .pth)")
    try:
        import torch
        from timm.models import load_state_dict

        with warnings.catch_warnings():  # about an unusual pickle protocol
            warnings.simplefilter("ignore")
            state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
        if not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise ValueError("not a state dict of tensors")
        return state
    except Exception as error:  # safetensors, pickle, zip and torch each raise their own
        first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{path}: not a checkpoint that can be read safely ({first}): save it as .safetensors"
        ) from None


def fill(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict strictly; timm's filter first converts other authors' key names. Raises WeightsError."""
    if set(state) != set(module.state_dict()):
        from timm.models import eva, vision_transformer

        convert = eva if isinstance(module, eva.Eva) else vision_transformer
        with suppress(Exception):  # unknown key names: the checks below say what is wrong
            state = convert.checkpoint_filter_fn(state, module)
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or extra:
        headless = not extra and all(key.startswith("head.") for key in missing)
        advice = "pass --task embed for a model without a head" if headless else "pass a checkpoint of this model"
        raise WeightsError(
            f"{source}: does not fit the model: {len(missing)} keys missing{_some(missing)}, "
            f"{len(extra)} unexpected{_some(extra)}: {advice}"
        )
    wrong = [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        key = wrong[0]
        side = square_side(module, state) if wrong == [POSITIONS] else None
        advice = f"pass --image-size {side}" if side else "pass a checkpoint of this model"
        raise WeightsError(
            f"{source}: {key} has shape {tuple(state[key].shape)}, the model needs {tuple(own[key].shape)}: {advice}"
        )
    module.load_state_dict(state, strict=True)


def _some(keys: list[str]) -> str:
    return f" ({', '.join(keys[:2])}{', …' if len(keys) > 2 else ''})" if keys else ""


def check_finite(module: nn.Module, source: str) -> None:
    """Raise WeightsError for weights that are infinite or no numbers, with which all outputs would be neither."""
    values = ((name, value) for name, value in module.state_dict().items() if value.is_floating_point())
    if bad := [name for name, value in values if not value.isfinite().all()]:
        raise WeightsError(
            f"{source}: not all values are finite in {_some(bad).strip(' ()')}: "
            "pass a checkpoint from before the training diverged"
        )


def config_beside(weights: Path) -> dict[str, Any]:
    """The config.json of a hub checkpoint next to its weights; empty where there is none. Raises InputError."""
    path = weights.parent / "config.json"
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(read_bytes(path, 16 << 20), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a model config ({error}): remove or repair it") from None


def data_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The data config in a config.json: timm's pretrained_cfg, which an older config.json is itself."""
    found = config.get("pretrained_cfg", config if {"architecture", "mean"} <= set(config) else None)
    return dict(found) if isinstance(found, dict) else None


def described_by(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Options of timm.create_model that a config.json names, where it is of the architecture `name`."""
    from timm.models import PretrainedCfg

    if not config or config.get("architecture") != name.partition(".")[0]:
        return {}
    data = data_of(config) or {}
    own = {key: value for key, value in data.items() if key in PretrainedCfg.__dataclass_fields__}
    own |= {key: config[key] for key in ("num_classes", "label_names", "label_descriptions") if key in config}
    size = data.get("input_size")
    args = config.get("model_args")
    options: dict[str, Any] = {"img_size": tuple(size[1:])} if isinstance(size, list) and len(size) == 3 else {}
    if config.get("global_pool"):
        options["global_pool"] = config["global_pool"]
    shape = {key: value for key, value in args.items() if key not in LOADING} if isinstance(args, dict) else {}
    return {"pretrained_cfg_overlay": own} | options | shape


def shown_by(state: Mapping[str, Tensor], name: str, options: dict[str, Any], headless: bool) -> dict[str, Any]:
    """Options of timm.create_model that a VisionTransformer's tensors show, and its defaults are not.

    They are logged. `headless`: the model needs no head. Nothing for tensors under other names than timm's.
    """
    import timm
    import torch
    from timm.models.vision_transformer import VisionTransformer

    if "blocks.0.attn.qkv.weight" not in state:
        return {}
    try:
        with torch.device("meta"):
            made = timm.create_model(name, **options)
    except Exception:  # what is wrong is said where the model itself is made
        return {}
    if not isinstance(made, VisionTransformer):
        return {}
    given, own = ({key.partition(".")[0] for key in each} for each in (state, made.state_dict()))
    found: dict[str, Any] = {}
    for more, fewer, option in SHOWN:
        if more <= given - own and fewer <= own - given and (headless or "num_classes" not in option):
            found |= option
    if "reg_tokens" in found:
        found["reg_tokens"] = state["reg_token"].shape[1]
    if "class_token" in found and made.global_pool == "token":
        found |= {"global_pool": "avg", "fc_norm": "fc_norm" in given}
    if found:
        log.info("%s: taken from the checkpoint: %s", name, ", ".join(f"{k}={v}" for k, v in found.items()))
    return found


def class_names(config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Descriptions and short names of the classes in a config of timm; empty where it has none."""
    found, described = config.get("label_names"), config.get("label_descriptions")
    if isinstance(found, dict):
        found = in_order(found)
    if not isinstance(found, Sequence) or isinstance(found, str):
        return (), ()
    names = tuple(map(str, found))
    known = described if isinstance(described, dict) else {}
    return tuple(str(known.get(name, name)) for name in names), names


def in_order(names: Mapping[Any, Any]) -> tuple[str, ...] | None:
    """Names of classes from a table by index; None where it is not a table of all indices from 0."""
    table = {str(index): str(name) for index, name in names.items()}
    if set(table) != set(map(str, range(len(names)))):
        return None
    return tuple(table[str(index)] for index in range(len(names)))

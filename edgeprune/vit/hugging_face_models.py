"""Architectures of Hugging Face `transformers` as timm modules: the options of a config, the names of its tensors.

Written from the definitions of both: transformers' models vit, deit, dinov2, dinov2_with_registers, dinov3_vit, clip
and siglip; timm's VisionTransformer and Eva. Each function takes a config, the side of the pictures in pixels (None:
that of the config) and the tensors, and gives the module and its state dict; they raise ValueError with what is not
supported, KeyError for what a config lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import SwiGLUPacked, get_act_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate

from edgeprune.vit.hugging_face_tensors import CLIP, DINOV2, DINOV3, VIT, State, Tensors

Config = Mapping[str, Any]
Built = tuple[Any, State | None]

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}


def _options(config: Config, side: int | None, resizable: bool = False) -> dict[str, Any]:
    """Options that all timm modules take. Raises ValueError where a value is not supported."""
    image, patch = config["image_size"], config["patch_size"]
    image, patch = (value[0] if isinstance(value, list) and len({*value}) == 1 else value for value in (image, patch))
    if not isinstance(image, int) or not isinstance(patch, int):
        raise ValueError("image_size and patch_size must be square")
    side = image if side is None else side
    if image != side and not resizable:
        raise ValueError(f"image_size is {image}, but {'preprocessor_config.json'} makes pictures of {side} px")
    if config.get("num_channels", 3) != 3:
        raise ValueError(f"num_channels is {config['num_channels']}, not 3")
    return {
        "img_size": side,
        "patch_size": patch,
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "act_layer": _activation(config),
        "norm_layer": partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
    }


def _activation(config: Config) -> Any:
    name = config["hidden_act"]
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name} is not one of {', '.join(ACTIVATIONS)}")
    return get_act_layer(ACTIVATIONS[name])


def _ratio(config: Config) -> float:
    """The mlp_ratio that timm rounds down to exactly intermediate_size."""
    return float((config["intermediate_size"] + 0.5) / config["hidden_size"])


def _classes(config: Config) -> int:
    return len(config["id2label"]) if "id2label" in config else int(config.get("num_labels", 2))


def vit(config: Config, side: int | None, found: State | None) -> Built:
    """ViTForImageClassification: logits of the class token."""
    return _classifier(config, side, found, VisionTransformer, "vit.", {"head": "classifier"})


def deit(config: Config, side: int | None, found: State | None) -> Built:
    """DeiTForImageClassification: logits of the class token; the distillation token is a register to timm."""
    make = partial(VisionTransformer, reg_tokens=1)
    return _classifier(config, side, found, make, "deit.", {"head": "classifier"}, reg_token="distillation_token")


def deit_with_teacher(config: Config, side: int | None, found: State | None) -> Built:
    """DeiTForImageClassificationWithTeacher: the mean of the logits of both tokens."""
    heads = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
    make = VisionTransformerDistilled
    return _classifier(config, side, found, make, "deit.", heads, dist_token="distillation_token")


def _classifier(
    config: Config,
    side: int | None,
    found: State | None,
    make: Callable[..., Any],
    prefix: str,
    heads: Mapping[str, str],
    **tokens: str,
) -> Built:
    options = _options(config, side) | {"mlp_ratio": _ratio(config), "qkv_bias": config.get("qkv_bias", True)}
    module = make(**options, num_classes=_classes(config), global_pool="token")
    if found is None:
        return module, None
    own = Tensors(found, prefix)
    state = {to: own(f"embeddings.{name}") for to, name in tokens.items()}
    state |= {"cls_token": own("embeddings.cls_token"), "pos_embed": own("embeddings.position_embeddings")}
    state |= own.layer("patch_embed.proj", "embeddings.patch_embeddings.projection") | own.layer("norm", "layernorm")
    for index in range(config["num_hidden_layers"]):
        state |= own.block(index, VIT, {})
    for to, name in heads.items():
        state |= own.layer(to, name)
    return module, own.done(state)


class ClassAndMean(VisionTransformer):  # type: ignore[misc]
    """A head on the class token and the mean of the patches beside it, as transformers has it for DINOv2."""

    def __init__(self, *args: Any, num_classes: int, **options: Any) -> None:
        super().__init__(*args, num_classes=num_classes, global_pool="avg", fc_norm=False, **options)
        self.head = nn.Linear(2 * self.embed_dim, num_classes)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """(B, N, C) to (B, 2 C)."""
        return torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(dim=1)], dim=1)


def dinov2(config: Config, side: int | None, found: State | None, classifier: bool = False) -> Built:
    """Dinov2Model and Dinov2WithRegistersModel: `pooler_output`; with `classifier` the logits of their classifiers.

    Position embeddings are resampled to other image sizes as transformers does it.
    """
    gated, registers = config.get("use_swiglu_ffn", False), config.get("num_register_tokens", 0)
    width = int(config["hidden_size"] * config["mlp_ratio"])
    options = _options(config, side, resizable=True) | {"init_values": 1.0, "qkv_bias": config.get("qkv_bias", True)}
    if gated:  # two thirds of the width, in whole eights; packed in one matrix
        options |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        width = (int(width * 2 / 3) + 7) // 8 * 8 * 2
    options |= {"mlp_ratio": (width + 0.5) / config["hidden_size"]}
    options |= {"reg_tokens": registers, "no_embed_class": bool(registers)}
    if classifier:
        module = ClassAndMean(**options, num_classes=_classes(config))
    else:
        module = VisionTransformer(**options, num_classes=0, global_pool="token")
    if found is None:
        return module, None
    own = Tensors(found, "dinov2.", "dinov2_with_registers.")
    first = own("embeddings.cls_token")
    places = _resampled(own("embeddings.position_embeddings"), module.patch_embed.grid_size[0], bool(registers))
    state = {"cls_token": first, "pos_embed": places}
    if registers:  # timm gives no position to registers and so none to the class token
        state = {"cls_token": first + places[:, :1], "pos_embed": places[:, 1:]}
        state["reg_token"] = own("embeddings.register_tokens")
    state |= own.layer("patch_embed.proj", "embeddings.patch_embeddings.projection") | own.layer("norm", "layernorm")
    first_name, second_name = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
    for index in range(config["num_hidden_layers"]):
        state |= own.block(index, DINOV2, {"mlp.fc1": f"mlp.{first_name}", "mlp.fc2": f"mlp.{second_name}"})
        for scale in (1, 2):
            name = DINOV2.block.format(index) + f"layer_scale{scale}.lambda1"
            state[f"blocks.{index}.ls{scale}.gamma"] = own(name)
    if classifier:
        state |= own.layer("head", "classifier")
    return module, own.done(state)


def _resampled(places: Tensor, side: int, antialias: bool) -> Tensor:
    """Position embeddings (1, 1 + n², C) for a grid of side² patches; the class token's comes first and stays."""
    old = int((places.shape[1] - 1) ** 0.5)
    if old == side:
        return places
    grid = places[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([places[:, :1].float(), grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


def dinov3(config: Config, side: int | None, found: State | None) -> Built:
    """DINOv3ViTModel: `pooler_output`."""
    biased, gated = config.get("query_bias", True), config.get("use_gated_mlp", False)
    for key, wanted in (("key_bias", False), ("value_bias", biased), ("proj_bias", True), ("mlp_bias", True)):
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{key} is {config[key]}, which timm's Eva does not have")
    if gated and config["hidden_act"] != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']}, but timm's gated MLP has silu")
    options = _options(config, side, resizable=True)
    if options.pop("act_layer") is not get_act_layer("silu" if gated else "gelu"):
        raise ValueError(f"hidden_act is {config['hidden_act']}, but timm's Eva has gelu")
    module = Eva(
        **options, mlp_ratio=_ratio(config), swiglu_mlp=gated, swiglu_align_to=1 if gated else 0, init_values=1.0,
        qkv_bias=biased, num_reg_tokens=config.get("num_register_tokens", 0), num_classes=0, global_pool="token",
        use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True,
        rope_temperature=config["rope_theta"],
    )  # fmt: skip
    if found is None:
        return module, None
    own = Tensors(found, "model.")
    state = {"cls_token": own("embeddings.cls_token")}
    if module.reg_token is not None:
        state["reg_token"] = own("embeddings.register_tokens")
    state |= own.layer("patch_embed.proj", "embeddings.patch_embeddings") | own.layer("norm", "norm")
    parts = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    if gated:
        parts = {"mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    for index in range(config["num_hidden_layers"]):
        state |= own.block(index, DINOV3, parts, separate=True)
        for scale in (1, 2):
            name = DINOV3.block.format(index) + f"layer_scale{scale}.lambda1"
            state[f"blocks.{index}.gamma_{scale}"] = own(name)
    return module, own.done(state)


def clip(config: Config, side: int | None, found: State | None, projected: bool = False) -> Built:
    """CLIPVisionModel: `pooler_output`; with `projected` CLIPVisionModelWithProjection: `image_embeds`."""
    width = config["projection_dim"] if projected else 0
    options = _options(config, side) | {"mlp_ratio": _ratio(config)}
    module = VisionTransformer(**options, pre_norm=True, num_classes=width, global_pool="token")
    if found is None:
        return module, None
    own = Tensors(found, "vision_model.")
    state = {
        "cls_token": own("embeddings.class_embedding")[None, None],
        "pos_embed": own("embeddings.position_embedding.weight")[None],
        "patch_embed.proj.weight": own("embeddings.patch_embedding.weight"),
    }
    state |= own.layer("norm_pre", "pre_layrnorm") | own.layer("norm", "post_layernorm")  # the name is theirs
    for index in range(config["num_hidden_layers"]):
        state |= own.block(index, CLIP, {})
    if projected:
        state |= {"head.weight": own("visual_projection.weight"), "head.bias": torch.zeros(width)}
    return module, own.done(state)


def siglip(config: Config, side: int | None, found: State | None) -> Built:
    """SiglipVisionModel: `pooler_output`, by attention of a learnt query to all patches."""
    if not config.get("vision_use_head", True):
        raise ValueError("vision_use_head is false, so that the model has no embedding of the picture")
    options = _options(config, side) | {"mlp_ratio": _ratio(config)}
    module = VisionTransformer(**options, class_token=False, num_classes=0, global_pool="map")
    if found is None:
        return module, None
    own = Tensors(found, "vision_model.")
    state = {"pos_embed": own("embeddings.position_embedding.weight")[None], "attn_pool.latent": own("head.probe")}
    state |= own.layer("patch_embed.proj", "embeddings.patch_embedding") | own.layer("norm", "post_layernorm")
    for index in range(config["num_hidden_layers"]):
        state |= own.block(index, CLIP, {})
    width = config["hidden_size"]
    for end in ("weight", "bias"):
        both = own(f"head.attention.in_proj_{end}")
        state |= {f"attn_pool.q.{end}": both[:width], f"attn_pool.kv.{end}": both[width:]}
    pooling = {"proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for to, name in pooling.items():
        state |= own.layer(f"attn_pool.{to}", f"head.{name}")
    return module, own.done(state)


def _tower(kind: str, config: Config, side: int | None, found: State | None) -> Built:
    """The image tower of a model of images and text; `kind` is its architecture alone."""
    shared = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
    return build(kind, {**config["vision_config"], **shared}, side, found)


def build(architecture: str, config: Config, side: int | None, found: State | None) -> Built:
    """A model of ARCHITECTURES for pictures of `side` px (None: its config's); the state is None without tensors.

    What a config does not have is transformers' own default. Raises ValueError, KeyError, TypeError.
    """
    make, defaults = ARCHITECTURES[architecture]
    return make({**defaults, **config}, side, found)


_BASE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
_DINOV2 = _BASE | {"mlp_ratio": 4, "patch_size": 14, "layer_norm_eps": 1e-6}
_REGISTERS = _DINOV2 | {"num_register_tokens": 4}
_DINOV3 = _BASE | {
    "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
}  # fmt: skip
_CLIP = _BASE | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
_SIGLIP = _BASE | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
ARCHITECTURES: dict[str, tuple[Callable[[Config, int | None, State | None], Built], Config]] = {
    "ViTForImageClassification": (vit, _BASE),
    "DeiTForImageClassification": (deit, _BASE),
    "DeiTForImageClassificationWithTeacher": (deit_with_teacher, _BASE),
    "Dinov2Model": (dinov2, _DINOV2),
    "Dinov2ForImageClassification": (partial(dinov2, classifier=True), _DINOV2),
    "Dinov2WithRegistersModel": (dinov2, _REGISTERS),
    "Dinov2WithRegistersForImageClassification": (partial(dinov2, classifier=True), _REGISTERS),
    "DINOv3ViTModel": (dinov3, _DINOV3),
    "CLIPVisionModel": (clip, _CLIP),
    "CLIPVisionModelWithProjection": (partial(clip, projected=True), _CLIP),
    "CLIPModel": (partial(_tower, "CLIPVisionModelWithProjection"), {}),
    "SiglipVisionModel": (siglip, _SIGLIP),
    "SiglipModel": (partial(_tower, "SiglipVisionModel"), {}),
}

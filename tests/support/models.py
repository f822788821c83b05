"""Tiny random models of every kind."""

from __future__ import annotations

from typing import Any


def shake(module: Any) -> Any:
    """Noise on every parameter, so that no zero or tiny initial value hides a term; eval mode."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


KINDS: dict[str, dict[str, Any]] = {  # by what sets them apart; 16 body tokens each
    "cls": {},
    "distilled": {},  # prefix 2
    "registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},  # prefix 5
    "gap": {"class_token": False, "global_pool": "avg"},  # prefix 0
    "gap-cls": {"global_pool": "avg"},
    "gap-prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "avgmax": {"class_token": False, "global_pool": "avgmax"},
    "map": {"class_token": False, "global_pool": "map"},
    "post-norm": {"block": "ResPostBlock", "init_values": 1e-5},
    "gated-mlp": {"mlp": "SwiGLU"},
    "packed-mlp": {"mlp": "SwiGLUPacked"},
    "norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "pre_norm": True},
    "gated-attention": {"gated": True},
    "any-size": {"dynamic_img_size": True},
}

ROTARY: dict[str, Any] = {"use_rot_pos_emb": True}
EVA_KINDS: dict[str, dict[str, Any]] = {  # of timm's Eva
    "eva": {"init_values": 0.1},  # no rotary positions
    "eva02": {**ROTARY, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "qkv_fused": False},
    "eva02-small": {**ROTARY, "swiglu_mlp": True, "ref_feat_shape": (2, 2)},
    "eva-post-norm": {"use_post_norm": True, "global_pool": "token", **ROTARY},
    "dinov3": {
        **ROTARY, "rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 4, "use_abs_pos_emb": False,
        "init_values": 0.1, "qkv_bias": False, "dynamic_img_size": True, "no_embed_class": True,
        "global_pool": "token",
    },
    "rope-xy": {**ROTARY, "attn_type": "rope", "rope_grid_indexing": "xy", "global_pool": "token"},
    "mixed": {**ROTARY, "rope_type": "mixed", "attn_type": "rope"},
    "mrope": {**ROTARY, "rope_type": "mrope"},
    "pe": {**ROTARY, "attn_type": "rope", "global_pool": "map", "use_pre_transformer_norm": True},
    "pe-gap": {**ROTARY, "attn_type": "rope", "class_token": False},  # prefix 0
    "grouped": {
        **ROTARY, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "qk_norm": True, "init_values": 0.1,
        "attn_only_layer_scale": True, "swiglu_mlp": True, "swiglu_align_to": 8,
    },
}  # fmt: skip

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
    "map": {"class_token": False, "global_pool": "map"},
    "post-norm": {"block": "ResPostBlock", "init_values": 1e-5},
    "gated-mlp": {"mlp": "SwiGLU"},
    "packed-mlp": {"mlp": "SwiGLUPacked"},
    "norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "pre_norm": True},
    "gated-attention": {"gated": True},
    "any-size": {"dynamic_img_size": True},
}

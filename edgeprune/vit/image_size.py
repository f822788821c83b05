"""The size of the pictures that a model takes, changed with timm's own resampling of position embeddings."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError, ModelError
from edgeprune.records import MOST_UNITS

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = "pos_embed"  # timm's name in a state dict


def resize(module: Any, size: tuple[int, int], name: str) -> None:
    """Make a timm model take pictures of `size` (height, width), pixels, in place.

    timm's set_input_size resamples absolute position embeddings to the new grid (resample_abs_pos_embed: bicubic,
    antialiased) and computes rotary positions for it. Raises InputError where patches do not divide the size,
    ModelError for a model that timm cannot resize.
    """
    import torch

    embed = module.patch_embed
    if tuple(embed.img_size) == size:
        return
    if not hasattr(module, "set_input_size"):
        raise ModelError(f"{name} cannot be resized: leave out --image-size")
    patch = embed.feat_ratio(as_scalar=False)
    if any(side % own for side, own in zip(size, patch, strict=True)):
        high, wide = (max(round(side / own), 1) * own for side, own in zip(size, patch, strict=True))
        raise InputError(
            f"--image-size {size[0]},{size[1]} does not divide into the patches of {name}, {patch[0]}x{patch[1]} px: "
            f"pass {high},{wide}"
        )
    tokens = size[0] // patch[0] * (size[1] // patch[1]) + module.num_prefix_tokens
    if tokens > MOST_UNITS:
        raise InputError(
            f"--image-size {size[0]},{size[1]} gives {name} {tokens} tokens, above {MOST_UNITS}: pass a smaller size"
        )
    with torch.no_grad():
        module.set_input_size(img_size=size)


def made_for(module: Any, state: dict[str, Tensor]) -> bool:
    """Does a state dict have as many positions as a model? True for models and files without absolute positions."""
    own, given = getattr(module, POSITIONS, None), state.get(POSITIONS)
    return own is None or given is None or own.shape == given.shape


def square_side(module: Any, state: dict[str, Tensor]) -> int | None:
    """Side in pixels of the square pictures that the positions of a state dict are for; None if for no square."""
    own, given = getattr(module, POSITIONS), state[POSITIONS]
    if own.ndim != 3 or given.ndim != 3 or own.shape[2] != given.shape[2]:
        return None
    patches = given.shape[1] - (own.shape[1] - module.patch_embed.num_patches)
    root, (high, wide) = isqrt(max(patches, 0)), module.patch_embed.feat_ratio(as_scalar=False)
    return root * high if root and root * root == patches and high == wide else None

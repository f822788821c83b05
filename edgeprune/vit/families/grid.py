"""The grid of patches of a timm model, from its patch embedding."""

from __future__ import annotations

from typing import Any

from edgeprune.records import Pixels, pixels_of


def uneven(model: Any) -> str | None:
    """Why the patches of a model are not supported, or None: they have to be square."""
    (height, width), (rows, columns) = model.patch_embed.img_size, model.patch_embed.grid_size
    if not rows or not columns:
        return f"pictures of {height}x{width} px are smaller than one patch: choose another size or model"
    side = patch_px(model)
    if (height // side, width // side) != (rows, columns):
        return (
            f"the model divides {height}x{width} px into {rows}x{columns} patches, only square ones are supported: "
            "choose another size or model"
        )
    return None


def image_px(model: Any) -> Pixels:
    """Size of the pictures that a model takes."""
    return pixels_of(*model.patch_embed.img_size)


def patch_px(model: Any) -> int:
    """Side of a patch."""
    side: int = model.patch_embed.img_size[0] // model.patch_embed.grid_size[0]
    return side

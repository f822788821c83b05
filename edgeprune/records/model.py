"""A model, its pictures and its outputs."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from edgeprune.records.base import MOST_BLOCKS, MOST_CLASSES, MOST_PX, MOST_UNITS, Record

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")
CROP_MODES = ("center", "squash")
Pixels = int | tuple[int, int]  # the side of a square, or (height, width) of what is no square


def sides_of(px: Pixels) -> tuple[int, int]:
    """(height, width)."""
    return (px, px) if isinstance(px, int) else px


def pixels_of(height: int, width: int) -> Pixels:
    """One number for a square."""
    return height if height == width else (height, width)


def text_of(px: Pixels) -> str:
    """224, or 96x160 for a height of 96."""
    return str(px) if isinstance(px, int) else "x".join(map(str, px))


def check_pixels(px: Pixels, most: int) -> None:
    """Raise ValueError for sides outside 1 to `most`, and for a square that is given as two numbers."""
    sides = sides_of(px)
    if not 0 < min(sides) <= max(sides) <= most or pixels_of(*sides) != px:
        raise ValueError(f"a size is 1 to {most} px: one number, or two different ones, not {px}")


class Preprocessing(Record, frozen=True, kw_only=True):
    """How a picture becomes the input of the network, as in timm's eval transform.

    It is resized to `resize_px` and its middle cropped to `image_px`. "squash" resizes to exactly `resize_px`;
    "center" keeps the ratio of the sides, and the picture just covers `resize_px`: of a square, its shorter side is
    that of the square.
    """

    image_px: Pixels  # the network's input
    resize_px: Pixels
    interpolation: str  # bicubic | bilinear | nearest | lanczos
    crop_mode: str  # center | squash
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS or self.crop_mode not in CROP_MODES:
            raise ValueError(f"interpolation is one of {INTERPOLATIONS}, crop_mode one of {CROP_MODES}")
        check_pixels(self.image_px, MOST_PX)
        check_pixels(self.resize_px, 4 * MOST_PX)
        if not all(np.isfinite((*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError("mean is finite, std above 0")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input, pixels."""
        return sides_of(self.image_px)


class Output(NamedTuple):
    """An output of a model with dense features: its name in the ONNX, and its shape without the batch."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Values for one picture."""
        return prod(self.shape)


class Vit(Record, frozen=True, kw_only=True):
    """The shape and identity of one Vision Transformer."""

    name: str
    weights_sha256: str  # and of settings such as the pooling
    family: str
    image_px: Pixels
    patch_px: int
    depth: int
    width: int
    heads: int
    head_dim: int
    mlp_width: int
    mlp_matrices: int = 2  # 3 for gated (SwiGLU) MLPs, whose first layer is twice as wide
    prefix: int  # CLS, distillation and register tokens
    tokens: int  # tokens entering block 0, prefix included
    classes: int
    prefix_pooled: bool  # the outputs need only the prefix tokens
    layers: tuple[int, ...] = ()  # blocks, from 1, whose patch features are outputs; empty where none are

    def __post_init__(self) -> None:
        sizes = (self.depth, self.width, self.heads, self.head_dim, self.mlp_width, self.mlp_matrices, self.patch_px)
        if min(sizes) < 1 or max(sizes) > MOST_UNITS or self.depth > MOST_BLOCKS:
            raise ValueError(f"sizes are 1 to {MOST_UNITS}, blocks 1 to {MOST_BLOCKS}")
        check_pixels(self.image_px, MOST_PX)
        if not (0 < self.tokens <= MOST_UNITS and 0 < self.classes <= MOST_CLASSES):
            raise ValueError(f"tokens are 1 to {MOST_UNITS}, classes 1 to {MOST_CLASSES}")
        if not 0 <= self.prefix < self.tokens:
            raise ValueError(f"prefix {self.prefix} must be below tokens {self.tokens}")
        if self.layers:
            if (
                list(self.layers) != sorted(set(self.layers))
                or not 1 <= self.layers[0] <= self.layers[-1] <= self.depth
            ):
                raise ValueError(f"layers are ascending numbers of blocks, 1 to {self.depth}")
            if self.prefix_pooled or prod(self.grid) != self.tokens - self.prefix:
                raise ValueError("features of layers need every patch of the grid")

    @property
    def outputs(self) -> tuple[Output, ...]:
        """With `layers`, all outputs in the order in which arrays of several outputs are packed; else empty."""
        features = tuple(Output(f"features_{layer}", (*self.grid, self.width)) for layer in self.layers)
        return (*features, Output("embedding", (self.classes,))) if features else ()

    @property
    def values(self) -> int:
        """Values that the model gives for one picture."""
        return sum(output.size for output in self.outputs) or self.classes

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input, pixels."""
        return sides_of(self.image_px)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches; the body tokens before the first cut, row by row."""
        height, width = self.size
        return height // self.patch_px, width // self.patch_px

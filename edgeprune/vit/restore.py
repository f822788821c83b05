"""Tokens that are left, brought back to the full grid of patches: what dense features need after cuts.

At a cut, every body token is described by the tokens that are left: a mean weighted by similarity. The weights of
several cuts are multiplied, so that features of a layer are one matrix product, and nothing is scattered. Compared
with the nearest token alone, with distances on the grid and with adding later updates to each patch's own stream in
docs/benchmarks.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from edgeprune.records import Vit

if TYPE_CHECKING:
    from edgeprune.vit.families import Family
    from edgeprune.vit.tokens import Stream

SHARPNESS = 20.0  # of the softmax over cosines: few tokens share a patch


def shares(before: Tensor, after: Tensor) -> Tensor:
    """(B, M, K): the share of each token that a cut left (B, K, C) in each that it got (B, M, C); body tokens.

    The factor is after the product, where attention has none: nothing takes it for an attention to fuse.
    """
    cosines = _directions(before) @ _directions(after).transpose(1, 2)
    return (cosines * SHARPNESS).softmax(dim=-1)


def _directions(x: Tensor) -> Tensor:
    unit: Tensor = x / x.norm(dim=-1, keepdim=True)
    return unit


def composed(earlier: Tensor | None, cut: Tensor) -> Tensor:
    """The shares (B, patches, K) after one more cut (B, M, K); `earlier` (B, patches, M) is None before the first."""
    return cut if earlier is None else earlier @ cut


def features(family: Family, model: Any, vit: Vit, stream: Stream) -> Tensor:
    """Patch features (B, rows, columns, C) of a stream after a block, on the full grid.

    Through the final norm of the model, as timm's `forward_intermediates(norm=True)` and
    `get_intermediate_layers(norm=True)` give them.
    """
    body = stream.x[:, vit.prefix :]
    if stream.shares is not None:
        body = stream.shares @ body
    return family.norm(model, body).reshape(len(body), *vit.grid, body.shape[2])

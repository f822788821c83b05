"""Tokens that are left, brought back to the full grid of patches: what dense features need after cuts.

At a cut each body token is assigned to the most similar of those that are left, which stands for it from then on. A
patch keeps its own residual stream as it was at the cut, and the later updates of the token that stands for it are
added: the model computes the updates for few tokens, but what sets patches apart is not lost. Assignments are
composed over cuts, so that a layer is restored by one Gather and one addition; nothing is scattered. Other ways were
worse or no better (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from edgeprune.records import Vit
from edgeprune.vit.reducers.common import take
from edgeprune.vit.tokens import Grid, Stream

if TYPE_CHECKING:
    from edgeprune.vit.families import Family


def patches(body: Tensor, grid: Grid | None) -> Tensor:
    """(B, patches, C) from body tokens (B, M, C); the same tokens where nothing was cut yet."""
    return body if grid is None else take(body, grid.held) + grid.apart


def after_cut(before: Tensor, after: Tensor, grid: Grid | None) -> Grid:
    """The grid after one more cut, which turned body tokens (B, M, C) into (B, K, C)."""
    whole, near = patches(before, grid), nearest(before, after)
    held = near if grid is None else take(near[..., None], grid.held)[..., 0]
    return Grid(held, whole - take(after, held))


def nearest(before: Tensor, after: Tensor) -> Tensor:
    """(B, M): for each of (B, M, C) the index of the most similar of (B, K, C), by cosine."""
    # Only similarities of the same token are compared, so its own length does not matter.
    found: Tensor = (before @ (after / after.norm(dim=-1, keepdim=True)).transpose(1, 2)).argmax(dim=-1)
    return found


def features(family: Family, model: Any, vit: Vit, stream: Stream) -> Tensor:
    """Patch features (B, rows, columns, C) of a stream after a block, on the full grid.

    Through the final norm of the model, as timm's `forward_intermediates(norm=True)` and
    `get_intermediate_layers(norm=True)` give them.
    """
    body = family.norm(model, patches(stream.x[:, vit.prefix :], stream.grid))
    return body.reshape(len(body), *vit.grid, body.shape[2])

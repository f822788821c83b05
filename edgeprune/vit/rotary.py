"""Rotary positions (RoPE, arXiv 2104.09864): each token keeps the rotation of its place when others are removed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edgeprune.vit.reducers.common import take

# A table has the shape (L, H, P + 1, 2 D): for each of P patches D sines and D cosines, and last a row of sines 0 and
# cosines 1, which does not rotate. L is 1 or the number of blocks, H is 1 or the number of heads.


def table_of(rows: Tensor) -> Tensor:
    """The table of rotary rows (P, 2 D) for all blocks, or (L, H, P, 2 D), as timm's rotary modules give them."""
    if rows.ndim == 2:
        rows = rows[None, None]
    sines = torch.zeros_like(rows[:, :, :1, : rows.shape[3] // 2])
    return torch.cat([rows, torch.cat([sines, sines + 1], dim=3)], dim=2)


def rows_of(table: Tensor | None, block: int, places: Tensor | None) -> Tensor | None:
    """The rows (1 or B, H, M, 2 D) of the M body tokens that enter a block: one Gather once tokens have moved."""
    if table is None:
        return None
    own = table[block if len(table) > 1 else 0]
    if places is None:
        return own[None, :, :-1]
    batch, count = places.shape
    rows = own.index_select(1, places.reshape(-1))
    if batch == 1:
        return rows[None]
    return rows.reshape(len(own), batch, count, -1).transpose(0, 1)


def moved(places: Tensor | None, kept: Tensor, patches: int) -> Tensor:
    """The places (B, K) after a cut that keeps the body tokens `kept` (B, K) of those at `places` (B, M)."""
    if places is None:
        return kept
    nowhere = torch.full((len(places), 1), patches, device=places.device)
    return take(torch.cat([places, nowhere], dim=1)[..., None], kept)[..., 0]


class Rotation(NamedTuple):
    """What blocks that are measured without their model need to know of its rotary positions."""

    heads: int  # 1 if all heads rotate alike
    channels: int  # of a head
    prefix: int

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, n - prefix, 2 D): rows that do not rotate, computed from x (B, n, C).

        The token axis can so be symbolic, and they are tensors of the run as the rows of a pruned model are, which
        no runtime can fold into constants.
        """
        batch, count, _ = x.shape
        width = self.heads * self.channels
        still = x[..., :width].reshape(batch, count, self.heads, self.channels).transpose(1, 2)
        sines = still[:, :, self.prefix :] * 0
        return torch.cat([sines, sines + 1], dim=3)

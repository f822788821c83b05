"""What a reducer is given, at random."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.vit.tokens import Attended

BODY, HEADS, HEAD_DIM, WIDTH = 14, 3, 4, 6
PREFIXES = (0, 1, 2, 5)


def attended(batch: int, prefix: int, sharp: float = 2.0, seed: int = 0) -> Attended:
    """Random tensors; images differ in how sharp their attention and how large their values are."""
    generator = torch.Generator().manual_seed(seed)
    count = prefix + BODY
    scale = torch.linspace(0.5, 1.5, batch)[:, None, None, None]
    logits = torch.randn(batch, HEADS, count, count, generator=generator) * sharp * scale
    keys, values = torch.randn(2, batch, HEADS, count, HEAD_DIM, generator=generator).unbind(0)
    out = torch.randn(batch, count, WIDTH, generator=generator)
    return Attended(out, logits.softmax(dim=-1), keys, values * scale)


def sizes_of(batch: int, prefix: int) -> Tensor:
    """Random whole sizes; 1 for the prefix."""
    sizes = torch.randint(1, 6, (batch, prefix + BODY), generator=torch.Generator().manual_seed(1)).float()
    sizes[:, :prefix] = 1
    return sizes

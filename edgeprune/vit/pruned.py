"""PrunedViT: a loop over the blocks, each of which leaves the number of tokens in its schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import InputError
from edgeprune.records import Schedule, Vit, check_tokens
from edgeprune.vit.families import Family, family_of
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.tokens import Reducer


class PrunedViT(nn.Module):
    """A timm model with a token schedule; the timm model itself is never changed.

    Requires a schedule valid for `vit`; ensures that block i passes on exactly tokens[i] tokens. With `prefix_last`
    the last block computes only the prefix tokens, which is lossless for a head that reads only those; it cannot
    remove tokens then. Raises ValueError for an invalid schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        vit: Vit,
        tokens: Sequence[int],
        reducer: Reducer | None,
        prefix_last: bool = False,
    ) -> None:
        super().__init__()
        check_tokens(tokens, vit, prefix_last)
        if reducer is None and any(n != vit.tokens for n in tokens):
            raise ValueError("a schedule that removes tokens needs a reducer")
        self.model = model
        self.family = family
        self.vit = vit
        self.tokens = tuple(tokens)
        self.reducer = reducer
        self.prefix_last = prefix_last

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, P, P) images to (B, classes) logits."""
        x = self.family.embed(self.model, images)
        last = self.vit.depth - 1 if self.prefix_last else self.vit.depth
        x, sizes = self.blocks(x, None, 0, last)
        if self.prefix_last:
            blocks: Any = self.model.blocks
            x = self.family.prefix_only(blocks[last], x, sizes, self.vit.prefix)
        return self.family.classify(self.model, x)

    def blocks(self, x: Tensor, sizes: Tensor | None, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Blocks start..stop-1 on the stream x (B, N, C) and the token sizes (B, N), if there are any."""
        blocks: Any = self.model.blocks
        for block, keep in zip(blocks[start:stop], self.tokens[start:stop], strict=True):
            x, sizes = step(self.family, block, x, sizes, keep, self.vit.prefix, self.reducer)
        return x, sizes


def step(
    family: Family,
    block: Any,
    x: Tensor,
    sizes: Tensor | None,
    keep: int,
    prefix: int,
    reducer: Reducer | None,
) -> tuple[Tensor, Tensor | None]:
    """One block that leaves `keep` tokens: timm's own block if that is all, else with a cut before its MLP."""
    if keep == x.shape[1]:
        return family.block(block, x, sizes), sizes
    assert reducer is not None
    attended = family.attend(block, x, sizes)
    x, sizes = reducer(attended.out, sizes, attended, keep, prefix)
    assert x.shape[1] == keep, f"the reducer left {x.shape[1]} tokens instead of {keep}"
    return family.mlp(block, x), sizes


class Trunk(nn.Module):
    """Blocks without a cut: (B, n, C) to (B, n, C), for any n. The staircase is measured on it."""

    def __init__(self, blocks: Sequence[nn.Module], family: Family) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.family = family

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) to (B, n, C)."""
        for block in self.blocks:
            x = self.family.block(block, x, None)
        return x


class Fixed(nn.Module):
    """Embedding and head without a block: the part of the latency that no schedule changes."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        self.family = family

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, P, P) to (B, classes)."""
        return self.family.classify(self.model, self.family.embed(self.model, images))


class CutBlock(nn.Module):
    """One block with a cut: (B, n, C) to (B, keep, C). The cost of a cut is measured on it."""

    def __init__(self, block: nn.Module, family: Family, vit: Vit, keep: int, reducer: Reducer) -> None:
        super().__init__()
        self.block, self.family, self.vit, self.keep, self.reducer = block, family, vit, keep, reducer

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) to (B, keep, C)."""
        return step(self.family, self.block, x, None, self.keep, self.vit.prefix, self.reducer)[0]


class LastBlock(nn.Module):
    """The last block for the prefix only: (B, n, C) to (B, prefix, C). Measured for `prefix_last`."""

    def __init__(self, block: nn.Module, family: Family, prefix: int) -> None:
        super().__init__()
        self.block, self.family, self.prefix = block, family, prefix

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) to (B, prefix, C)."""
        return self.family.prefix_only(self.block, x, None, self.prefix)


@torch.no_grad()
def random_kept(x: Tensor, keep: int, prefix: int, generator: torch.Generator) -> Tensor:
    """(B, N, C) to (B, keep, C): the prefix and random other tokens, chosen separately for each image.

    The paper estimates A(n) in this way (arXiv 2407.05941, sec. 3).
    """
    noise = torch.rand(x.shape[0], x.shape[1] - prefix, generator=generator)
    index = noise.topk(keep - prefix, dim=1).indices + prefix
    body = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :prefix], body], dim=1)


def pruned_from_module(model: nn.Module, schedule: Schedule) -> PrunedViT:
    """A timm model with a schedule; parameters are shared.

    Raises ModelError for a model that is not supported, InputError for a schedule of another shape of model.
    """
    key, family = family_of(model)
    vit = family.describe(model, schedule.vit.name, schedule.vit.weights_sha256)
    if (key, vit) != (schedule.vit.family, schedule.vit):
        here = type(model).__name__
        raise InputError(
            f"the schedule was made for {schedule.vit.name}, not for this {here}: make one for this model"
        )
    reducer = reducer_named(schedule.method)
    return PrunedViT(model, family, vit, schedule.tokens, reducer, schedule.prefix_last).train(model.training)

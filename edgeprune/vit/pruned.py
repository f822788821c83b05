"""PrunedViT: a loop over the blocks, each of which leaves the number of tokens in its schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import InputError
from edgeprune.features import with_layers
from edgeprune.records import Schedule, Vit, check_tokens, text_of
from edgeprune.vit.families import Family, family_of
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.reducers.common import take
from edgeprune.vit.restore import after_cut, features, patches
from edgeprune.vit.rotary import Rotation, moved, rows_of
from edgeprune.vit.tokens import Grid, Reducer, Stream


class PrunedViT(nn.Module):
    """A timm model with a token schedule; the timm model itself is never changed.

    Requires a schedule valid for `vit`; ensures that block i passes on exactly tokens[i] tokens. With `prefix_last`
    the last block computes only the prefix tokens, which is lossless for a head that reads only those; it cannot
    remove tokens then. Raises ValueError for an invalid schedule.
    """

    rotary: Tensor | None

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
        self.register_buffer("rotary", None, persistent=False)  # the table as a constant, set during an export

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(B, 3, H, W) images to (B, classes) logits, or to the several outputs of Vit.outputs."""
        table = self.family.rotary(self.model) if self.rotary is None else self.rotary
        last = self.vit.depth - 1 if self.prefix_last else self.vit.depth
        stream, found, start = Stream(self.family.embed(self.model, images)), [], 0
        for layer in self.vit.layers:
            stream, start = self.blocks(stream, start, layer, table), layer
            found.append(features(self.family, self.model, self.vit, stream))
        stream = self.blocks(stream, start, last, table)
        if self.prefix_last:
            blocks: Any = self.model.blocks
            rows = rows_of(table, last, stream.places)
            stream = Stream(self.family.prefix_only(blocks[last], stream.x, stream.sizes, self.vit.prefix, rows))
        embedding = self.family.classify(self.model, stream.x, stream.sizes)
        return (*found, embedding) if found else embedding

    def blocks(self, stream: Stream, start: int, stop: int, table: Tensor | None) -> Stream:
        """Blocks start..stop-1; `table` is that of the family's rotary()."""
        blocks: Any = self.model.blocks
        for index in range(start, stop):
            rows = rows_of(table, index, stream.places)
            stream = step(self.family, blocks[index], stream, self.tokens[index], self.vit, self.reducer, rows)
        return stream


def step(
    family: Family,
    block: Any,
    stream: Stream,
    keep: int,
    vit: Vit,
    reducer: Reducer | None,
    rows: Tensor | None = None,
) -> Stream:
    """One block that leaves `keep` tokens: timm's own block if that is all, else with a cut before its MLP."""
    x, sizes, places, grid = stream
    if keep == x.shape[1]:
        return Stream(family.block(block, x, sizes, rows), sizes, places, grid)
    assert reducer is not None
    attended = family.attend(block, x, sizes, rows)
    x, sizes, kept = reducer(attended.out, sizes, attended, keep, vit.prefix)
    assert x.shape[1] == keep, f"the reducer left {x.shape[1]} tokens instead of {keep}"
    if vit.layers:
        grid = after_cut(attended.out[:, vit.prefix :], x[:, vit.prefix :], grid)
    places = None if rows is None else moved(places, kept(), vit.tokens - vit.prefix)
    return Stream(family.mlp(block, x), sizes, places, grid)


class Trunk(nn.Module):
    """Blocks without a cut: (B, n, C) to (B, n, C), for any n. The staircase is measured on it."""

    def __init__(self, blocks: Sequence[nn.Module], family: Family, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.family, self.rotation = family, rotation

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) to (B, n, C)."""
        rows = self.rotation.rows(x) if self.rotation else None
        for block in self.blocks:
            x = self.family.block(block, x, None, rows)
        return x


class Fixed(nn.Module):
    """Embedding and head without a block: the part of the latency that no schedule changes."""

    def __init__(self, model: nn.Module, family: Family, vit: Vit) -> None:
        super().__init__()
        self.model = model
        self.family, self.vit = family, vit

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(B, 3, H, W) to (B, classes), or to the several outputs of Vit.outputs."""
        stream = Stream(self.family.embed(self.model, images))
        # A number is added for each layer: the features of equal tokens would be computed once for all.
        found = [
            features(self.family, self.model, self.vit, Stream(stream.x + float(layer))) for layer in self.vit.layers
        ]
        embedding = self.family.classify(self.model, stream.x)
        return (*found, embedding) if found else embedding


class CutBlock(nn.Module):
    """One block with a cut: (B, n, C) to (B, keep, C). The cost of a cut is measured on it.

    With dense features it also updates the grid of an earlier cut and restores one layer, without the norm that the
    unpruned model has, too.
    """

    def __init__(
        self,
        block: nn.Module,
        family: Family,
        vit: Vit,
        keep: int,
        reducer: Reducer,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__()
        self.block, self.family, self.vit, self.keep, self.reducer = block, family, vit, keep, reducer
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, n, C) to (B, keep, C), with dense features also (B, patches, C)."""
        rows = self.rotation.rows(x) if self.rotation else None
        stream = step(
            self.family, self.block, Stream(x, grid=self.earlier(x)), self.keep, self.vit, self.reducer, rows
        )
        if stream.grid is None:
            return stream.x
        return stream.x, patches(stream.x[:, self.vit.prefix :], stream.grid)

    def earlier(self, x: Tensor) -> Grid | None:
        """Any grid for tokens (B, n, C) of which some are gone, computed from them as that of a run is."""
        body, count = x[:, self.vit.prefix :], self.vit.tokens - self.vit.prefix
        if not self.vit.layers or body.shape[1] == count:
            return None
        places = torch.tensor([float(patch % body.shape[1]) for patch in range(count)], device=x.device)
        held = (places + body[:, :1, 0] * 0).long()
        return Grid(held, take(body, held))


class LastBlock(nn.Module):
    """The last block for the prefix only: (B, n, C) to (B, prefix, C). Measured for `prefix_last`."""

    def __init__(self, block: nn.Module, family: Family, prefix: int, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.block, self.family, self.prefix, self.rotation = block, family, prefix, rotation

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) to (B, prefix, C)."""
        rows = self.rotation.rows(x) if self.rotation else None
        return self.family.prefix_only(self.block, x, None, self.prefix, rows)


@torch.no_grad()
def random_kept(x: Tensor, keep: int, prefix: int, generator: torch.Generator) -> Stream:
    """Of (B, N, C) the prefix and random other tokens, `keep` in all, chosen separately for each image.

    The paper estimates A(n) in this way (arXiv 2407.05941, sec. 3).
    """
    noise = torch.rand(x.shape[0], x.shape[1] - prefix, generator=generator)
    places = noise.topk(keep - prefix, dim=1).indices
    body = x.gather(1, prefix + places[..., None].expand(-1, -1, x.shape[2]))
    return Stream(torch.cat([x[:, :prefix], body], dim=1), None, places)


def flattened(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """The output of a module, or its several outputs side by side, (B, values)."""
    several = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.cat([each.flatten(1) for each in several], dim=1)


def pruned_from_module(model: nn.Module, schedule: Schedule) -> PrunedViT:
    """A timm model with a schedule; parameters are shared.

    Raises ModelError for a model that is not supported, InputError for a schedule of another shape of model.
    """
    key, family = family_of(model)
    vit = with_layers(family.describe(model, schedule.vit.name, schedule.vit.weights_sha256), schedule.vit.layers)
    if (key, vit) != (schedule.vit.family, schedule.vit):
        if vit.size != schedule.vit.size:
            raise InputError(
                f"the schedule is for pictures of {text_of(schedule.vit.image_px)} px, the model takes "
                f"{text_of(vit.image_px)}: call model.set_input_size(img_size={schedule.vit.size}) first"
            )
        here = type(model).__name__
        raise InputError(
            f"the schedule was made for {schedule.vit.name}, not for this {here}: make one for this model"
        )
    reducer = reducer_named(schedule.method)
    return PrunedViT(model, family, vit, schedule.tokens, reducer, schedule.prefix_last).train(model.training)

"""What recovery minimises: how far the outputs and prefix tokens of a pruned model are from the unpruned ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from edgeprune.vit.pruned import PrunedViT, flattened
from edgeprune.vit.restore import features
from edgeprune.vit.rotary import rows_of
from edgeprune.vit.tokens import Stream


def stream_before(pruned: PrunedViT, block: int, images: Tensor) -> Stream:
    """The tokens that enter a block, for images (B, 3, H, W)."""
    family, model = pruned.family, pruned.model
    return pruned.blocks(Stream(family.embed(model, images)), 0, block, family.rotary(model))


def traced(pruned: PrunedViT, stream: Stream, start: int = 0) -> tuple[Tensor, list[Tensor]]:
    """What `pruned` makes of the tokens that enter block `start`: outputs, and the prefix tokens after every block.

    Outputs are (B, values), several of them flattened, without features of the blocks before. The prefix tokens are
    (B, prefix, C); the list is empty where there is no prefix.
    """
    blocks: Any = pruned.model.blocks
    vit, family, passed, found = pruned.vit, pruned.family, [], []
    table, last = family.rotary(pruned.model), vit.depth - pruned.prefix_last
    for block in range(start, last):
        stream = pruned.blocks(stream, block, block + 1, table)
        passed.append(stream.x[:, : vit.prefix])
        if block + 1 in vit.layers:
            found.append(features(family, pruned.model, vit, stream))
    x = stream.x
    if pruned.prefix_last:
        x = family.prefix_only(blocks[last], x, stream.sizes, vit.prefix, rows_of(table, last, stream.places))
        passed.append(x)
    outputs = flattened([*found, family.classify(pruned.model, x, stream.sizes)])
    return outputs, passed if vit.prefix else []


def relative_error(wanted: Sequence[Tensor], found: Sequence[Tensor], depth: int) -> Tensor:
    """Mean over blocks of the squared error of tokens (B, prefix, C), as a share of their variance over the batch.

    Of `depth` blocks, those that are not given have no error.
    """
    shares = []
    for w, f in zip(wanted, found, strict=True):
        w, f = w.float(), f.float()
        shares.append((f - w).square().sum() / (w - w.mean(dim=0)).square().sum().clamp(min=1e-6))
    return torch.stack(shares).sum() / depth


def divergence(wanted: Tensor, answers: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL divergence, nats, of the softmaxes of logits (B, classes), times the squared temperature."""
    p, q = (log_softmax(logits.float() / temperature, dim=1) for logits in (wanted, answers))
    return kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def cosine_distance(wanted: Tensor, answers: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean of 1 - cosine of embeddings (B, C); it has no temperature."""
    return (1 - cosine_similarity(wanted.float(), answers.float(), dim=1)).mean()


def squared_error(wanted: Tensor, answers: Tensor, temperature: float = 1.0) -> Tensor:
    """Squared length of the difference of dense features (B, values), as a share of that of the wanted ones."""
    wanted, answers = wanted.float(), answers.float()
    return (answers - wanted).square().sum() / wanted.square().sum().clamp(min=1e-6)


LOSSES = {"classify": divergence, "embed": cosine_distance, "dense": squared_error}  # by task

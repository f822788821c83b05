"""Tokens per block, and the engine that is compiled for them."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.records.base import SCHEMA, Record
from edgeprune.records.latency import Setup
from edgeprune.records.model import Vit


class Schedule(Record, frozen=True, kw_only=True):
    """The number of tokens that leave each block; it never rises."""

    schema: int = SCHEMA
    vit: Vit
    method: str
    policy: str
    tokens: tuple[int, ...]
    prefix_last: bool = False  # the last block computes only the prefix (lossless)
    predicted_ms: float | None = None
    staircase_sha256: str | None = None

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.vit, self.prefix_last)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Indices of the blocks that remove tokens."""
        before = (self.vit.tokens, *self.tokens)
        return tuple(i for i, n in enumerate(self.tokens) if n < before[i])


def check_tokens(tokens: Sequence[int], vit: Vit, prefix_last: bool = False) -> None:
    """Raise ValueError unless `tokens` is a schedule of `vit`: one count per block, never rising, above the prefix.

    With `prefix_last` the last count is that of the tokens entering the last block, and the head must read only the
    prefix.
    """
    if prefix_last and not vit.prefix_pooled:
        raise ValueError(f"the head of {vit.name} reads more than the prefix: it needs the whole last block")
    if prefix_last and len(tokens) > 1 and tokens[-1] != tokens[-2]:
        raise ValueError("a last block that computes only the prefix cannot remove tokens")
    if len(tokens) != vit.depth:
        raise ValueError(f"{len(tokens)} token counts for {vit.depth} blocks")
    before = vit.tokens
    for block, count in enumerate(tokens):
        if count > before:
            raise ValueError(f"tokens rise from {before} to {count} in block {block}")
        if count < vit.prefix + 1:
            raise ValueError(f"block {block} keeps {count}, below prefix + 1 = {vit.prefix + 1}")
        before = count


class Engine(Record, frozen=True, kw_only=True):
    """A compiled model; `path` is relative to the folder that holds it."""

    path: str
    sha256: str
    onnx_sha256: str
    size_bytes: int
    setup: Setup


class Int8Ranges(Record, frozen=True, kw_only=True):
    """INT8 calibration: the largest magnitude of each activation, and the layers that stay in floating point."""

    way: str  # percentile | entropy
    ranges: dict[str, float]
    kept: tuple[str, ...]  # layers for which quantisation loses too much
    kl: float  # to the fp32 model on the calibration pictures, nats; 1 - cosine of embeddings

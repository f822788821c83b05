"""What passes between a family and a reducer: plain tensors, no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Attended(NamedTuple):
    """A block after attention, before its MLP. N tokens, C channels, H heads, D channels a head."""

    out: Tensor  # (B, N, C) the residual stream after attention
    weights: Tensor  # (B, H, N, N) softmax over the last axis: row = query, column = key
    keys: Tensor  # (B, H, N, D)
    values: Tensor  # (B, H, N, D)


class Reducer(Protocol):
    """A way of losing tokens.

    Takes the stream `x` (B, N, C), token `sizes` (B, N) or None where every token still stands for
    itself alone, and leaves exactly `keep` tokens, the first `prefix` of them untouched and in place.
    Returned sizes are None when later attention shall not weigh tokens by size.
    """

    def __call__(
        self, x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int
    ) -> tuple[Tensor, Tensor | None]: ...

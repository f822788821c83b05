"""The interface between families and reducers: plain tensors, no model."""

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
    """A way of reducing the number of tokens.

    Takes the stream `x` (B, N, C) and token `sizes` (B, N), None if every token still represents only itself.
    Returns exactly `keep` tokens, of which the first `prefix` are unchanged and in place, and their sizes, None if
    later attention does not depend on sizes.
    """

    def __call__(
        self, x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int
    ) -> tuple[Tensor, Tensor | None]: ...

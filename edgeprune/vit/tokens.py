"""The interface between families and reducers: plain tensors, no model. B images, N tokens of which M in the body."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Grid(NamedTuple):
    """Where the patches are after cuts (vit/restore.py)."""

    held: Tensor  # (B, patches) the body token that stands for each patch
    apart: Tensor  # (B, patches, C) what each patch's own stream had beyond that token's, at the last cut


class Stream(NamedTuple):
    """The tokens between two blocks. The body is all tokens except the prefix."""

    x: Tensor  # (B, N, C)
    sizes: Tensor | None = None  # (B, N); None if every token still represents only itself
    places: Tensor | None = None  # (B, M) row of the table of vit/rotary.py; None if no token has moved, or no table
    grid: Grid | None = None  # None if no token has moved, or without dense features


class Attended(NamedTuple):
    """A block after attention, before its MLP. N tokens, C channels, H heads, D channels a head."""

    out: Tensor  # (B, N, C) the residual stream after attention
    weights: Tensor  # (B, H, N, N) softmax over the last axis: row = query, column = key
    keys: Tensor  # (B, H, N, D)
    values: Tensor  # (B, H, N, D)


class Reduced(NamedTuple):
    """What a reducer leaves: K tokens.

    `kept` gives, for each that is not in the prefix, the index in the body of the token whose place it has; M for a
    mean without a place. It is called only for rotary positions, so that other graphs have no trace of it.
    """

    x: Tensor  # (B, K, C)
    sizes: Tensor | None  # (B, K); None if later attention does not depend on sizes
    kept: Callable[[], Tensor]  # (B, K - prefix)


class Reducer(Protocol):
    """A way of reducing the number of tokens.

    Takes the stream `x` (B, N, C) and token `sizes` (B, N), None if every token still represents only itself.
    Returns exactly `keep` tokens, of which the first `prefix` are unchanged and in place.
    """

    def __call__(self, x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> Reduced: ...

"""Latency over token counts."""

from __future__ import annotations

import msgspec

from edgeprune.records.base import SCHEMA, Record
from edgeprune.records.latency import Conditions, Latency, Setup
from edgeprune.records.model import Vit


class Point(Record, frozen=True, kw_only=True):
    """Latency of the whole trunk (all blocks) run at a constant token count."""

    tokens: int
    latency: Latency


class CutCost(Record, frozen=True, kw_only=True):
    """What one cut adds to a block beyond attention at `tokens_in` and MLP at `tokens_out`, ms."""

    tokens_in: int
    tokens_out: int
    cost_ms: float


class LastShare(Record, frozen=True, kw_only=True):
    """Latency of a last block that computes only the prefix, as a share of the whole block's at `tokens`."""

    tokens: int
    share: float


class DepthCheck(Record, frozen=True, kw_only=True):
    """The latency of the trunk as a linear function of that of two of its blocks."""

    slope: float
    offset_ms: float
    off: float  # largest relative error at token counts that the function was not fitted on

    def __post_init__(self) -> None:
        if not (self.slope > 0 and self.off >= 0):
            raise ValueError("a depth check has a slope above 0 and an error that is not below")

    def trunk_ms(self, pair_ms: float) -> float:
        """The latency of the trunk, ms, from that of two blocks."""
        return self.slope * pair_ms + self.offset_ms


class Staircase(Record, frozen=True, kw_only=True):
    """Measured latency over token counts on one setup; independent of the kind of hardware."""

    schema: int = SCHEMA
    vit: Vit
    setup: Setup
    fixed: Latency  # embedding and head
    dense: Latency  # the whole unpruned model, in the same rounds
    points: tuple[Point, ...]  # ascending token counts, the unpruned count included
    cuts: dict[str, tuple[CutCost, ...]] = msgspec.field(default_factory=dict)  # by method
    last: tuple[LastShare, ...] = ()  # empty where the head reads more than the prefix
    depth: DepthCheck | None = None  # where two blocks were timed and not the whole trunk
    conditions: tuple[Conditions, ...] = ()  # by stage; empty where the machine does not report them

    def __post_init__(self) -> None:
        counts = [p.tokens for p in self.points]
        if counts != sorted(set(counts)) or not counts:
            raise ValueError("points need ascending, distinct token counts")
        if counts[-1] != self.vit.tokens:
            raise ValueError(f"points must include the unpruned count {self.vit.tokens}")

    @property
    def probes(self) -> int:
        """Latency measurements taken (samples of all points)."""
        return sum(len(p.latency.samples_ms) for p in self.points)

    @property
    def throttled(self) -> bool | None:
        """Were the GPU's clocks lowered while it was measured? None where that is unknown, for lack of counters."""
        if any(c.throttled for c in self.conditions):
            return True
        return False if self.conditions and all(c.after.events for c in self.conditions) else None

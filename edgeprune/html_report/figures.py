"""How figures are written, in tables and on the page."""

from __future__ import annotations

from edgeprune.records import Latency

UNKNOWN = "–"


def number(value: float | None, digits: int = 2) -> str:
    """A figure; a dash where it is unknown."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def interval(latency: Latency | None) -> str:
    """The 95 % interval of a median latency, ms."""
    if latency is None:
        return UNKNOWN
    low, high = latency.interval_ms
    return f"{low:.3f} to {high:.3f}"


def evaluated_on(images: int, held_out: bool | None) -> str:
    """Which images the figures of accuracy were measured on."""
    if held_out is None:
        return f"{images} images"
    if held_out:
        return f"{images} images not used to choose the schedule"
    return f"all {images} images, some also used to choose the schedule: pass more --images for unbiased figures"

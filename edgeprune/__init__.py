"""Token pruning of timm Vision Transformers along the latency staircase of the target device.

>>> import edgeprune
>>> bundle = edgeprune.build(device="cpu", goal=edgeprune.Goal(speedup=1.5))
>>> bundle.figures.speedup, bundle.figures.top1
>>> bundle.predict("a.png")

What is imported here needs no torch; functions import what they need when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprune.version import __version__

if TYPE_CHECKING:
    from edgeprune.api import Goal, bench, build, compare, profile, prune, recover, schedule
    from edgeprune.bundles.bundle import Bundle

__all__ = ["Bundle", "Goal", "__version__", "bench", "build", "compare", "profile", "prune", "recover", "schedule"]


def __getattr__(name: str) -> Any:
    """Import the API on first use (PEP 562)."""
    import importlib

    if name == "Bundle":
        return importlib.import_module("edgeprune.bundles.bundle").Bundle
    if name in __all__:
        return getattr(importlib.import_module("edgeprune.api"), name)
    raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")

"""Token pruning of timm Vision Transformers along the latency staircase of the target device."""

__version__ = "0.1.0"

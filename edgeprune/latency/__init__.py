"""Latency over token counts, measured: which counts to probe, how to time them, what the staircase is."""

"""Measured latency over token counts: which counts to measure, how to time them, and the staircase they form."""

"""The folder that a build writes: its format, and opening, running, verifying and shipping it."""

"""Bundles timed side by side, against a stored baseline and the measured peak of the machine."""

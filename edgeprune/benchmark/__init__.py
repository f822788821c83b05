"""Bundles timed side by side, compared with a stored baseline and with the measured peak of the machine."""

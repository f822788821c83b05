"""Evaluation beyond one process, on Ray, which is imported only where --ray asks for it."""

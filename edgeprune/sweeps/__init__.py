"""Many builds at once: models × devices × precisions × batches × methods × goals, with one table and one page."""

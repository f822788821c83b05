"""Which token counts a schedule keeps: goals, the paper's policy, published shapes, the search."""

"""Which token counts a schedule keeps: goals, the paper's policy, published shapes, the search."""

DEFAULT_ALPHA = 0.5  # weight of latency in the utility if no other goal is given (arXiv 2407.05941, sec. 3)

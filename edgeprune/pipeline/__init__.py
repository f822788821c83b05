"""Model to bundle, step by step."""

"""The steps of benchmarks/gpu_run.py."""

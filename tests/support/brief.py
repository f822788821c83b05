"""Short warm-ups for a command in a process of its own, as support.processes.measure_few has them for others."""

# Runs before `main()`. Imports no more than the command itself does.
CODE = """
command = sys.argv[1] if len(sys.argv) > 1 else ""
if command in ("worker", "verify", "run", "bench", "compile", "profile"):
    from edgeprune.latency import timing
    timing.WARMUP_MS, timing.WARMUP_S = 20.0, 0.1
if command == "worker":
    from edgeprune.runtimes.remote import worker
    worker.RAMP_MS = 5.0
elif command == "bench":
    from edgeprune.benchmark import bench, peak
    bench.WARMUP_MS, peak.WARMUP_S = 20.0, 0.1
elif command == "compile":
    from edgeprune.pipeline import measure
    measure.WARMUP_MS = 20.0
elif command == "profile":
    from edgeprune.latency import probing
    probing.WARMUP_MS = 0.0
"""

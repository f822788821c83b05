"""Run inside one real TensorRT binding: every name used must exist where its conditions hold; one JSON line out."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

MISSING = object()


def found(trt: Any, name: str) -> bool:
    """Is a dotted name there?"""
    item = trt
    for part in name.split("."):
        item = getattr(item, part, MISSING)
        if item is MISSING:
            return False
    return True


def main() -> None:
    """Arguments: the binding's module, a JSON file of uses."""
    module, path = sys.argv[1:]
    trt = importlib.import_module(module)
    sys.modules["tensorrt"] = trt
    with open(path) as file:
        used = json.load(file)
    missing = [
        f"{name} ({place})"
        for name, place, conditions in used
        if all(found(trt, condition) == there for condition, there in conditions) and not found(trt, name)
    ]
    from edgeprune.records import TrtOptions
    from edgeprune.runtimes import trt as runtime
    from edgeprune.runtimes import trt_builder, trt_log, trt_session
    from edgeprune.runtimes.interrupt import Interrupt

    assert trt_builder.tensorrt() is trt and runtime.TensorRT.suffix == ".engine"
    logger = trt_log.logger_of(trt)  # subclasses TensorRT's own: wrong signatures fail here
    logger.log(trt.ILogger.Severity.WARNING, "text")
    assert logger.lines == [("WARNING", "text")], logger.lines
    monitor = trt_builder.make_monitor(trt, lambda what, done, of: None, Interrupt())
    if monitor is not None:
        monitor.phase_start("phase", None, 2)
        assert monitor.step_complete("phase", 1) is True
        monitor.phase_finish("phase")
    strong = trt_builder.is_strong(trt, TrtOptions())
    flags = trt_builder.network_flags(trt, TrtOptions())
    types = sorted(n for n in dir(trt.DataType) if n in trt_session.DTYPES)
    print(json.dumps({"version": trt.__version__, "missing": missing, "strong": strong, "flags": flags,
                      "monitor": monitor is not None, "types": types}))  # fmt: skip


if __name__ == "__main__":
    main()

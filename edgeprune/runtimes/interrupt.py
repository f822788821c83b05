"""Ctrl-C during a call into TensorRT, whose Python bindings would swallow it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupt:
    """Has a signal asked to stop?"""

    asked = False


@contextmanager
def held_interrupts() -> Iterator[Interrupt]:
    """Hold SIGINT and SIGTERM back inside the `with` block; KeyboardInterrupt is raised at its end if one came.

    Python raises KeyboardInterrupt in the Python code that runs next. While TensorRT builds, that is a callback,
    nearly always Logger.log, and its bindings catch every exception there (PyLogger::log in
    NVIDIA/TensorRT/python/src/infer/pyCore.cpp). Signals that Python does not handle, and threads other than the main
    one, which never receive any, are left alone.
    """
    stop = Interrupt()

    def ask(number: int, frame: Any) -> None:
        stop.asked = True

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, ask)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop.asked:
            raise KeyboardInterrupt

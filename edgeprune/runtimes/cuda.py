"""The CUDA driver: pycuda, or NVIDIA's cuda-python where pycuda is missing. No other module knows which."""

from __future__ import annotations

import atexit
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from edgeprune.errors import DeviceError, EngineError, MissingError

INSTALL = (
    "pip install pycuda, which needs nvcc (export PATH=/usr/local/cuda/bin:$PATH); "
    "without nvcc, pip install cuda-bindings of your CUDA's major version (JetPack 6: 'cuda-bindings<13')"
)


class _Current:
    """The primary context, current in the thread that made this until the thread ends."""

    def __init__(self, primary: Any) -> None:
        self.primary, self.pushed = primary, False
        primary.push()
        self.pushed = True

    def pop(self) -> None:
        """Make it no longer current, once."""
        if self.pushed:
            self.pushed = False
            self.primary.pop()

    __del__ = pop  # in the thread itself: its threading.local is cleared as the last thing that it does


_threads = threading.local()


def driver() -> Any:
    """A module with pycuda.driver's names, and the primary context of GPU 0, which TensorRT shares, current here.

    GPU 0 is the first of CUDA_VISIBLE_DEVICES, in the order of nvidia-smi, so that names, clocks and temperatures
    are those of the GPU that is timed. A context is current in one thread, so it is pushed in each that calls this,
    and popped when the thread or the process ends: pycuda aborts a process where one is left on a stack. Raises
    MissingError, DeviceError.
    """
    cuda, primary = primary_context()
    current: _Current | None = getattr(_threads, "current", None)
    if current is None or current.primary is not primary:
        with _no_device(cuda):
            _threads.current = _Current(primary)
        if threading.current_thread() is threading.main_thread():
            atexit.register(_threads.current.pop)
    return cuda


@lru_cache(maxsize=1)
def primary_context() -> tuple[Any, Any]:
    """The module and the primary context of GPU 0. Raises MissingError, DeviceError."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    cuda = _module()
    with _no_device(cuda):
        cuda.init()
        return cuda, cuda.Device(0).retain_primary_context()


@contextmanager
def _no_device(cuda: Any) -> Iterator[None]:
    try:
        yield
    except cuda.Error as error:
        raise DeviceError(f"no CUDA device found ({_line(error)}): check the driver with nvidia-smi") from None


def gpu() -> Any:
    """GPU 0. Raises as driver()."""
    return driver().Device(0)


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Raise errors of CUDA in the `with` block as an EngineError of one line that begins with `what`."""
    try:
        yield
    except driver().Error as error:
        text = _line(error)
        advice = (
            "close other programs" if "memory" in text.lower() else "run it again, and check dmesg if it persists"
        )
        raise EngineError(f"{what}: CUDA failed ({text}): {advice}") from None


def _module() -> Any:
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        missing = error
    else:
        return cuda
    try:
        return importlib.import_module("edgeprune.runtimes.cuda_python")
    except ImportError:
        raise MissingError(f"pycuda is missing ({missing}): {INSTALL}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

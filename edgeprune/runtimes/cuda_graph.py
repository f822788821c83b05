"""A captured CUDA graph, through the driver's C API: pycuda has no CUDA graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any


class Graph:
    """The work that `enqueue` puts on a stream, recorded once and launched as a whole.

    Raises OSError where capture fails. Source: CUDA Driver API, "Graph Management"; CUDA 11.4 or later.
    """

    RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

    def __init__(self, stream: int, enqueue: Callable[[], bool]) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p(stream)
        graph, self._exec = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, self.RELAXED)
        enqueued = enqueue()
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        if not enqueued:
            raise OSError("TensorRT could not enqueue")
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Enqueue the recorded work. Raises OSError."""
        self._call("cuGraphLaunch", self._exec, self._stream)

    def close(self) -> None:
        """Free the graph. Raises OSError."""
        self._call("cuGraphExecDestroy", self._exec)

    def _call(self, function: str, *args: Any) -> None:
        result = getattr(self._cuda, function)(*args)
        if result:
            raise OSError(f"{function}: CUDA error {result}")

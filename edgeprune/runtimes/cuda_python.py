"""The names of pycuda.driver that edgeprune uses, over NVIDIA's cuda-python, which has wheels for x86 and aarch64.

Importing it raises ImportError where cuda-python (cuda-bindings) is missing. Source of the calls: CUDA Driver API.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    api: Any = importlib.import_module("cuda.bindings.driver")
except ImportError:  # cuda-python before 12.6
    api = importlib.import_module("cuda.cuda")

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray


class device_attribute:
    """The attributes of a GPU that edgeprune asks for, under pycuda's names."""

    COMPUTE_CAPABILITY_MAJOR = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    COMPUTE_CAPABILITY_MINOR = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    INTEGRATED = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
    MULTIPROCESSOR_COUNT = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


class Error(Exception):
    """A call that did not return CUDA_SUCCESS."""


def _call(function: Any, *args: Any) -> Any:
    """The result of a driver function: None, one value or a tuple. Raises Error with its name."""
    try:
        code, *results = function(*args)
    except RuntimeError as error:  # there is no libcuda, or it is older than the function
        raise Error(str(error)) from None
    if code != api.CUresult.CUDA_SUCCESS:
        raise Error(f"{function.__name__}: {code.name}")
    return results[0] if len(results) == 1 else tuple(results) or None


def init() -> None:
    """Start the driver. Raises Error."""
    _call(api.cuInit, 0)


def mem_get_info() -> tuple[int, int]:
    """Free and total memory of the GPU, bytes. Raises Error."""
    free, total = _call(api.cuMemGetInfo)
    return int(free), int(total)


class Context:
    """The primary context of a GPU; made current by `push`."""

    def __init__(self, device: Any) -> None:
        self._handle = _call(api.cuDevicePrimaryCtxRetain, device)

    def push(self) -> None:
        """Make it current. Raises Error."""
        _call(api.cuCtxPushCurrent, self._handle)

    def pop(self) -> None:
        """Make the one before it current. Raises Error."""
        _call(api.cuCtxPopCurrent)


class Device:
    """A GPU by its number."""

    def __init__(self, number: int) -> None:
        self._handle = _call(api.cuDeviceGet, number)

    def name(self) -> str:
        """For example "Orin". Raises Error."""
        return bytes(_call(api.cuDeviceGetName, 256, self._handle)).partition(b"\0")[0].decode(errors="replace")

    def get_attribute(self, attribute: Any) -> int:
        """A value of CUdevice_attribute. Raises Error."""
        return int(_call(api.cuDeviceGetAttribute, attribute, self._handle))

    def compute_capability(self) -> tuple[int, int]:
        """Major and minor. Raises Error."""
        major = self.get_attribute(device_attribute.COMPUTE_CAPABILITY_MAJOR)
        return major, self.get_attribute(device_attribute.COMPUTE_CAPABILITY_MINOR)

    def total_memory(self) -> int:
        """Bytes. Raises Error."""
        return int(_call(api.cuDeviceTotalMem, self._handle))

    def retain_primary_context(self) -> Context:
        """The context that TensorRT uses, too. Raises Error."""
        return Context(self._handle)


class Stream:
    """A stream; `handle` is for TensorRT."""

    def __init__(self) -> None:
        self._stream = _call(api.cuStreamCreate, api.CUstream_flags.CU_STREAM_DEFAULT)
        weakref.finalize(self, api.cuStreamDestroy, self._stream).atexit = False

    @property
    def handle(self) -> int:
        """The address of the stream."""
        return int(self._stream)

    def synchronize(self) -> None:
        """Wait until all its work is done. Raises Error."""
        _call(api.cuStreamSynchronize, self._stream)


class Event:
    """A point in the work of a stream, with its time."""

    def __init__(self) -> None:
        self._event = _call(api.cuEventCreate, api.CUevent_flags.CU_EVENT_DEFAULT)
        weakref.finalize(self, api.cuEventDestroy, self._event).atexit = False

    def record(self, stream: Stream) -> None:
        """Put it behind the work that the stream has so far. Raises Error."""
        _call(api.cuEventRecord, self._event, stream.handle)

    def synchronize(self) -> None:
        """Wait until the work before it is done. Raises Error."""
        _call(api.cuEventSynchronize, self._event)

    def time_since(self, other: Event) -> float:
        """Time from another event to this, ms. Raises Error."""
        return float(_call(api.cuEventElapsedTime, other._event, self._event))


class DeviceAllocation:
    """Memory of the GPU; int() is its address. Freed by `free`, or with the object."""

    def __init__(self, size: int) -> None:
        self._pointer = _call(api.cuMemAlloc, size)
        self._free = weakref.finalize(self, api.cuMemFree, self._pointer)
        self._free.atexit = False

    def __int__(self) -> int:
        return int(self._pointer)

    def free(self) -> None:
        """Give it back."""
        self._free()


mem_alloc = DeviceAllocation


def pagelocked_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array in page-locked memory of the host, freed with the last view of it. Raises Error."""
    kind, count = np.dtype(dtype), int(np.prod(shape))
    size = max(kind.itemsize * count, 1)
    pointer = int(_call(api.cuMemHostAlloc, size, 0))
    memory = (ctypes.c_byte * size).from_address(pointer)
    weakref.finalize(memory, api.cuMemFreeHost, pointer).atexit = False
    return np.ndarray(shape, kind, memoryview(memory))


def memcpy_htod_async(to: DeviceAllocation, array: NDArray[Any], stream: Stream) -> None:
    """Copy an array to the GPU. Raises Error."""
    _call(api.cuMemcpyHtoDAsync, int(to), array.ctypes.data, array.nbytes, stream.handle)


def memcpy_dtoh_async(array: NDArray[Any], source: DeviceAllocation, stream: Stream) -> None:
    """Copy from the GPU into an array. Raises Error."""
    _call(api.cuMemcpyDtoHAsync, array.ctypes.data, int(source), array.nbytes, stream.handle)

"""Limits this process to some of the GPU's multiprocessors (SMs), by a green context of the CUDA driver.

Source: CUDA Driver API 12.4 and later, "Green Contexts", and cuda.h. Never run on a GPU so far. Whether TensorRT 8.6,
which is older than green contexts, stays within one is open; `limit` checks that new streams do.
"""

from __future__ import annotations

import atexit
import ctypes
from typing import Any

from edgeprune.errors import DeviceError
from edgeprune.runtimes.cuda import driver

SM_RESOURCE, DEFAULT_STREAM = 1, 1  # CU_DEV_RESOURCE_TYPE_SM, CU_GREEN_CTX_DEFAULT_STREAM
RESOURCE_BYTES, SM_COUNT_AT = 144, 96  # CUdevResource: type, 92 bytes of padding, then CUdevSmResource.smCount


def limit(count: int | None) -> int | None:
    """Make `count` SMs all that this process uses from now on; how many it got, since the driver rounds up.

    On compute capability 9.0 the least is 8, in steps of 8. Raises DeviceError where the driver cannot.
    """
    if count is None:
        return None
    driver()  # the primary context, below the green one
    try:
        return _limited(ctypes.CDLL("libcuda.so.1"), count)
    except (OSError, AttributeError) as error:
        raise DeviceError(
            f"this driver cannot limit a process to {count} SMs ({error}): use one for CUDA 12.4 or later, "
            "or leave out --sm-limit"
        ) from None


def _limited(cuda: Any, count: int) -> int:
    def call(function: str, *args: Any) -> None:
        if result := getattr(cuda, function)(*args):
            raise OSError(f"{function}: CUDA error {result}")

    device, groups = ctypes.c_int(), ctypes.c_uint(1)
    everything, part = (ctypes.create_string_buffer(RESOURCE_BYTES) for _ in range(2))
    description, green, context, stream, seen = (ctypes.c_void_p() for _ in range(5))
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDeviceGetDevResource", device, everything, SM_RESOURCE)
    call("cuDevSmResourceSplitByCount", part, ctypes.byref(groups), everything, None, 0, ctypes.c_uint(count))
    call("cuDevResourceGenerateDesc", ctypes.byref(description), part, ctypes.c_uint(1))
    call("cuGreenCtxCreate", ctypes.byref(green), description, device, DEFAULT_STREAM)
    call("cuCtxFromGreenCtx", ctypes.byref(context), green)
    call("cuCtxPushCurrent_v2", context)
    atexit.register(cuda.cuCtxPopCurrent_v2, ctypes.byref(ctypes.c_void_p()))
    call("cuStreamCreate", ctypes.byref(stream), 0)
    call("cuStreamGetGreenCtx", stream, ctypes.byref(seen))
    call("cuStreamDestroy_v2", stream)
    if seen.value != green.value:
        raise OSError("new streams are not in the green context")
    return ctypes.c_uint.from_buffer(part, SM_COUNT_AT).value

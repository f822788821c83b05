"""cuda-python in pycuda's place: the real bindings, over a libcuda whose GPU is the memory of the host."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS
from support.trt_names import PYCUDA, RUNTIMES, SOURCES, uses

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

SCRIPT = """
import ctypes, gc, json, sys
import numpy as np
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
sys.modules["pycuda"] = None
from edgeprune.errors import EngineError
from edgeprune.runtimes.cuda import driver, errors_of, gpu
cuda = driver()
assert cuda.__name__.endswith("cuda_python"), cuda
attributes = cuda.device_attribute
card = [gpu().name(), gpu().compute_capability(), gpu().total_memory() >> 30]
card += [gpu().get_attribute(attributes.MULTIPROCESSOR_COUNT), gpu().get_attribute(attributes.INTEGRATED)]
before = cuda.mem_get_info()
stream, begin, end = cuda.Stream(), cuda.Event(), cuda.Event()
there, back = (cuda.pagelocked_empty((2, 3), "f4") for _ in range(2))
there[...] = np.arange(6).reshape(2, 3)
memory = cuda.mem_alloc(there.nbytes)
begin.record(stream)
cuda.memcpy_htod_async(memory, there, stream)
cuda.memcpy_dtoh_async(back, memory, stream)
end.record(stream)
end.synchronize()
stream.synchronize()
held = cuda.mem_get_info()[0] - before[0]
ms, same = end.time_since(begin), bool((there == back).all())
view = back[1:]
memory.free()
memory.free()
del there, back, stream, begin, end
gc.collect()
left = cuda.mem_get_info()[0] - before[0]
kept = view.tolist()
try:
    with errors_of("model.engine"):
        cuda.mem_alloc(1 << 30)
except EngineError as error:
    said = str(error)
print(json.dumps({"card": card, "held": held, "left": left, "same": same, "ms": ms, "kept": kept, "said": said}))
"""


def test_every_name_of_pycuda_that_is_used_is_there() -> None:
    from edgeprune.runtimes import cuda_python

    for name in {use.name for use in uses(SOURCES, PYCUDA)} - {"Context.pop"}:
        thing: object = cuda_python
        for part in name.split("."):
            assert hasattr(thing, part), name
            thing = getattr(thing, part)


def test_every_name_of_the_driver_exists() -> None:
    """Also those in functions that nothing has called."""
    from edgeprune.runtimes import cuda_python

    tree = ast.parse((RUNTIMES / "cuda_python.py").read_text())
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = sorted(name for name in used if name.startswith("api."))
    assert len(names) > 25
    for name in names:
        thing: object = cuda_python
        for part in name.split("."):
            assert hasattr(thing, part), name
            thing = getattr(thing, part)


def test_calls_and_memory(tmp_path: Path) -> None:
    """In a process of its own, because the bindings look up libcuda once."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: no libcuda can be built")
    library = tmp_path / "libcuda.so.1"
    source = str(TESTS / "support/libcuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["card"] == ["Orin", [8, 7], 7, 8, 1]
    assert found["held"] == 6 and found["same"] and 0 <= found["ms"] < 1000
    assert found["left"] == 1 and found["kept"] == [[3, 4, 5]], "the view still holds its page-locked memory"
    wanted = "model.engine: CUDA failed (cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY): close other programs"
    assert found["said"] == wanted

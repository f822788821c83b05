"""The peak rate of a device: products of large square matrices, compiled and run by its own runtime."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeprune.io import write_bytes
from edgeprune.latency.timing import times_ms, warm_up
from edgeprune.onnx_graph.passes import OPSET
from edgeprune.records import Setup
from edgeprune.runtimes import Runtime
from edgeprune.runtimes.inference import Open

CHAIN = 8  # products one after another, so that the casts at both ends hardly count
SIZES = (256, 512, 1024, 2048, 4096, 8192)
GAIN = 1.05  # larger sizes are tried while doubling raises the rate by this factor
LIMIT_MS = 40.0  # of one run, since it is measured in the same rounds as the bundles
WARMUP_S = 1.0  # at most, for each size
RUNS = 9


@dataclass(frozen=True)
class Gemm:
    """CHAIN products of two `size` × `size` matrices, compiled for a setup."""

    setup: Setup
    size: int
    open: Open
    searched_ms: float  # median when run alone, before the bundles

    @property
    def gflop(self) -> float:
        """10⁹ operations of one run; two for each multiply-add."""
        return 2 * CHAIN * self.size**3 / 1e9


def largest_useful(runtime: Runtime, setup: Setup, folder: Path, only: int | None = None) -> Gemm:
    """The size of SIZES with the most operations per second; with `only`, just that size.

    The size is doubled while the rate rises and a run stays below LIMIT_MS. Raises EngineError, OutputError.
    """
    if only is not None:
        return _compiled(runtime, setup, only, folder)
    best = _compiled(runtime, setup, SIZES[0], folder)
    for size in SIZES[1:]:
        if best.searched_ms * 8 > LIMIT_MS:  # twice the size is eight times the work
            break
        found = _compiled(runtime, setup, size, folder)
        gain = _rate(found) / _rate(best)
        best = found if gain > 1 else best
        if gain < GAIN:
            break
    return best


def _compiled(runtime: Runtime, setup: Setup, size: int, folder: Path) -> Gemm:
    onnx_file, engine = folder / f"gemm-{size}.onnx", folder / f"gemm-{size}-engine{runtime.suffix}"
    fp16 = setup.precision == "fp16" and not setup.simulated  # a simulation applies its own precision
    write_bytes(onnx_file, gemm_onnx(size, fp16).SerializeToString())
    runtime.compile(onnx_file, setup, engine)
    with runtime.open(engine, setup) as session:
        if not setup.noiseless:
            warm_up(session, most_s=WARMUP_S)
        times = times_ms([session] * RUNS)
    return Gemm(setup, size, lambda: runtime.open(engine, setup), float(np.median(times)))


def gemm_onnx(size: int, fp16: bool) -> onnx.ModelProto:
    """x · W · W · … as a static ONNX, (size, size) fp32 input and output; W preserves the variance of x."""
    kind = np.float16 if fp16 else np.float32
    weight = (np.random.default_rng(0).standard_normal((size, size), np.float32) / size**0.5).astype(kind)
    names = [f"x{i}" for i in range(CHAIN + 1)]
    nodes = [helper.make_node("MatMul", [a, "w"], [b], name=b) for a, b in pairwise(names)]
    first, last = names[0], names[-1]
    if fp16:
        nodes.insert(0, helper.make_node("Cast", ["x"], [first], to=TensorProto.FLOAT16))
        nodes.append(helper.make_node("Cast", [last], ["y"], to=TensorProto.FLOAT))
        first, last = "x", "y"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in (first, last)]
    graph = helper.make_graph(nodes, "gemm", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def _rate(gemm: Gemm) -> float:
    return gemm.gflop / gemm.searched_ms

"""The matrix product that gives the measured peak of a machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from edgeprune.benchmark.peak import CHAIN, gemm_onnx, largest_useful
from edgeprune.devices import load_device
from edgeprune.onnx_graph.operations import flops_of_onnx
from edgeprune.records import Setup
from edgeprune.runtimes import runtime_for


@pytest.mark.parametrize("fp16", [False, True])
def test_matrix_product_computes_what_it_says(fp16: bool, tmp_path: Path) -> None:
    model = gemm_onnx(64, fp16)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "g.onnx")
    assert flops_of_onnx(tmp_path / "g.onnx") == CHAIN * 2 * 64**3
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {TensorProto.FLOAT16 if fp16 else TensorProto.FLOAT}
    x = np.random.default_rng(1).standard_normal((64, 64), dtype=np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [y] = session.run(None, {session.get_inputs()[0].name: x})
    wanted = x.astype(np.float64)
    for _ in range(CHAIN):
        wanted = wanted @ numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64)
    np.testing.assert_allclose(y, wanted, atol=0.02 * wanted.std() if fp16 else 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_measured_peak_of_a_simulated_board_is_what_its_largest_tile_reaches(precision: str, tmp_path: Path) -> None:
    device = load_device("orin-nano")
    runtime = runtime_for(device, simulate=True)
    found = largest_useful(runtime, runtime.setup(device, precision, 1), tmp_path)
    assert device.simulation is not None and device.sm_count is not None
    model = device.simulation
    sheet = 2 * model.fma_per_clock_per_sm[precision] * model.clock_mhz * device.sm_count / 1e3
    # a step of 256 × 128 outputs at 85 % of the rate, and loads of 384 values at 64 bytes per clock
    rate, size = model.fma_per_clock_per_sm[precision], {"fp32": 4, "fp16": 2, "int8": 1}[precision]
    reached = 32768 / rate / (32768 / rate / 0.85 + 384 * size / 64)
    assert 0.75 * reached < 1e3 * found.gflop / found.searched_ms / sheet <= reached


def test_size_of_the_matrix_product_doubles_while_that_gains(tmp_path: Path) -> None:
    """A machine that loses half a millisecond below 1024, and reaches the same rate from there on."""
    opened: list[int] = []

    class Session:
        def __init__(self, path: Path) -> None:
            self.size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value
            opened.append(self.size)

        def time_ms(self) -> float:
            return 1e-9 * self.size**3 + (0.5 if self.size < 1024 else 0)

        def __enter__(self) -> Session:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    class Runtime:
        suffix = ".onnx"

        def compile(self, source: Path, setup: Setup, out: Path) -> None:
            out.write_bytes(source.read_bytes())

        def open(self, path: Path, setup: Setup) -> Session:
            return Session(path)

    setup = Setup(device="d", machine="m", runtime="r", runtime_version="1", precision="fp32", batch=1)
    assert largest_useful(Runtime(), setup, tmp_path).size == 1024  # type: ignore[arg-type]
    assert opened == [256, 512, 1024, 2048]
    opened.clear()
    assert largest_useful(Runtime(), setup, tmp_path, 512).size == 512 and opened == [512]  # type: ignore[arg-type]

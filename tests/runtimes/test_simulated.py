"""The tail-effect model: its formula by hand, its staircase, and its walk over ONNX files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.devices import load_device
from edgeprune.errors import DeviceError, EngineError, MissingError, OutputError
from edgeprune.onnx_graph.operations import (
    Attention,
    Elementwise,
    Matmul,
    Operation,
    flops_of_onnx,
    operations_of_onnx,
)
from edgeprune.records import Device, Setup, Vit
from edgeprune.runtimes import runtime_for
from edgeprune.runtimes.kernel_times import latency_ms
from edgeprune.runtimes.simulated import SimulatedKernels, SimulatedRuntime, operations_of_ends, operations_of_trunk

NANO = load_device("orin-nano")  # 8 SM, 1020 MHz, 2048, 1024 and 128 FMA at int8, fp16 and fp32, 102 GB/s, 2 µs
SMALLEST = Elementwise(1, 1)


def vit(width: int = 192, heads: int = 3, mlp_width: int = 768, depth: int = 12, matrices: int = 2) -> Vit:
    """A ViT of 224 px and 197 tokens; ViT-Tiny by default."""
    return Vit(
        name="test",
        weights_sha256="",
        family="vit",
        image_px=224,
        patch_px=16,
        depth=depth,
        width=width,
        heads=heads,
        head_dim=width // heads,
        mlp_width=mlp_width,
        mlp_matrices=matrices,
        prefix=1,
        tokens=197,
        classes=1000,
        prefix_pooled=True,
    )


def curve(device: Device, model: Vit, precision: str = "fp16", batch: int = 1) -> dict[int, float]:
    """Trunk latency in ms by token count."""
    return {n: trunk_ms(device, model, n, precision, batch) for n in range(20, 198)}


def trunk_ms(device: Device, model: Vit, tokens: int, precision: str, batch: int) -> float:
    return SimulatedKernels(operations_of_trunk(model, tokens, batch), device, precision).time_ms()


def treads(points: dict[int, float]) -> list[int]:
    """Token counts whose next neighbour costs more, and the last."""
    return [n for n in points if n + 1 not in points or points[n + 1] > points[n]]


def test_kernels_by_hand() -> None:
    """Times in µs beyond the launch; memory passes 102000 · 0.7 = 71400 bytes per µs."""

    def time_us(operation: Operation, precision: str = "fp16") -> float:
        return latency_ms([operation], NANO, precision) * 1e3 - 2

    def near(us: float) -> object:
        return pytest.approx(us, rel=1e-6)

    # limited by arithmetic: 32 · 64 tiles of 256 × 128 in 256 waves of 8192 steps. A step takes 32768 FMA at 85 % of
    # 1024 per clock, and loads 384 values of 2 bytes at 64 per clock
    square = Matmul(8192, 8192, 8192, linear=True)
    assert time_us(square) == near(256 * (8192 * (32 / 0.85 + 12) + 1500) / 1020)
    assert time_us(square, "int8") == near(256 * (8192 * (16 / 0.85 + 6) + 1500) / 1020)
    assert time_us(square, "fp32") == near(256 * (8192 * (256 / 0.85 + 24) + 1500) / 1020)
    # only linear layers of blocks are INT8; where no norm writes their input, 8192 rows of 2 bytes in and 1 out
    assert time_us(Matmul(8192, 8192, 8192), "int8") == time_us(square)
    from_matmul = Matmul(8192, 8192, 8192, linear=True, quantises=True)
    assert time_us(from_matmul, "int8") == near(time_us(square, "int8") + 2 + 8192 * 8192 * 3 / 71400)
    assert time_us(from_matmul) == time_us(square)
    # limited by memory: 5 tiles of 64 × 128 in one wave read 64 · 192 + 192 · 576 and write 64 · 576 values
    assert time_us(Matmul(1, 576, 192)) == near((64 * (192 + 576) + 192 * 576) * 2 / 71400)
    # few tiles and a long sum: split in 2, 2 tiles of 32 × 64 run on 4 SMs in one wave, in less time than memory
    # takes; then both sums of 64 · 64 fp32 values are written and read, with another launch
    memory_us = (64 * (8192 + 64) + 8192 * 64) * 2 / 71400
    assert time_us(Matmul(64, 64, 8192)) == near(memory_us + 2 + 2 * 2 * 64 * 64 * 4 / 71400)
    # 197 queries and keys are 4 tiles and 256 keys; 3 heads: 12 tiles, 2 waves. A wave: 2 · 64 · 256 · 64 FMA,
    # 64 · 256 exponentials at 16 per clock, and loads of 2 · (64 + 256) · 64 values of 2 bytes at 64 per clock
    attention, clocks = Attention(197, 197, 64, 3), 2048 / 0.85 + 1024 + 1280 + 1500
    assert time_us(attention) == near(2 * clocks / 1020)
    assert time_us(attention, "int8") == time_us(attention)
    parts = (Matmul(197, 197, 64, 3), Elementwise(591, 394), Matmul(197, 64, 197, 3))
    assert latency_ms([attention], NANO, "fp32") == near(latency_ms(parts, NANO, "fp32"))
    # 197 rows are 4 groups of 64
    assert time_us(Elementwise(197, 768)) == near(256 * 768 * 2 / 71400)
    assert latency_ms([attention, SMALLEST], NANO, "fp16") == near((2 * 2 + 2 * clocks / 1020 + 64 * 2 / 71400) / 1e3)


def test_attention_is_fused_where_tensorrt_has_kernels_for_it() -> None:
    attention = Attention(197, 197, 64, 3)
    tx2, own = load_device("jetson-tx2"), msgspec.structs.replace(NANO, compute_capability=None)
    assert latency_ms([attention], tx2, "fp16") == latency_ms(attention.parts(), tx2, "fp16")
    assert latency_ms([attention], own, "fp16") == latency_ms([attention], NANO, "fp16")


def test_trunk_by_hand() -> None:
    assert operations_of_trunk(vit(depth=2), 100, batch=2) == [
        Elementwise(200, 2 * 192),
        Matmul(200, 576, 192, linear=True),
        Attention(100, 100, 64, 6),
        Matmul(200, 192, 192, linear=True, quantises=True),
        Elementwise(200, 4 * 192),
        Matmul(200, 768, 192, linear=True),
        Matmul(200, 192, 768, linear=True, quantises=True),
        Elementwise(200, 4 * 192),
        Matmul(200, 576, 192, linear=True),
        Attention(100, 100, 64, 6),
        Matmul(200, 192, 192, linear=True, quantises=True),
        Elementwise(200, 4 * 192),
        Matmul(200, 768, 192, linear=True),
        Matmul(200, 192, 768, linear=True, quantises=True),
        Elementwise(200, 3 * 192),
    ]
    assert operations_of_trunk(vit(depth=2, matrices=3), 100, 2)[5] == Matmul(200, 1536, 192, linear=True)
    assert len(operations_of_trunk(vit(depth=7), 100, 2)) == 7 * 7 + 1
    assert operations_of_ends(vit(), 2) == [
        Matmul(392, 192, 768),
        Elementwise(394, 2 * 192),
        Elementwise(394, 2 * 192),
        Matmul(2, 1000, 192),
    ]


@pytest.mark.parametrize(
    ("device", "model", "batch", "expected"),
    [
        ("orin-nano", vit(), 1, [32, 64, 128, 160, 192, 197]),
        ("orin-nano", vit(), 4, [32, 40, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 197]),
        ("agx-orin", vit(384, 6, 1536), 4, [32, 40, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 197]),
    ],
)
def test_staircase_rises_at_the_treads_only(device: str, model: Vit, batch: int, expected: list[int]) -> None:
    points = curve(load_device(device), model, batch=batch)
    assert treads(points) == expected
    assert list(points.values()) == sorted(points.values())
    for start, end in zip([19, *expected], expected, strict=False):
        assert len({points[n] for n in range(start + 1, end + 1)}) == 1, (start, end)
    assert points[197] > 1.2 * points[64]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_more_of_anything_is_never_slower(precision: str) -> None:
    base = curve(NANO, vit(), precision)
    assert NANO.sm_count is not None and NANO.simulation is not None
    sms = msgspec.structs.replace(NANO, sm_count=2 * NANO.sm_count)
    faster = msgspec.structs.replace(
        NANO.simulation, clock_mhz=2 * NANO.simulation.clock_mhz, bandwidth_gb_per_s=204.0
    )
    for better in (sms, msgspec.structs.replace(NANO, simulation=faster)):
        points = curve(better, vit(), precision)
        assert all(points[n] <= base[n] for n in base)
        assert points[197] < base[197]


def test_same_figures_same_latency() -> None:
    assert curve(load_device("orin-nano"), vit()) == curve(load_device("orin-nano"), vit())


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_device_without_simulation_names_those_with_one(name: str) -> None:
    device = load_device(name)
    known = "agx-orin, h100, jetson-thor, jetson-tx2, orin-nano, orin-nx"
    with pytest.raises(DeviceError, match=f"device {name} has no simulation.*{known}"):
        latency_ms([SMALLEST], device, "fp16")
    with pytest.raises(DeviceError, match=known):
        runtime_for(device, simulate=True).setup(device, "fp16", 1)


def test_unknown_precision() -> None:
    with pytest.raises(DeviceError, match="no rate for 'fp8': choose fp32, tf32, fp16, int8"):
        latency_ms([SMALLEST], NANO, "fp8")


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(0).uniform(0, 0.1, shape).astype(np.float32), name)


def write(path: Path, nodes: list[onnx.NodeProto], shape: list[int | str], weights: list[onnx.TensorProto]) -> Path:
    """An ONNX file with the input `x`; the output is that of the last node."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def trunk_onnx(path: Path, model: Vit, tokens: int | str, batch: int) -> Path:
    """Blocks without biases, shapes as in `model`."""
    x, wide = "x", model.heads * model.head_dim
    nodes: list[onnx.NodeProto] = []
    integers: dict[str, Any] = {"split": [0, 0, 3, model.heads, model.head_dim], "join": [0, 0, wide]}
    integers |= {f"index{i}": i for i in range(3)}
    weights = [numpy_helper.from_array(np.array(value), name) for name, value in integers.items()]
    weights += [weight("scale"), weight("gain", model.width)]

    def add(kind: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"t{len(nodes)}"], **attributes))
        return f"t{len(nodes) - 1}"

    for block in range(model.depth):
        sizes = {"qkv": (model.width, 3 * wide), "proj": (wide, model.width)}
        sizes |= {"fc1": (model.width, model.mlp_width), "fc2": (model.mlp_width, model.width)}
        weights += [weight(f"{name}{block}", *size) for name, size in sizes.items()]
        y = add("LayerNormalization", [x, "gain"])
        qkv = add("Reshape", [add("MatMul", [y, f"qkv{block}"]), "split"])
        parts = [add("Gather", [qkv, f"index{i}"], axis=2) for i in range(3)]  # slices: no launch
        q, v = (add("Transpose", [part], perm=[0, 2, 1, 3]) for part in (parts[0], parts[2]))
        q = add("Mul", [q, "scale"])
        scores = add("MatMul", [q, add("Transpose", [parts[1]], perm=[0, 2, 3, 1])])
        out = add("MatMul", [add("Softmax", [scores], axis=-1), v])
        out = add("Reshape", [add("Transpose", [out], perm=[0, 2, 1, 3]), "join"])
        x = add("Add", [x, add("MatMul", [out, f"proj{block}"])])
        y = add("LayerNormalization", [x, "gain"])
        x = add("Add", [x, add("MatMul", [add("Relu", [add("MatMul", [y, f"fc1{block}"])]), f"fc2{block}"])])
    return write(path, nodes, [batch, tokens, model.width], weights)


def test_walk_of_a_trunk_equals_the_formula(tmp_path: Path) -> None:
    model = vit(width=32, heads=4, mlp_width=64, depth=2)
    for tokens, batch in ((70, 1), (33, 3)):
        path = trunk_onnx(tmp_path / "trunk.onnx", model, tokens, batch)
        assert operations_of_onnx(path) == operations_of_trunk(model, tokens, batch)


def test_walk_counts_conv_gemm_quantised_weights_and_launches(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "kernel"], ["patches"], strides=[4, 4]),  # (2, 6, 2, 3)
        node("Conv", ["patches", "grouped"], ["mixed"], group=3, pads=[1, 1, 1, 1]),
        node("Reshape", ["mixed", "rows"], ["flat"]),  # (12, 6)
        node("DequantizeLinear", ["int8", "scale"], ["weights"]),  # (6, 5), constant
        node("MatMul", ["flat", "weights"], ["y"]),
        node("Gemm", ["y", "gemm"], ["g"], transA=1, transB=1),  # (5, 12) · (12, 7)
        node("TopK", ["g", "two"], ["best", "index"]),
        node("GatherElements", ["g", "index"], ["picked"], axis=1),
        node("Gather", ["picked", "zero"], ["column"], axis=1),
        node("MatMul", ["lower", "picked"], ["sums"]),
    ]
    weights = [weight("kernel", 6, 3, 4, 4), weight("grouped", 6, 2, 3, 3), weight("gemm", 7, 12)]
    weights.append(weight("lower", 3, 5))
    weights += [numpy_helper.from_array(np.ones((6, 5), np.int8), "int8"), weight("scale")]
    integers = {"rows": [12, 6], "two": [2], "zero": 0}
    weights += [numpy_helper.from_array(np.array(value), name) for name, value in integers.items()]
    path = write(tmp_path / "mixed.onnx", nodes, [2, 3, 8, 12], weights)
    assert operations_of_onnx(path) == [
        Matmul(12, 6, 48, 1),
        Matmul(12, 2, 18, 3),
        Matmul(12, 5, 6, linear=True, quantises=True),
        Matmul(5, 7, 12),
        Elementwise(5, 7 + 2 + 2),  # TopK reads a row of 7, writes 2 values and 2 indices
        Elementwise(5, 2 + 2 + 2),  # GatherElements reads as many values as indices, and writes them
        Matmul(3, 2, 5),
    ]
    assert flops_of_onnx(path) == 2 * (12 * 6 * 48 + 3 * 12 * 2 * 18 + 12 * 5 * 6 + 5 * 7 * 12 + 3 * 2 * 5)


def test_elementwise_work_is_part_of_a_matmul_or_one_kernel(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Add", ["a", "bias"], ["b"]),  # these three only follow the matmul
        node("Erf", ["b"], ["c"]),
        node("Mul", ["b", "c"], ["d"]),
        node("MatMul", ["d", "w"], ["e"]),
        node("Add", ["e", "x"], ["f"]),  # these three are one kernel that reads e and x and writes f and g
        node("LayerNormalization", ["f", "bias"], ["norm"]),
        node("Mul", ["norm", "bias"], ["g"]),
        node("MatMul", ["g", "w"], ["h"]),
        node("Softmax", ["h"], ["i"]),  # a kernel, as it needs whole rows
        node("MatMul", ["i", "w"], ["j"]),
        node("Add", ["f", "j"], ["k"]),
    ]
    path = write(tmp_path / "fused.onnx", nodes, [2, 3, 4], [weight("w", 4, 4), weight("bias", 4)])
    matmul = Matmul(6, 4, 4, linear=True)
    assert operations_of_onnx(path) == [
        *(matmul, Matmul(6, 4, 4, linear=True, quantises=True), Elementwise(6, 16)),
        *(matmul, Elementwise(6, 8)),
        *(matmul, Elementwise(6, 12)),
    ]


def test_attention_whose_weights_are_read_elsewhere_is_three_kernels(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "scale"], ["q"]),
        node("Transpose", ["x"], ["k"], perm=[0, 2, 1]),
        node("MatMul", ["q", "k"], ["scores"]),
        node("Softmax", ["scores"], ["weights"]),
        node("MatMul", ["weights", "x"], ["out"]),
    ]
    path = write(tmp_path / "fused.onnx", nodes, [2, 3, 4], [weight("scale")])
    assert operations_of_onnx(path) == [Elementwise(6, 8), Attention(3, 3, 4, 2)]
    assert flops_of_onnx(path) == 2 * 2 * 2 * 3 * 3 * 4
    nodes += [node("ReduceMax", ["weights"], ["most"], axes=[1], keepdims=0), node("Add", ["most", "one"], ["y"])]
    path = write(tmp_path / "read.onnx", nodes, [2, 3, 4], [weight("scale"), weight("one")])
    assert operations_of_onnx(path)[:3] == [Elementwise(6, 8), Matmul(3, 3, 4, 2), Elementwise(6, 7)]


def test_dynamic_shape_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    path = trunk_onnx(tmp_path / "trunk.onnx", vit(32, 4, 64, 1), "tokens", 1)
    with pytest.raises(EngineError, match=r"tensor 'x' has no static shape \[1, tokens, 32\]"):
        operations_of_onnx(path)
    with pytest.raises(EngineError, match="'x'"):
        SimulatedRuntime(NANO).compile(path, fp32(), tmp_path / "out.engine")
    assert not (tmp_path / "out.engine").exists()


def test_what_the_model_cannot_cost_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik")]
    path = write(tmp_path / "einsum.onnx", nodes, [2, 3], [weight("w", 3, 4)])
    with pytest.raises(EngineError, match="Einsum"):
        operations_of_onnx(path)
    nodes = [helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")]
    path = write(tmp_path / "fused.onnx", nodes, [2, 3], [weight("w", 3, 4)])
    with pytest.raises(EngineError, match="FusedMatMul"):
        operations_of_onnx(path)
    nodes = [helper.make_node("Gather", ["x"], ["y"])]
    with pytest.raises(EngineError, match=r"half\.onnx: cannot be read as ONNX"):
        operations_of_onnx(write(tmp_path / "half.onnx", nodes, [2, 3], []))
    path.write_bytes(b"no ONNX at all")
    with pytest.raises(EngineError, match="cannot be read as ONNX"):
        operations_of_onnx(path)
    with pytest.raises(EngineError, match="cannot be read as ONNX"):
        operations_of_onnx(tmp_path / "absent.onnx")


def fp32(batch: int = 1) -> Setup:
    return SimulatedRuntime(NANO).setup(NANO, "fp32", batch)


def test_setup_says_that_it_is_simulated() -> None:
    setup = fp32(3)
    assert setup.simulated and setup.machine == "Jetson Orin Nano 8GB Super (simulated)"
    assert (setup.device, setup.precision, setup.batch) == ("orin-nano", "fp32", 3)


def test_runtime_compiles_times_and_infers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = vit(32, 4, 64, 1)
    source = trunk_onnx(tmp_path / "trunk.onnx", model, 20, 2)
    runtime, out = runtime_for(NANO, simulate=True), tmp_path / "new" / "trunk.engine"
    runtime.compile(source, fp32(2), out)
    assert out.read_bytes() == source.read_bytes()
    with runtime.open(out, fp32(2)) as session:
        assert session.time_ms() == session.time_ms() == trunk_ms(NANO, model, 20, "fp32", 2)
        pixels = np.random.default_rng(0).standard_normal((2, 20, 32), dtype=np.float32)
        assert not np.allclose(session.infer(pixels), pixels)
        with pytest.raises(EngineError, match=r"input is \[1, 20, 32\]: pass \[2, 20, 32\]"):
            session.infer(np.ones((1, 20, 32), np.float32))


def test_inference_without_onnx_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = trunk_onnx(tmp_path / "trunk.onnx", vit(32, 4, 64, 1), 20, 1)
    with SimulatedRuntime(NANO).open(path, fp32()) as session:
        assert session.time_ms() > 0
        with pytest.raises(MissingError, match=r'pip install "\.\[ort\]"'):
            session.infer(np.ones((1, 20, 32), np.float32))


def test_compile_where_nothing_can_be_written(tmp_path: Path) -> None:
    path = trunk_onnx(tmp_path / "trunk.onnx", vit(32, 4, 64, 1), 20, 1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        SimulatedRuntime(NANO).compile(path, fp32(), tmp_path / "file" / "out.engine")

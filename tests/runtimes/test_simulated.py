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
from edgeprune.io import sha256_file
from edgeprune.onnx_graph.matmuls import LAUNCH, Matmul, matmuls_of_onnx
from edgeprune.records import Device, Setup, Vit
from edgeprune.runtimes import runtime_for
from edgeprune.runtimes.simulated import (
    SimulatedMatmuls,
    SimulatedRuntime,
    latency_ms,
    matmuls_of_ends,
    matmuls_of_trunk,
)

NANO = load_device("orin-nano")  # 8 SM, 1020 MHz, 1024 fp16 and 128 fp32 FMA, 102 GB/s, tile 64 × 64, 5 µs


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
    return SimulatedMatmuls(matmuls_of_trunk(model, tokens, batch), device, precision).time_ms()


def treads(points: dict[int, float]) -> list[int]:
    """Token counts whose next neighbour costs more, and the last."""
    return [n for n in points if n + 1 not in points or points[n + 1] > points[n]]


def test_one_product_by_hand() -> None:
    def time_us(product: Matmul, precision: str = "fp16") -> float:
        return latency_ms([product], NANO, precision) * 1e3

    def launch_and(us: float) -> object:
        return pytest.approx(5 + us, rel=1e-6)

    # qkv of ViT-Tiny: ceil(197/64) * ceil(576/64) = 4 * 9 = 36 tiles, ceil(36/8) = 5 waves,
    # 5 * 64 * 64 * 192 = 3932160 FMA per SM at 1024 * 1020 per µs: 3.764706 µs;
    # weights 192 * 576 * 2 bytes = 221184 at 102000 per µs: 2.168471 µs, hidden behind the maths
    qkv = Matmul(197, 576, 192, weight=True)
    assert time_us(qkv) == launch_and(3.764706)
    # one row: 9 tiles, 2 waves, 1.505882 µs of maths: the weights' 2.168471 µs decide, if there are any
    assert time_us(Matmul(1, 576, 192, weight=True)) == launch_and(2.168471)
    assert time_us(Matmul(1, 576, 192)) == launch_and(1.505882)
    # weights · V of 3 heads: 4 * 1 * 3 = 12 tiles, 2 waves, inner 197 in slices of 64 is 256: 2.007843 µs
    attended = Matmul(197, 64, 197, 3)
    assert time_us(attended) == launch_and(2.007843)
    # at int8 the same, since only linear layers are quantised; at fp32 8 times the maths
    assert time_us(attended, "int8") == launch_and(2.007843)
    assert time_us(attended, "fp32") == launch_and(16.062745)
    assert time_us(qkv, "int8") == launch_and(1.882353)
    assert time_us(LAUNCH) == launch_and(0)
    assert latency_ms([qkv, LAUNCH], NANO, "fp16") == pytest.approx(13.764706e-3, rel=1e-6)


def test_trunk_by_hand() -> None:
    assert matmuls_of_trunk(vit(depth=1), 100, batch=2) == [
        Matmul(200, 576, 192, 1, True),
        Matmul(100, 100, 64, 6, False),
        Matmul(100, 64, 100, 6, False),
        Matmul(200, 192, 192, 1, True),
        Matmul(200, 768, 192, 1, True),
        Matmul(200, 192, 768, 1, True),
    ]
    assert matmuls_of_trunk(vit(depth=2, matrices=3), 100, 2)[4] == Matmul(200, 1536, 192, 1, True)
    assert len(matmuls_of_trunk(vit(depth=7), 100, 2)) == 42
    assert matmuls_of_ends(vit(), 2) == [Matmul(392, 192, 768, 1, True), Matmul(2, 1000, 192, 1, True)]


@pytest.mark.parametrize(
    ("device", "model", "batch", "expected"),
    [
        ("orin-nano", vit(), 1, [64, 128, 192, 197]),
        ("orin-nano", vit(), 4, [32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 197]),
        ("agx-orin", vit(384, 6, 1536), 4, [32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 197]),
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
    known = "agx-orin, jetson-thor, jetson-tx2, orin-nano, orin-nx"
    with pytest.raises(DeviceError, match=f"device {name} has no simulation.*{known}"):
        latency_ms([LAUNCH], device, "fp16")
    with pytest.raises(DeviceError, match=known):
        runtime_for(device, simulate=True).setup(device, "fp16", 1)


def test_unknown_precision() -> None:
    with pytest.raises(DeviceError, match="no rate for 'fp8': choose fp32, fp16, int8"):
        latency_ms([LAUNCH], NANO, "fp8")


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.full(shape, 0.01, np.float32), name)


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
    """Blocks of MatMuls, reshapes and transposes only, shapes as in `model`."""
    x, wide = "x", model.heads * model.head_dim
    nodes: list[onnx.NodeProto] = []
    integers: dict[str, Any] = {"split": [0, 0, 3, model.heads, model.head_dim], "join": [0, 0, wide]}
    integers |= {f"index{i}": i for i in range(3)}
    weights = [numpy_helper.from_array(np.array(value), name) for name, value in integers.items()]

    def add(kind: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"t{len(nodes)}"], **attributes))
        return f"t{len(nodes) - 1}"

    for block in range(model.depth):
        sizes = {"qkv": (model.width, 3 * wide), "proj": (wide, model.width)}
        sizes |= {"fc1": (model.width, model.mlp_width), "fc2": (model.mlp_width, model.width)}
        weights += [weight(f"{name}{block}", *size) for name, size in sizes.items()]
        qkv = add("Reshape", [add("MatMul", [x, f"qkv{block}"]), "split"])
        parts = [add("Gather", [qkv, f"index{i}"], axis=2) for i in range(3)]  # slices: no launch
        q, v = (add("Transpose", [part], perm=[0, 2, 1, 3]) for part in (parts[0], parts[2]))
        scores = add("MatMul", [q, add("Transpose", [parts[1]], perm=[0, 2, 3, 1])])
        out = add("MatMul", [add("Softmax", [scores], axis=-1), v])
        out = add("Reshape", [add("Transpose", [out], perm=[0, 2, 1, 3]), "join"])
        x = add("Add", [x, add("MatMul", [out, f"proj{block}"])])
        x = add("Add", [x, add("MatMul", [add("Relu", [add("MatMul", [x, f"fc1{block}"])]), f"fc2{block}"])])
    return write(path, nodes, [batch, tokens, model.width], weights)


def test_walk_of_a_trunk_equals_the_formula(tmp_path: Path) -> None:
    model = vit(width=32, heads=4, mlp_width=64, depth=2)
    for tokens, batch in ((70, 1), (33, 3)):
        path = trunk_onnx(tmp_path / "trunk.onnx", model, tokens, batch)
        assert matmuls_of_onnx(path) == matmuls_of_trunk(model, tokens, batch)


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
    ]
    weights = [weight("kernel", 6, 3, 4, 4), weight("grouped", 6, 2, 3, 3), weight("gemm", 7, 12)]
    weights += [numpy_helper.from_array(np.ones((6, 5), np.int8), "int8"), weight("scale")]
    integers = {"rows": [12, 6], "two": [2], "zero": 0}
    weights += [numpy_helper.from_array(np.array(value), name) for name, value in integers.items()]
    path = write(tmp_path / "mixed.onnx", nodes, [2, 3, 8, 12], weights)
    assert matmuls_of_onnx(path) == [
        Matmul(12, 6, 48, 1, True),
        Matmul(12, 2, 18, 3, True),
        Matmul(12, 5, 6, 1, True),
        Matmul(5, 7, 12, 1, True),
        LAUNCH,
        LAUNCH,
    ]


def test_dynamic_shape_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    path = trunk_onnx(tmp_path / "trunk.onnx", vit(32, 4, 64, 1), "tokens", 1)
    with pytest.raises(EngineError, match=r"tensor 'x' has no static shape \[1, tokens, 32\]"):
        matmuls_of_onnx(path)
    with pytest.raises(EngineError, match="'x'"):
        SimulatedRuntime(NANO).compile(path, fp32(), tmp_path / "out.engine")
    assert not (tmp_path / "out.engine").exists()


def test_what_the_model_cannot_cost_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik")]
    path = write(tmp_path / "einsum.onnx", nodes, [2, 3], [weight("w", 3, 4)])
    with pytest.raises(EngineError, match="Einsum"):
        matmuls_of_onnx(path)
    nodes = [helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")]
    path = write(tmp_path / "fused.onnx", nodes, [2, 3], [weight("w", 3, 4)])
    with pytest.raises(EngineError, match="FusedMatMul"):
        matmuls_of_onnx(path)
    nodes = [helper.make_node("Gather", ["x"], ["y"])]
    with pytest.raises(EngineError, match=r"half\.onnx: cannot be read as ONNX"):
        matmuls_of_onnx(write(tmp_path / "half.onnx", nodes, [2, 3], []))
    path.write_bytes(b"no ONNX at all")
    with pytest.raises(EngineError, match="cannot be read as ONNX"):
        matmuls_of_onnx(path)
    with pytest.raises(EngineError, match="cannot be read as ONNX"):
        matmuls_of_onnx(tmp_path / "absent.onnx")


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
    engine = runtime.compile(source, fp32(2), out)
    assert (engine.path, engine.sha256) == (out.name, sha256_file(out))
    assert engine.onnx_sha256 == sha256_file(source)
    assert engine.size_bytes == source.stat().st_size
    with runtime.open(out, fp32(2)) as session:
        assert session.time_ms() == session.time_ms() == trunk_ms(NANO, model, 20, "fp32", 2)
        assert not np.array_equal(session.infer(np.ones((2, 20, 32), np.float32)), np.ones((2, 20, 32)))
        with pytest.raises(EngineError, match=r"input is \[1, 20, 32\]: pass \[2, 20, 32\]"):
            session.infer(np.ones((1, 20, 32), np.float32))


def test_inference_without_onnx_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = trunk_onnx(tmp_path / "trunk.onnx", vit(32, 4, 64, 1), 20, 1)
    with SimulatedRuntime(NANO).open(path, fp32()) as session:
        assert session.time_ms() > 0
        with pytest.raises(MissingError, match=r'pip install "edgeprune\[ort\]"'):
            session.infer(np.ones((1, 20, 32), np.float32))


def test_compile_where_nothing_can_be_written(tmp_path: Path) -> None:
    path = trunk_onnx(tmp_path / "trunk.onnx", vit(32, 4, 64, 1), 20, 1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        SimulatedRuntime(NANO).compile(path, fp32(), tmp_path / "file" / "out.engine")

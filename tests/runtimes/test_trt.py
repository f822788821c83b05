"""The TensorRT runtime against a fake one: calls in order, errors by name, what is kept; see support/fake_trt.py."""

from __future__ import annotations

import atexit
import ctypes
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.builds import Shallow, few_digits
from support.fake_trt import Fake
from support.trt_files import converted, of_node

from edgeprune.devices import load_device, parse
from edgeprune.errors import DeviceError, EngineError, MissingError, RecordError
from edgeprune.onnx_graph import attention_fusion as fusion
from edgeprune.onnx_graph.fp16 import fp16
from edgeprune.records import Schedule, Setup, TrtOptions, Vit
from edgeprune.runtimes import runtime_for
from edgeprune.runtimes.trt import TensorRT, changed_options, fits
from edgeprune.runtimes.trt_builder import fusion_of

SETUP = Setup(device="cuda", machine="Orin", runtime="trt", runtime_version="1", precision="fp32", batch=1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake().install(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small classifier as ONNX."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((12, 5), dtype=np.float32), "weight")
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"], name="head"),
    ]
    entering = helper.make_tensor_value_info("images", TensorProto.FLOAT, [2, 3, 2, 2])
    leaving = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [2, 5])
    graph = helper.make_graph(nodes, "model", [entering], [leaving], [weight])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def runtime(**options: Any) -> TensorRT:
    import msgspec

    device = msgspec.structs.replace(load_device("cuda"), trt=TrtOptions(**options) if options else None)
    found = runtime_for(device)
    assert isinstance(found, TensorRT)
    return found


def test_compile_open_infer_time(fake: Fake, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines" / "model.engine"
    seen: list[tuple[str, int, int]] = []
    runtime().compile(model, SETUP, out, lambda what, done, of: seen.append((what, done, of)))
    assert seen == [("TensorRT: tactics", step, 3) for step in range(3)]
    assert fake.network_flags == [1 << 1] and fake.configs[0].flags == set()  # strongly typed, no TF32
    assert fake.configs[0].pools == {"WORKSPACE": 2 << 30}
    images = np.random.default_rng(1).standard_normal((2, 3, 2, 2), dtype=np.float32)
    wanted = ort.InferenceSession(os.fspath(model)).run(None, {"images": images})[0]
    with runtime().open(out, SETUP) as session:
        before = session.time_ms()
        np.testing.assert_allclose(session.infer(images), wanted, rtol=1e-6)
        assert min(before, session.time_ms()) >= 0
        assert session.fused_attention() == 1
        with pytest.raises(EngineError, match=r"takes \(2, 3, 2, 2\), got \(1, 3, 2, 2\)"):
            session.infer(images[:1])
    assert fake.memory == {}, "memory was not freed"


def test_what_is_kept_beside_a_plan(fake: Fake, model: Path, tmp_path: Path) -> None:
    """One timing cache for all engines of a folder, a log for each; a cache of another TensorRT is replaced."""
    for name in ("a", "b"):
        runtime().compile(model, SETUP, tmp_path / f"{name}.engine")
    [cache] = tmp_path.glob("timing-*.cache")
    assert cache.read_bytes() == b"tt" and (tmp_path / "a.log").exists()
    cache.write_bytes(b"foreign")
    runtime().compile(model, SETUP, tmp_path / "c.engine")
    assert cache.read_bytes() == b"t"


def test_options_reach_the_builder(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    fake = Fake("8.6.2").install(monkeypatch)
    options = {
        "optimization_level": 4,
        "workspace_mib": 100,
        "tactic_sources": ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
    }
    runtime(**options).compile(model, SETUP, tmp_path / "out.engine")
    config = fake.configs[0]
    assert config.builder_optimization_level == 4 and config.pools == {"WORKSPACE": 100 << 20}
    assert config.tactics == 1 << 3 | 1 << 4
    assert config.previews == {"DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"}
    assert changed_options(TrtOptions(**options)) == (
        "optimization_level=4 workspace_mib=100 tactic_sources=('EDGE_MASK_CONVOLUTIONS', 'JIT_CONVOLUTIONS')"
    )
    assert changed_options(TrtOptions()) is None
    with pytest.raises(EngineError, match="no tactic source CUBLAS"):
        runtime(tactic_sources=("CUBLAS",)).compile(model, SETUP, tmp_path / "out.engine")


@pytest.mark.parametrize(
    ("version", "typing", "held", "flags", "network"),
    [
        ("8.6.2", "strong", "fp16", {"FP16"}, 1),
        ("8.6.2", "strong", "int8-fp16", {"FP16", "INT8"}, 1),
        ("8.6.2", "strong", "fp32", set(), 1),
        ("10.3.0", "strong", "fp16", set(), 2),
        ("10.3.0", "weak", "fp16", {"FP16"}, 1),
    ],
)
def test_precision_lies_in_the_onnx_and_flags_follow(
    version: str, typing: str, held: str, flags: set[str], network: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Flags are those of the file, whatever the setup: the fp32 model that INT8 is compared with stays fp32."""
    weight = np.ones((16, 16), np.float32)
    product = of_node(helper.make_node("MatMul", ["x", "w"], ["y"], "layer"), [16, 16], w=weight)
    onnx.save(converted(product, held), tmp_path / "model.onnx")
    for precision in ("fp32", "fp16", "int8"):
        fake = Fake(version).install(monkeypatch)
        setup = msgspec.structs.replace(SETUP, precision=precision)
        runtime(typing=typing).compile(tmp_path / "model.onnx", setup, tmp_path / "out.engine")
        assert fake.configs[0].flags == flags and fake.network_flags == [network]


def test_workspace_is_part_of_the_setup(fake: Fake, model: Path, tmp_path: Path) -> None:
    """Tactics depend on it: what other programs hold now must not change it, but a build without room is refused."""
    fake.total_bytes, cuda = 7 << 30, load_device("cuda")
    fake.free_bytes = 2 << 30
    setup = runtime().setup(cuda, "fp32", 1)
    assert setup.workspace_mib == 1792, "a quarter, in steps of 256 MiB"
    fake.free_bytes = 6 << 30
    assert runtime().setup(cuda, "fp32", 1) == setup
    assert runtime(workspace_mib=300).setup(cuda, "fp32", 1).workspace_mib == 300
    runtime().compile(model, setup, tmp_path / "out.engine")
    assert fake.configs[0].pools == {"WORKSPACE": 1792 << 20}
    fake.free_bytes = 1000 << 20
    with pytest.raises(EngineError, match="only 1000 MiB of GPU memory are free, and the builder may use 1792 MiB"):
        runtime().compile(model, setup, tmp_path / "out.engine")


def test_free_memory_of_a_jetson_is_what_the_kernel_can_give(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA calls memory that holds cached files not free; a GPU with its own memory is asked itself."""
    monkeypatch.setattr("edgeprune.runtimes.trt.available_bytes", lambda: 5 << 30)
    assert runtime().free_bytes() == 4 << 30
    fake.integrated = True
    assert runtime().free_bytes() == 5 << 30


def test_a_build_on_a_jetson_needs_memory_for_the_builder_and_the_weights(
    fake: Fake, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the memory that the GPU uses; elsewhere they are not."""
    needed = (2048 + 1536 << 20) + 3 * model.stat().st_size
    monkeypatch.setattr("edgeprune.runtimes.trt.available_bytes", lambda: needed - 1)
    fake.free_bytes = 2 << 30
    runtime().compile(model, SETUP, tmp_path / "out.engine")
    fake.integrated = True
    with pytest.raises(
        EngineError, match=r"only 3584 MiB .* may use 3584 MiB \(a workspace of 2048, .*lower workspace"
    ):
        runtime().compile(model, SETUP, tmp_path / "out.engine")
    monkeypatch.setattr("edgeprune.runtimes.trt.available_bytes", lambda: needed)
    runtime().compile(model, SETUP, tmp_path / "out.engine")


def test_timings_of_tactics_belong_to_a_power_mode(fake: Fake, model: Path, tmp_path: Path) -> None:
    for mode in ("MAXN", "MAXN, clocks locked", None):
        runtime().compile(model, msgspec.structs.replace(SETUP, power_mode=mode), tmp_path / "out.engine")
    assert len([*tmp_path.glob("timing-*.cache")]) == 3


def test_the_timed_inference_is_queued_while_the_gpu_is_busy(fake: Fake, model: Path, tmp_path: Path) -> None:
    """On an idle stream the first event passes at once, and the launch is in every sample."""
    runtime().compile(model, SETUP, tmp_path / "out.engine")
    with runtime().open(tmp_path / "out.engine", SETUP) as session:
        session.time_ms()
        for call, wanted in (
            (session.time_ms, ["launch", "event", "launch", "event", "wait"]),
            (session.end_to_end_ms, 2 * ["copy in", "launch", "copy out", "wait"]),
        ):
            fake.calls.clear()
            assert call() >= 0
            assert fake.calls == wanted


def test_errors_of_cuda_are_one_line(fake: Fake, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.engine"
    runtime().compile(model, SETUP, out)
    fake.fail_cuda = "cuMemAlloc"
    with pytest.raises(EngineError, match=r"CUDA failed \(cuMemAlloc failed: out of memory\): close other programs"):
        runtime().open(out, SETUP)
    fake.fail_cuda = ""
    with pytest.raises(EngineError, match="CUDA failed"), runtime().open(out, SETUP) as session:
        fake.fail_cuda = "cuEventSynchronize"
        session.time_ms()


def test_one_logger_for_all_builds_and_plans(fake: Fake, model: Path, tmp_path: Path) -> None:
    """TensorRT keeps the first that it is given: the errors of a second build went to the logger of the first."""
    out = tmp_path / "out.engine"
    runtime().compile(model, SETUP, out)
    fake.fail_build = ["Something else"]
    with pytest.raises(EngineError, match="could not build it: Something else"):
        runtime().compile(model, SETUP, tmp_path / "other.engine")
    assert len(set(map(id, fake.loggers))) == 1
    assert "Something else" not in out.with_suffix(".log").read_text()


def test_a_build_that_fails_in_the_fusion_of_attention_is_tried_at_another_level(
    fake: Fake, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """NVIDIA/TensorRT#3930."""
    node = "Could not find any implementation for node {ForeignNode[a...b]}."
    fake.fail_build = ["mha_fusion.cpp:344: DCHECK(fc1_ && fc2_ && softmax_) failed.", node]
    fake.fail_levels = (None,)
    with caplog.at_level(logging.WARNING):
        runtime().compile(model, SETUP, tmp_path / "out.engine")
    assert fake.configs[0].builder_optimization_level == 2
    assert "building at optimization level 2" in caplog.text
    assert "built again at optimization level 2" in (tmp_path / "out.log").read_text()
    fake.fail_levels = (0, 3)
    with pytest.raises(EngineError, match="there is no kernel for a layer"):
        runtime(optimization_level=0).compile(model, SETUP, tmp_path / "none.engine")
    assert fake.configs[-1].builder_optimization_level == 3


@pytest.mark.parametrize(("version", "known"), [("8.6.2", None), ("10.3.0", 0)])
def test_no_fused_attention_on_8_means_nothing(
    version: str, known: int | None, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    """Its inspector hides the kernels of a fused region (NVIDIA/TensorRT#3243)."""
    fake = Fake(version).install(monkeypatch)
    runtime().compile(model, SETUP, tmp_path / "out.engine")
    with runtime().open(tmp_path / "out.engine", SETUP) as session:
        assert session.fused_attention() == 1
        fake.layers = [{"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin"}]
        assert session.fused_attention() == known


def test_parser_errors_name_the_nodes(fake: Fake, model: Path, tmp_path: Path) -> None:
    fake.fail_parse = {1: "no such product", 99: "beyond"}
    with pytest.raises(EngineError, match=r"node head \(MatMul\): no such product; beyond"):
        runtime().compile(model, SETUP, tmp_path / "out.engine")
    assert not (tmp_path / "out.engine").exists() and (tmp_path / "out.log").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[allocator.cpp] Out of memory (requested 5)", "memory ran out"),
        ("Could not find any implementation for node head", "there is no kernel for a layer"),
        ("Something else", "Something else"),
    ],
)
def test_a_failed_build_says_why(line: str, reason: str, fake: Fake, model: Path, tmp_path: Path) -> None:
    fake.fail_build = [line]
    with pytest.raises(
        EngineError, match=f"could not build it: {reason}: workspace 2048 MiB, 4096 MiB of GPU memory free"
    ):
        runtime().compile(model, SETUP, tmp_path / "out.engine")
    assert line in (tmp_path / "out.log").read_text() and not (tmp_path / "out.engine").exists()


def test_interrupt_stops_a_build(fake: Fake, model: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime().compile(model, SETUP, tmp_path / "out.engine", interrupt)
    assert not (tmp_path / "out.engine").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("version", "steps"), [("8.6.2", 0), ("10.3.0", 1)])
def test_a_signal_during_a_build_is_not_swallowed(
    version: str, steps: int, number: signal.Signals, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives in a callback, where TensorRT's bindings catch every exception; 8.6 has no progress monitor."""
    fake = Fake(version).install(monkeypatch)
    fake.while_building = lambda: signal.raise_signal(number)
    seen: list[int] = []
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            runtime().compile(model, SETUP, tmp_path / "out.engine", lambda what, done, of: seen.append(done))
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert len(seen) == steps and not (tmp_path / "out.engine").exists()


def test_a_signal_that_is_ignored_stays_ignored(fake: Fake, model: Path, tmp_path: Path) -> None:
    fake.while_building = lambda: signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        runtime().compile(model, SETUP, tmp_path / "out.engine")
    finally:
        signal.signal(signal.SIGINT, before)


def test_foreign_and_broken_plans_are_refused_by_name(
    fake: Fake, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tmp_path / "out.engine"
    runtime().compile(model, SETUP, plan)
    content = plan.read_bytes()
    for broken in (content[:-5], content[:3], b"", b"ONNX" + content):
        plan.write_bytes(broken)
        with pytest.raises(EngineError, match="it is truncated or not a plan: compile the ONNX again"):
            runtime().open(plan, SETUP)
    plan.write_bytes(content)
    fake.capability = (7, 2)
    with pytest.raises(EngineError, match="built for another GPU: compile the ONNX here"):
        runtime().open(plan, SETUP)
    fake.capability, fake.gpu = (8, 7), "Orin of another size"
    with caplog.at_level(logging.WARNING), runtime().open(plan, SETUP):
        assert "built on another model of GPU" in caplog.text
    caplog.clear()
    same = msgspec.structs.replace(SETUP, gpu=fake.gpu, sm_count=8, compute_capability="8.7")
    with caplog.at_level(logging.WARNING), runtime().open(plan, same):
        assert "another model" not in caplog.text, "TensorRT says it of the board that built the plan, too"
    fake.gpu = "Orin"
    Fake("10.9.0").install(monkeypatch)
    with pytest.raises(EngineError, match=r"10\.9\.0 refuses it: it was built for another TensorRT version"):
        runtime().open(plan, SETUP)


def test_the_context_is_popped_at_exit(fake: Fake, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pycuda's `~context_stack` aborts the process otherwise: every command would end with SIGABRT."""
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    for name in ("a", "b"):
        runtime().compile(model, SETUP, model.with_name(f"{name}.engine"))
    assert fake.contexts == 1
    [leave] = at_exit
    leave()
    assert fake.contexts == 0


def test_the_context_is_current_in_every_thread_that_uses_the_gpu(fake: Fake, model: Path) -> None:
    """A context belongs to a thread; an actor of Ray runs builds on changing ones."""
    runtime().compile(model, SETUP, model.with_name("a.engine"))
    inside: list[int] = []

    def other() -> None:
        runtime().compile(model, SETUP, model.with_name("b.engine"))
        inside.append(fake.contexts)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert inside == [2] and fake.contexts == 1, "popped when the thread ends, or pycuda aborts the process"


def test_without_tensorrt_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake("8.5.3").install(monkeypatch)
    with pytest.raises(EngineError, match=r"8\.5\.3 is too old \(JetPack 5 or before\): upgrade"):
        runtime().setup(load_device("cuda"), "fp32", 1)
    fake = Fake().install(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingError, match="TensorRT is missing"):
        TensorRT(load_device("cuda")).setup(load_device("cuda"), "fp32", 1)
    fake.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "edgeprune.runtimes.cuda_python", None)
    with pytest.raises(MissingError, match=r"pycuda is missing .*without nvcc, pip install cuda-bindings"):
        runtime().compile(Path("x.onnx"), SETUP, Path("x.engine"))


def test_a_gpu_without_tensorrt_runs_on_onnx_runtime_and_says_so(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with caplog.at_level(logging.WARNING):
        found = runtime_for(load_device("cuda"))
    assert type(found).__name__ == "OrtRuntime" and "TensorRT is not installed" in caplog.text
    assert isinstance(runtime_for(load_device("orin-nano")), TensorRT), "a board has TensorRT from JetPack"


def test_setup_names_what_latencies_depend_on(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = runtime(workspace_mib=64).setup(load_device("cuda"), "fp32", 2)
    assert (setup.runtime, setup.runtime_version, setup.options) == ("trt", "10.3.0", "workspace_mib=64")
    assert setup.machine.endswith(", Orin")
    assert (setup.gpu, setup.sm_count, setup.compute_capability) == ("Orin", 8, "8.7")
    Fake("8.6.1").install(monkeypatch)
    thor = load_device("jetson-thor")
    monkeypatch.setattr("edgeprune.devices.this_machine", lambda gpu=None: "NVIDIA Jetson Thor")
    with pytest.raises(DeviceError, match=r"needs TensorRT >=10\.13, this is 8\.6\.1: install JetPack 7"):
        runtime_for(thor).setup(thor, "fp32", 1)


@pytest.mark.parametrize(
    ("version", "wanted", "fit"),
    [
        ("8.6", ">=8.6,<11", True),
        ("8.6.1.6", ">=8.6,<11", True),
        ("10.3.0", ">=8.6,<11", True),
        ("10.13.3.9.post1", ">=10.13", True),
        ("10.0.0b6", ">=8.6", True),
        ("10.9.0.34", ">=10.13", False),
        ("11.0.0", ">=8.6,<11", False),
        ("8.5", ">=8.6", False),
    ],
)
def test_fits(version: str, wanted: str, fit: bool) -> None:
    assert fits(version, wanted) is fit


@pytest.mark.parametrize("wanted", ["8.6", ">=8.6 <11", "JetPack 6", ">=x"])
def test_a_bad_range_of_versions_is_refused(wanted: str) -> None:
    with pytest.raises(DeviceError, match="is not a range of versions: write it as"):
        fits("8.6", wanted)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("dla_core = 0", "DLA has no LayerNorm"),
        ('typing = "loose"', "strong or weak"),
        ("optimization_level = 9", "0 to 5"),
        ("workspace_mib = 0", "workspace_mib is not above 0"),
        ("speed = 1", "speed"),
    ],
)
def test_builder_options_of_a_device_file_are_checked(line: str, reason: str) -> None:
    text = f'name = "mine"\ntitle = "Mine"\nruntime = "trt"\n[trt]\n{line}\n'
    with pytest.raises(RecordError, match=reason):
        parse(text.encode(), "mine.toml")


def test_fusion_is_counted_in_either_schema() -> None:
    old = {"Layers": [{"Name": "x", "TacticName": "sm80_mha_v2"}, {"Name": "y"}], "Bindings": ["images"]}
    new = {"Layers": [{"Name": "_gemm_mha_v2_myl", "LayerType": "kgen"}, {"Name": "y"}], "I/O Tensors": []}
    for text in (old, new):
        fusion = fusion_of(json.dumps(text))
        assert fusion is not None and (fusion.fused, fusion.layers) == (1, 2)
    assert fusion_of(json.dumps({"Layers": ["x", "y"]})) is None


class Libcuda:
    """A stand-in for libcuda.so.1 that records calls; one function may fail."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.calls = failing, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            self.calls.append(name)
            return 900 if name == self.failing else 0

        return call


def test_a_cuda_graph_is_launched_and_freed(
    fake: Fake, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libcuda = Libcuda()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libcuda)
    runtime().compile(model, SETUP, tmp_path / "out.engine")
    with runtime().open(tmp_path / "out.engine", SETUP) as session:
        launched = fake.launches
        session.time_ms()
        assert fake.launches == launched and session.cuda_graph, "the graph was not used"
    assert libcuda.calls[-2:] == ["cuGraphLaunch", "cuGraphExecDestroy"]
    assert libcuda.calls.index("cuStreamBeginCapture_v2") < libcuda.calls.index("cuStreamEndCapture")


@pytest.mark.parametrize("failing", ["cuStreamEndCapture", "cuGraphInstantiateWithFlags"])
def test_where_capture_fails_kernels_are_launched_one_by_one(
    failing: str, fake: Fake, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    libcuda = Libcuda(failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libcuda)
    runtime().compile(model, SETUP, tmp_path / "out.engine")
    with caplog.at_level(logging.WARNING), runtime().open(tmp_path / "out.engine", SETUP) as session:
        launched = fake.launches
        session.time_ms()
        assert fake.launches == launched + 2, "an untimed one and a timed one"
    assert f"no CUDA graph ({failing}: CUDA error 900)" in caplog.text


def test_lost_fusion_is_reported(
    fake: Fake, make_vit: Callable[..., Vit], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two blocks whose attention could be fused, one layer that the inspector calls fused."""
    node, nodes = helper.make_node, []
    for block in range(2):
        names = {n: f"{n}{block}" for n in ("scaled", "scores", "weights", "out")}
        nodes += [
            node("Mul", ["x", "half"], [names["scaled"]]),
            node("MatMul", [names["scaled"], "x"], [names["scores"]]),
            node("Softmax", [names["scores"]], [names["weights"]]),
            node("MatMul", [names["weights"], "x"], [names["out"]]),
        ]
    nodes.append(node("Add", ["out0", "out1"], ["y"]))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in ("x", "y")]
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    graph = helper.make_graph(nodes, "two", values[:1], values[1:], [half])
    path = tmp_path / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    runtime().compile(path, SETUP, tmp_path / "two.engine")
    halved = tmp_path / "halved.onnx"
    onnx.save(fp16(onnx.load(path)), halved)
    half_setup = msgspec.structs.replace(SETUP, precision="fp16")
    two = Schedule(vit=make_vit(depth=2), method="none", policy="search", tokens=(197, 197))
    assert fusion.expected(halved, two, half_setup) == 2 and fusion.expected(path, two, SETUP) == 0
    assert not caplog.text
    three = Schedule(vit=make_vit(depth=3), method="none", policy="search", tokens=(197,) * 3)
    fusion.expected(halved, three, half_setup)
    assert "1 of the 3 blocks without a cut" in caplog.text
    with runtime().open(tmp_path / "two.engine", SETUP) as session:
        for precision, warned in (("fp32", False), ("fp16", True)):
            fusion.warn_if_lost(session.fused_attention(), 2, precision)
            assert ("fused 1 of 2 attention layers" in caplog.text) is warned
        caplog.clear()
        fake.layers.append({"Name": "c", "TacticName": "fmha_v2"})
        fusion.warn_if_lost(session.fused_attention(), 2, "fp16")
        assert "without a cut" not in caplog.text


def test_whole_build_and_bench(fake: Fake, shallow: Shallow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline of `build --device cuda`: every probe compiled, the plan beside its ONNX in the bundle."""
    from edgeprune.benchmark.bench import bench_bundles
    from edgeprune.bundles.format import load_bundle
    from edgeprune.bundles.triton import triton_entry
    from edgeprune.pipeline.build import build
    from edgeprune.pipeline.compile import Inputs, compile_onnx
    from edgeprune.pipeline.context import Options
    from edgeprune.runtimes.target import target_for
    from edgeprune.scheduling.goals import Goal

    monkeypatch.setattr("edgeprune.latency.profiling.ROUNDS", 3)
    options = Options(
        model=shallow.model, images=few_digits(tmp_path / "digits"), device="cuda", method="topk", policy="paper",
        block=1, goal=Goal(alpha=0.1), rounds=5, neighbours=0, search_images=16,
        work=shallow.work(tmp_path / "work"), out=tmp_path / "bundle",
    )  # fmt: skip
    built = build(options)
    manifest = load_bundle(built.path)
    assert {"model.engine", "model.onnx", "build.log", "device.json"} <= set(manifest.files)
    assert manifest.engine.path == "model.engine" and manifest.engine.setup.runtime == "trt"
    assert manifest.engine.onnx_sha256 == manifest.files["model.onnx"] != manifest.engine.sha256
    assert len(list((tmp_path / "work").glob("timing-*.cache"))) == 1
    launches, compiled = fake.launches, len(fake.configs)
    assert build(options).manifest == manifest and len(fake.configs) == compiled, "engines were built twice"
    [row] = bench_bundles([built.path], 5).rows
    assert row.setup.runtime == "trt" and fake.launches > launches
    assert manifest.report.latency.cuda_graph is row.latency.cuda_graph is False  # the fake GPU has no graphs
    entry = triton_entry(built.path, tmp_path / "repository")
    assert "optimization { cuda { graphs: true } }" in (entry / "config.pbtxt").read_text()
    before = len(fake.configs)
    again = Inputs(built.path / "model.onnx", rounds=5, out=tmp_path / "again")
    _, rebuilt = compile_onnx(target_for("cuda", work=tmp_path / "other"), again)
    assert len(fake.configs) == before + 1 and rebuilt.engine.onnx_sha256 == manifest.engine.onnx_sha256
    assert rebuilt.schedule == manifest.schedule and rebuilt.report.speedup is None
    bytes_of_tensors = 4 * (3 * 28 * 28 + 10)
    wanted = (1 << 20) + bytes_of_tensors + (built.path / "model.engine").stat().st_size
    assert row.peak_memory_mib == wanted / 2**20, "working memory, input and output, and the plan"

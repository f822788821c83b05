"""On a real NVIDIA GPU with TensorRT and pycuda: builds, parity with ONNX Runtime, fused attention, timing, steps.

pytest -m gpu tests/gpu. A folder of probes (`edgeprune export --trunk`, made where torch is) may be given as
EDGEPRUNE_PROBES, so that the device half runs alone; TensorRT's options come from the .toml in EDGEPRUNE_DEVICE.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeprune.devices import load_device, nvidia_gpu
from edgeprune.target import Target, target_for

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The GPU here; skips by name without one, without TensorRT or without pycuda."""
    if nvidia_gpu() is None:
        pytest.skip("no NVIDIA GPU answers nvidia-smi")
    pytest.importorskip("tensorrt")
    pytest.importorskip("pycuda.driver")
    return target_for(os.environ.get("EDGEPRUNE_DEVICE", "cuda"), work=tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def probes(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """trunk.onnx, fixed.onnx, dense.onnx and cuts of a model."""
    if given := os.environ.get("EDGEPRUNE_PROBES"):
        yield Path(given)
        return
    pytest.importorskip("torch")
    from edgeprune.models import load_model
    from edgeprune.profiling import export_probes

    folder = tmp_path_factory.mktemp("probes")
    export_probes(load_model("vit_digits", None), ("fold", "pomt"), 1, folder)
    yield folder


def test_engine_gives_what_onnx_runtime_gives(target: Target, probes: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    reference = ort.InferenceSession(os.fspath(probes / "dense.onnx"), providers=["CPUExecutionProvider"])
    feed = reference.get_inputs()[0]
    rng = np.random.default_rng(0)
    with target.opener(probes / "dense.onnx")() as session:
        for _ in range(4):
            images = rng.standard_normal(feed.shape, dtype=np.float32)
            wanted = reference.run(None, {feed.name: images})[0]
            found = session.infer(images)
            np.testing.assert_allclose(found, wanted, atol=target.runtime.parity, rtol=0)
            assert (found.argmax(1) == wanted.argmax(1)).all()


def test_timing_repeats(target: Target, probes: Path) -> None:
    """Two sessions of one engine, interleaved, agree within 5 %."""
    opener = target.opener(probes / "dense.onnx")
    with opener() as one, opener() as other:
        for _ in range(20):
            one.time_ms(), other.time_ms()
        pairs = [(one.time_ms(), other.time_ms()) for _ in range(50)]
    assert abs(statistics.median(a / b for a, b in pairs) - 1) < 0.05


def test_cuda_graph_and_inspector(target: Target, probes: Path) -> None:
    with target.opener(probes / "dense.onnx")() as session:
        assert session.graph is not None, "no CUDA graph could be captured"  # type: ignore[attr-defined]
        assert session.fused_attention() is not None, "the plan holds no layer details"  # type: ignore[attr-defined]


def test_staircase(target: Target, probes: Path) -> None:
    from edgeprune.profiling import staircase_of_folder
    from edgeprune.staircase import treads

    staircase = staircase_of_folder(target, probes / "trunk.onnx", ())
    assert treads(staircase)[-1] == staircase.vit.tokens
    assert staircase.points[0].latency.median_ms <= staircase.points[-1].latency.median_ms * 1.05
    assert staircase.setup.runtime == "trt"


def test_whole_build(target: Target, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from edgeprune.bundle import load_bundle
    from edgeprune.job import Options
    from edgeprune.pipeline import build
    from edgeprune.schedule import Goal

    device = os.environ.get("EDGEPRUNE_DEVICE", "cuda")
    options = Options(device=device, goal=Goal(speedup=1.1), work=tmp_path / "work", out=tmp_path / "bundle")
    built = build(options)
    assert "model.engine" in load_bundle(built.path).files
    assert load_device(device).name == built.manifest.engine.setup.device

"""A model with several outputs, in no order, on every runtime: one array, always in the same order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from support.fake_trt import Fake

from edgeprune.devices import load_device
from edgeprune.errors import EngineError, MissingError
from edgeprune.onnx_graph.onnx_runtime import CPU, session_of
from edgeprune.records import Setup
from edgeprune.runtimes import runtime_for
from edgeprune.runtimes.remote import protocol
from edgeprune.runtimes.remote.worker import Worker
from edgeprune.runtimes.target import target_for
from edgeprune.version import __version__

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 4, 4), dtype=np.float32)
PACKED = np.concatenate([f(IMAGES).reshape(2, 48) for f in (np.negative, np.abs, np.exp)], axis=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """-x, |x| and exp(x) as features_3, features_12 and embedding, but not in this order."""
    kinds = {"embedding": "Exp", "features_12": "Abs", "features_3": "Neg"}
    nodes = [helper.make_node(kind, ["images"], [name], name) for name, kind in kinds.items()]
    entering, *leaving = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3, 4, 4]) for n in ("images", *kinds)
    ]
    graph = helper.make_graph(nodes, "model", [entering], leaving)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("device", "simulate"), [("cpu", False), ("orin-nano", True)])
def test_onnx_runtime_and_the_simulation(device: str, simulate: bool, model: Path, tmp_path: Path) -> None:
    with target_for(device, batch=2, simulate=simulate, work=tmp_path).opener(model)() as session:
        np.testing.assert_allclose(session.infer(IMAGES), PACKED, rtol=1e-5)
        assert session.time_ms() > 0


def test_errors_of_onnx_runtime_are_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 6 :\n Failed to allocate memory for requested buffer")

    with target_for("cpu", batch=2, work=tmp_path).opener(model)() as session:
        monkeypatch.setattr(session, "_session", SimpleNamespace(run=fails))
        for call in (lambda: session.infer(IMAGES), session.time_ms):
            with pytest.raises(EngineError, match=r"model.*: ONNX Runtime failed .*allocate memory.*smaller --batch"):
                call()


def test_a_provider_that_cannot_be_loaded_is_not_replaced_by_the_cpu(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu without CUDA's libraries logs a line and makes a session for the CPU."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, *_, **__: real(path, providers=[CPU]))
    with pytest.raises(MissingError, match=r"cannot load its CUDAExecutionProvider: install CUDA and cuDNN"):
        session_of(model, "CUDAExecutionProvider")
    assert session_of(model).get_providers() == [CPU]


def test_tensorrt(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All outputs are copied from the GPU, and their memory is freed."""
    fake = Fake().install(monkeypatch)
    setup = Setup(device="cuda", machine="Orin", runtime="trt", runtime_version="1", precision="fp32", batch=2)
    runtime = runtime_for(load_device("cuda"))
    runtime.compile(model, setup, tmp_path / "model.engine")
    with runtime.open(tmp_path / "model.engine", setup) as session:
        np.testing.assert_allclose(session.infer(IMAGES), PACKED, rtol=1e-5)
        assert session.memory_bytes() > 4 * 4 * IMAGES.size  # type: ignore[attr-defined]
    assert fake.memory == {}


def test_the_worker_of_another_machine(model: Path, tmp_path: Path) -> None:
    worker = Worker(tmp_path / "work", lambda message: None)
    worker.answer(protocol.Prepare(__version__, load_device("cpu"), "fp32", 2))
    content = model.read_bytes()
    from edgeprune.io import sha256_bytes

    digest = sha256_bytes(content)
    worker.answer(protocol.Put(digest, content, True))
    opened: Any = worker.answer(protocol.Open({model.name: digest}, model.name))
    found: Any = worker.answer(protocol.Infer(opened.session, IMAGES.shape, IMAGES.tobytes()))
    worker.close()
    np.testing.assert_allclose(np.frombuffer(found.data, np.float32).reshape(found.shape), PACKED, rtol=1e-5)

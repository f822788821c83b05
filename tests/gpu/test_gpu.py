"""On a real NVIDIA GPU with TensorRT and pycuda: engines, logits, fused attention, timing, steps, and every command.

pytest -m gpu tests/gpu. EDGEPRUNE_GPU_FIXTURES is a folder that prepare.py wrote; without it one is made, which needs
torch. EDGEPRUNE_DEVICE is a device or its .toml (kit.toml for a TensorRT 8.6 without cuDNN and cuBLAS).
EDGEPRUNE_GPU_STAND_IN=8.6.0 runs on a machine without a GPU what a fake TensorRT of that version can answer.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import GPU

from edgeprune import devices, stats, zoo
from edgeprune.bundles.format import load_bundle
from edgeprune.latency import timing as measure
from edgeprune.latency.profiling import staircase_of_folder
from edgeprune.latency.staircase import treads
from edgeprune.onnx_graph.attention_fusion import expected
from edgeprune.onnx_graph.graph import input_shape, load_graph, metadata_in
from edgeprune.runtimes import Session
from edgeprune.runtimes.target import Target, target_for
from edgeprune.runtimes.trt_session import TrtSession

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("EDGEPRUNE_DEVICE", "cuda")
STAND_IN = os.environ.get("EDGEPRUNE_GPU_STAND_IN")
ENGINES = [(precision, name) for precision in ("fp32", "fp16") for name in ("dense", "pomt", "fold")]


@pytest.fixture(scope="module")
def gpu() -> Iterator[None]:
    """The GPU here; skips by name without one, without TensorRT or without pycuda."""
    if STAND_IN:
        from support.fake_trt import Fake

        with pytest.MonkeyPatch.context() as patch:
            Fake(STAND_IN).install(patch)
            yield
        return
    if devices.nvidia_gpu() is None:
        pytest.skip("no NVIDIA GPU answers nvidia-smi")
    pytest.importorskip("tensorrt")
    pytest.importorskip("pycuda.driver")
    yield


@pytest.fixture
def real(gpu: None) -> None:
    """Skips where the GPU is a stand-in."""
    if STAND_IN:
        pytest.skip("a stand-in has no CUDA: this needs a GPU")


@pytest.fixture(scope="module")
def folder(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What prepare.py writes."""
    if given := os.environ.get("EDGEPRUNE_GPU_FIXTURES"):
        return Path(given)
    for module in ("torch", "timm", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is missing: set EDGEPRUNE_GPU_FIXTURES, see prepare.py")
    made = tmp_path_factory.mktemp("fixtures")
    subprocess.run([sys.executable, str(GPU / "prepare.py"), str(made)], check=True)
    return made


@pytest.fixture(scope="module")
def targets(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    """This GPU by precision; engines are compiled once."""
    work = tmp_path_factory.mktemp("work")
    batch = input_shape(load_graph(folder / "fp32/dense.onnx"))[0]
    return {precision: target_for(DEVICE, precision, batch, work=work) for precision in ("fp32", "fp16")}


def logits_of(session: Session, images: Any, batch: int) -> Any:
    return np.concatenate([session.infer(part) for part in np.split(images, len(images) // batch)])


def called(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> Any:
    """What a command prints with --json; it must succeed."""
    from edgeprune.cli import main

    monkeypatch.setattr(sys, "argv", ["edgeprune", *map(str, args), "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return json.loads(out.splitlines()[-1])


def test_every_name_exists_here(real: None) -> None:
    """As tests/trt_api does for TensorRT's bindings without a GPU; pycuda can be asked nowhere else."""
    import pycuda.driver
    import tensorrt
    from support.trt_check import found
    from support.trt_names import PYCUDA, SOURCES, TENSORRT, uses

    for module, library in ((tensorrt, TENSORRT), (pycuda.driver, PYCUDA)):
        missing = [
            (use.name, use.place)
            for use in uses(SOURCES, library)
            if all(found(module, name) is there for name, there in use.conditions) and not found(module, use.name)
        ]
        assert not missing, module.__name__


def test_a_process_ends_as_it_should(real: None) -> None:
    """pycuda aborts one that leaves a context on its stack."""
    code = "from edgeprune.runtimes.trt import TensorRT; from edgeprune.devices import load_device\n"
    code += f"print(TensorRT(load_device({DEVICE!r})).free_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


@pytest.mark.parametrize(("precision", "name"), ENGINES)
def test_engine_gives_what_onnx_runtime_gives(
    precision: str, name: str, targets: dict[str, Target], folder: Path
) -> None:
    """The same logits in fp32; in fp16 the same answers on all but one picture in sixteen."""
    target, known = targets[precision], np.load(folder / "reference.npz")
    wanted = known[name]
    with target.opener(folder / precision / f"{name}.onnx")() as session:
        found = logits_of(session, known["images"], target.setup.batch)
    assert np.isfinite(found).all()
    if precision == "fp32":
        np.testing.assert_allclose(found, wanted, atol=target.runtime.parity, rtol=0)
        assert (found.argmax(1) == wanted.argmax(1)).all()
    else:
        assert stats.agreement(wanted, found) >= 90 and stats.kl_divergence(wanted, found) < 0.05


@pytest.mark.parametrize(("precision", "name"), ENGINES)
def test_inspector_tells_of_attention(precision: str, name: str, targets: dict[str, Target], folder: Path) -> None:
    """What is expected from the ONNX is what TensorRT 10 and later fuse; 8.6 does as it can."""
    target, onnx = targets[precision], folder / precision / f"{name}.onnx"
    metadata = metadata_in(onnx)
    assert metadata is not None
    fusable = expected(onnx, metadata.schedule, target.setup)
    uncut = metadata.schedule.vit.depth - len(metadata.schedule.cuts)
    assert fusable == (0 if precision == "fp32" else uncut)
    with target.opener(onnx)() as session:
        assert isinstance(session, TrtSession)
        fused, memory = session.fused_attention(), session.memory_bytes()
    assert memory > target.engine(onnx).stat().st_size
    if target.setup.runtime_version.startswith("8."):
        assert fused is None or 0 < fused <= metadata.schedule.vit.depth
        return
    assert fused is not None, "the plan holds no layer details"
    assert 0 <= fused <= metadata.schedule.vit.depth
    if precision == "fp16":
        assert fused >= fusable


def test_cuda_graph(real: None, targets: dict[str, Target], folder: Path) -> None:
    with targets["fp32"].opener(folder / "fp32/dense.onnx")() as session:
        assert isinstance(session, TrtSession)
        assert session.graph is not None, "no CUDA graph could be captured"


def test_memory_is_given_back(real: None, targets: dict[str, Target], folder: Path) -> None:
    """Twenty sessions, one after the other, leave the GPU as the first did."""
    runtime, opener = targets["fp32"].runtime, targets["fp32"].opener(folder / "fp32/dense.onnx")
    free = []
    for _ in range(20):
        with opener() as session:
            session.time_ms()
        free.append(runtime.free_bytes() or 0)
    assert free[2] - free[-1] < 64 << 20


def test_timing_repeats(real: None, targets: dict[str, Target], folder: Path) -> None:
    """Two sessions of one engine, interleaved, agree within 5 %."""
    opener = targets["fp32"].opener(folder / "fp32/dense.onnx")
    samples = measure.interleave({"one": opener, "other": opener}, 50, stable=True)
    ratio, _ = stats.ratio(samples["one"], samples["other"])
    assert abs(ratio - 1) < 0.05
    assert statistics.median(samples["one"]) > 0.01, "shorter than any ViT: events do not enclose the inference"


def test_staircase(targets: dict[str, Target], folder: Path) -> None:
    """Found adaptively, in fewer probes than there are counts to time, with the cost of cuts; then reused."""
    target, trunk = targets["fp16"], folder / "fp16/probes/trunk.onnx"
    staircase = staircase_of_folder(target, trunk, ("pomt", "fold"))
    assert staircase.setup.runtime == "trt" and treads(staircase)[-1] == staircase.vit.tokens
    assert set(staircase.cuts) == {"pomt", "fold"} and all(last.share > 0 for last in staircase.last)
    assert len(staircase.points) < staircase.vit.tokens - staircase.vit.prefix
    low, high = staircase.points[0].latency, staircase.points[-1].latency
    assert low.median_ms <= high.median_ms * 1.05
    assert staircase_of_folder(target, trunk, ("pomt", "fold")) == staircase


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_device_half(
    precision: str, targets: dict[str, Target], folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All commands of the device half, and `compile` of a bundle's ONNX, without torch or ONNX Runtime."""
    for module in ("torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    pictures, bundle, work = zoo.images_dir(), tmp_path / "bundle", ("--work", targets[precision].work.path)
    files = (folder / precision / "fold.onnx", "--dense", folder / precision / "dense.onnx")
    digits = targets[precision].setup.batch == 1 and metadata_in(files[0]).vit.name == zoo.EMBEDDED  # type: ignore[union-attr]
    images = ("--images", pictures / "labels.csv") if digits else ()
    options = ("--device", DEVICE, "--rounds", "20", *work)
    row = called(capsys, monkeypatch, "compile", *files, *options, *images, "--out", bundle)
    assert (row["runtime"], row["precision"]) == ("trt", precision) and row["speedup"] > 0
    if digits:
        assert row["dense_top1"] > 99 and row["top1"] > 90 and row["agreement"] > 90
    manifest = load_bundle(bundle)
    assert {"model.engine", "model.onnx", "build.log", "device.json"} <= set(manifest.files)

    found = called(capsys, monkeypatch, "verify", bundle)
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert found["ok"] and {"files", "gpu", "memory", "output", "latency"} <= set(status)
    assert status["compute_capability"] == status["runtime_version"] == status["output"] == "ok"

    with open(pictures / "labels.csv", newline="") as file:
        shown = list(csv.DictReader(file))[:8]
    classified = called(capsys, monkeypatch, "run", bundle, *(pictures / picture["image"] for picture in shown))
    assert len(classified["rows"]) == 8 and classified["latency_ms"]["median"] > 0
    if digits:
        right = [
            r["top"][0]["class"] == int(known["label"]) for r, known in zip(classified["rows"], shown, strict=True)
        ]
        assert sum(right) >= 7

    [benched] = called(capsys, monkeypatch, "bench", bundle, "--rounds", "20")["rows"]
    assert benched["runtime"] == "trt" and benched["peak_memory_mib"] > manifest.engine.size_bytes / 2**20
    assert 0 < benched["peak_share"] < 1.2

    again = (bundle / "model.onnx", *options, "--out", tmp_path / "again")
    assert called(capsys, monkeypatch, "compile", *again)["tokens"] == row["tokens"]
    outputs = [np.load(path / "golden_output.npy") for path in (bundle, tmp_path / "again")]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=targets[precision].runtime.parity, rtol=0)


def test_whole_build(gpu: None, tmp_path: Path) -> None:
    """`build`, from staircase to bundle; any trade-off will do, since a large GPU may be flat for a small model."""
    for module in ("torch", "timm"):
        pytest.importorskip(module)
    from edgeprune.pipeline.build import build
    from edgeprune.pipeline.context import Options
    from edgeprune.scheduling.goals import Goal

    options = Options(
        device=DEVICE, goal=Goal(alpha=0.5), search_images=16, rounds=20, neighbours=1,
        work=tmp_path / "work", out=tmp_path / "bundle",
    )  # fmt: skip
    built = build(options)
    assert "model.engine" in load_bundle(built.path).files
    assert built.manifest.engine.setup.device == devices.load_device(DEVICE).name
    assert built.manifest.report.speedup is not None and built.manifest.report.fused_attention is not None

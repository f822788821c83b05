"""On a real NVIDIA GPU: engines, logits, fused attention, timing, steps, and every command.

pytest tests/gpu. It needs TensorRT, and pycuda or cuda-python. EDGEPRUNE_GPU_KIT is what
`benchmarks/gpu_run.py --prepare` wrote; without it the part that these tests need is made, which takes torch.
EDGEPRUNE_GPU_WORK keeps it, engines and samples, so that a second call goes on where the first ended.
EDGEPRUNE_DEVICE is a device or its .toml (kit.toml for a TensorRT 8.6 without cuDNN and cuBLAS).
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
from gpu_steps.checks import pictures_of
from gpu_steps.kit import PARITY, in_batches, models_for, onnx_in, variant
from gpu_steps.run import EngineSpec, Run, opened
from support.paths import ROOT

from edgeprune import devices, stats, zoo
from edgeprune.bundles.format import load_bundle
from edgeprune.defaults import METHODS
from edgeprune.errors import DeviceError, MissingError
from edgeprune.latency import timing as measure
from edgeprune.latency.profiling import staircase_of_folder
from edgeprune.latency.staircase import treads
from edgeprune.onnx_graph.attention_fusion import expected
from edgeprune.onnx_graph.graph import metadata_in
from edgeprune.onnx_graph.precision import QUANTISED
from edgeprune.runtimes import cuda
from edgeprune.runtimes.target import PRECISIONS
from edgeprune.runtimes.trt_session import TrtSession
from edgeprune.tasks import CLASSIFY, typically_off

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("EDGEPRUNE_DEVICE", "cuda")
STAND_IN = os.environ.get("EDGEPRUNE_GPU_STAND_IN")
BATCHES = (1, 4)
SMOKE = ("none-prefix-b1", "fp16")  # the engine of the smoke tests
# Least agreement with PyTorch in fp32, percent, and most KL, nats.
LOST = {"fp16": (90, 0.05), "int8": (80, 0.3), "fp8": (80, 0.3)}


@pytest.fixture(scope="module")
def gpu() -> Iterator[None]:
    """The GPU here; skips by name where need_gpu() does."""
    if STAND_IN:
        from support.fake_trt import Fake

        with pytest.MonkeyPatch.context() as patch:
            fake = Fake(STAND_IN).install(patch)
            if STAND_IN.startswith("8."):  # its inspector hides kernels (#3243)
                fake.layers = [{"Name": "{ForeignNode[a...b]}"}]
            yield
        return
    need_gpu()
    yield


def need_gpu() -> None:
    """Skips by name without a GPU, without TensorRT, or without both pycuda and cuda-python."""
    if devices.nvidia_gpu() is None:
        pytest.skip("no NVIDIA GPU answers nvidia-smi")
    pytest.importorskip("tensorrt")
    try:
        cuda.driver()
    except MissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def real(gpu: None) -> None:
    """Skips where the GPU is a stand-in."""
    if STAND_IN:
        pytest.skip("a stand-in has no CUDA: this needs a GPU")


@pytest.fixture(scope="module")
def run(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Where engines are compiled and what from; kept in EDGEPRUNE_GPU_WORK."""
    given, kept = os.environ.get("EDGEPRUNE_GPU_KIT"), os.environ.get("EDGEPRUNE_GPU_WORK")
    work = Path(kept) if kept else tmp_path_factory.mktemp("work")
    kit = Path(given) if given else work / "kit"
    if not given:
        for module in ("torch", "timm", "onnxruntime"):
            pytest.importorskip(module, reason=f"{module} is missing: set EDGEPRUNE_GPU_KIT, see gpu_run.py")
        subprocess.run([sys.executable, str(ROOT / "benchmarks/gpu_run.py"), "--prepare-tests", str(kit)], check=True)
    return Run(kit, work / "out", work, DEVICE, jobs=1 if STAND_IN else 8)


@pytest.fixture(scope="module")
def folder(run: Run) -> Path:
    """The model in the kit: the embedded one if it is there."""
    found = {path.name: path for path in models_for(run.kit, PARITY)}
    return found.get(zoo.EMBEDDED) or next(iter(found.values()))


@pytest.fixture(scope="module")
def engines(run: Run, folder: Path) -> dict[EngineSpec, str]:
    """All engines of the parity tests, built in parallel; the errors of those that failed."""
    names = [(variant(m, last, b), b) for m in METHODS for last in (False, True) for b in BATCHES]
    here = [precision for precision in PRECISIONS if not lacking(run, precision)]
    specs = [EngineSpec(folder, name, p, b) for name, b in names for p in here]
    return run.build([spec for spec in specs if (folder / f"{spec.name}.onnx").exists()])


@pytest.fixture
def smoke(run: Run, folder: Path) -> EngineSpec:
    """One engine."""
    return EngineSpec(folder, *SMOKE, 1)


def need(run: Run, precision: str) -> None:
    """Skips by name where TensorRT or the GPU has no such precision."""
    if reason := lacking(run, precision):
        pytest.skip(reason)


def lacking(run: Run, precision: str) -> str:
    """Why a precision cannot be measured here; "" where it can."""
    try:
        run.target(precision, 1)
    except DeviceError as error:
        return str(error)
    return ""


def called(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> Any:
    """What a command prints with --json; it must succeed."""
    from edgeprune.cli import main

    monkeypatch.setattr(sys, "argv", ["edgeprune", *map(str, args), "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return json.loads(out.splitlines()[-1])


# --- first on a new machine ---


@pytest.mark.smoke
def test_every_name_exists_here(real: None) -> None:
    """As tests/trt_api does for TensorRT's bindings without a GPU; pycuda can be asked nowhere else."""
    import tensorrt
    from support.trt_check import found
    from support.trt_names import PYCUDA, SOURCES, TENSORRT, uses

    for module, library in ((tensorrt, TENSORRT), (cuda.driver(), PYCUDA)):
        missing = [
            (use.name, use.place)
            for use in uses(SOURCES, library)
            if all(found(module, name) is there for name, there in use.conditions) and not found(module, use.name)
        ]
        assert not missing, module.__name__


@pytest.mark.smoke
def test_a_process_ends_as_it_should(real: None) -> None:
    """pycuda aborts one that leaves a context on its stack."""
    code = "from edgeprune.runtimes.trt import TensorRT; from edgeprune.devices import load_device\n"
    code += f"print(TensorRT(load_device({DEVICE!r})).free_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


@pytest.mark.smoke
def test_an_engine_runs(run: Run, smoke: EngineSpec) -> None:
    with opened(run, smoke) as session:
        logits = session.infer(pictures_of(smoke.folder)[0][:1])
        assert np.isfinite(logits).all() and np.ptp(logits) > 0 and session.time_ms() > 0


@pytest.mark.smoke
def test_cuda_graph(real: None, run: Run, smoke: EngineSpec) -> None:
    with opened(run, smoke) as session:
        assert isinstance(session, TrtSession)
        assert session.graph is not None, "no CUDA graph could be captured"


@pytest.mark.smoke
def test_memory_is_given_back(real: None, run: Run, smoke: EngineSpec) -> None:
    """Twenty sessions, one after the other, leave the GPU as the first did."""
    runtime, opener = run.target("fp16", 1).runtime, run.opener(smoke)
    free = []
    for _ in range(20):
        with opener() as session:
            session.time_ms()
        free.append(runtime.free_bytes() or 0)
    assert free[2] - free[-1] < 64 << 20


@pytest.mark.smoke
def test_timing_repeats(real: None, run: Run, smoke: EngineSpec) -> None:
    """Two sessions of one engine, interleaved, agree within 5 %."""
    opener = run.opener(smoke)
    samples = measure.interleave({"one": opener, "other": opener}, 50, stable=True)
    ratio, _ = stats.ratio(samples["one"], samples["other"])
    assert abs(ratio - 1) < 0.05
    assert statistics.median(samples["one"]) > 0.01, "shorter than any ViT: events do not enclose the inference"


# --- what is shipped ---


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("prefix_last", [False, True], ids=["whole", "prefix"])
@pytest.mark.parametrize("method", METHODS)
def test_engine(
    method: str, prefix_last: bool, batch: int, precision: str, engines: dict[EngineSpec, str], run: Run, folder: Path
) -> None:
    """PyTorch's logits in fp32, nearly the same answers below; attention fused where the ONNX allows it.

    Logits are compared by the median over pictures, as runtimes may keep either of two tokens with equal scores.
    What is expected from the ONNX is what TensorRT 10 and later fuse; 8.6 does as it can.
    """
    need(run, precision)
    spec = EngineSpec(folder, variant(method, prefix_last, batch), precision, batch)
    if not (folder / f"{spec.name}.onnx").exists():
        pytest.skip(f"the kit has no {spec.name}")
    assert spec not in engines, engines[spec]
    target, wanted = run.target(precision, batch), np.load(folder / "logits.npz")[variant(method, prefix_last, 0)]
    images, _ = pictures_of(folder)
    onnx = run.onnx(spec)
    metadata = metadata_in(onnx)
    assert metadata is not None
    fusable = expected(onnx, metadata.schedule, target.setup)
    with opened(run, spec) as session:
        assert isinstance(session, TrtSession)
        found = np.concatenate([session.infer(part) for part in in_batches(images, batch)])
        fused, memory = session.fused_attention(), session.memory_bytes()
    assert np.isfinite(found).all()
    if precision == "fp32":
        assert typically_off(CLASSIFY, found, wanted) < target.runtime.parity
    agreement, kl = LOST.get(precision, (98, 0.001))
    figures = CLASSIFY.fidelity(wanted, found, None)
    assert figures.agreement is not None and figures.agreement >= agreement
    assert figures.kl is not None and figures.kl < kl
    assert memory > found[:batch].nbytes
    if fused is not None and not STAND_IN:
        assert 0 <= fused <= metadata.schedule.vit.depth
        assert target.setup.runtime_version.startswith("8.") or precision == "fp32" or fused >= (fusable or 0)


def test_staircase(run: Run, folder: Path) -> None:
    """Found adaptively, in fewer probes than there are counts to time, with the cost of cuts; then reused."""
    target, trunk = run.target("fp16", 1), folder / "probes/trunk.onnx"
    if not trunk.exists():
        pytest.skip("the kit has no models to profile")
    staircase = staircase_of_folder(target, trunk, ("pomt", "fold"))
    assert staircase.setup.runtime == "trt" and treads(staircase)[-1] == staircase.vit.tokens
    assert set(staircase.cuts) == {"pomt", "fold"} and all(last.share > 0 for last in staircase.last)
    assert len(staircase.points) < staircase.vit.tokens - staircase.vit.prefix
    low, high = staircase.points[0].latency, staircase.points[-1].latency
    assert low.median_ms <= high.median_ms * 1.05
    assert staircase_of_folder(target, trunk, ("pomt", "fold")) == staircase


@pytest.mark.parametrize("precision", PRECISIONS)
def test_device_half(
    precision: str, run: Run, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All commands of the device half, and `compile` of a bundle's ONNX, without torch or ONNX Runtime."""
    for module in ("torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    need(run, precision)
    target = run.target(precision, 1)
    names = variant("fold", True, 1), variant("none", False, 1)
    pruned, dense = (onnx_in(folder, name, target.onnx_precision, run.work) for name in names)
    pictures, bundle = zoo.images_dir(), tmp_path / "bundle"
    digits = folder.name == zoo.EMBEDDED
    images = ("--images", pictures / "labels.csv") if digits else ()
    options = ("--device", DEVICE, "--rounds", "20", "--work", run.work)
    row = called(capsys, monkeypatch, "compile", pruned, "--dense", dense, *options, *images, "--out", bundle)
    assert (row["runtime"], row["precision"]) == ("trt", precision) and row["speedup"] > 0
    if digits:
        assert row["dense_top1"] > 97 and row["top1"] > 75 and row["agreement"] > 75
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

    [benched] = called(capsys, monkeypatch, "bench", bundle, "--rounds", "20")["rows"]
    assert benched["runtime"] == "trt" and benched["peak_memory_mib"] > manifest.engine.size_bytes / 2**20
    if precision in QUANTISED:
        assert benched["peak_share"] is None  # the peak is measured in fp32 and fp16 only
    else:
        assert 0 < benched["peak_share"] < 1.2

    again = (bundle / "model.onnx", *options, "--out", tmp_path / "again")
    assert called(capsys, monkeypatch, "compile", *again)["tokens"] == row["tokens"]
    if precision == "fp32":
        outputs = [np.load(path / "golden_output.npy") for path in (bundle, tmp_path / "again")]
        np.testing.assert_allclose(outputs[1], outputs[0], atol=target.runtime.parity, rtol=0)


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
    assert built.manifest.report.speedup is not None
    if not built.manifest.engine.setup.runtime_version.startswith("8."):  # there the inspector hides kernels (#3243)
        assert built.manifest.report.fused_attention is not None

"""Steps 1 to 4 and 8: smoke tests, parity, kernels of attention, ways of timing, and every command once."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import onnx

from edgeprune import stats, zoo
from edgeprune.defaults import REDUCERS
from edgeprune.devices import smi
from edgeprune.errors import EngineError
from edgeprune.images import normalise
from edgeprune.io import load
from edgeprune.onnx_graph.attention_fusion import expected
from edgeprune.onnx_graph.graph import metadata_in, save_graph
from edgeprune.records import Latency, Preprocessing
from edgeprune.runtimes.target import PRECISIONS
from edgeprune.tasks import CLASSIFY, percent
from gpu_steps.kit import (
    PARITY,
    chosen,
    in_batches,
    models_for,
    onnx_in,
    overlap,
    ranking_graph,
    variant,
    vit_of,
    weights_key,
)
from gpu_steps.run import EngineSpec, OutOfTime, Parts, Run, Skipped, opened

if TYPE_CHECKING:
    from edgeprune.runtimes.trt_session import TrtSession

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("numpy", "onnx", "PIL", "jinja2", "msgspec", "packaging", "typer", "zstandard")  # the base installation
SMOKE_S = 400


def smoke(run: Run) -> Parts:
    """Step 1."""

    def packages() -> Any:
        found, missing = {}, []
        for name in (*NEEDED, "pytest", "tensorrt", "pycuda", "cuda.bindings"):
            try:
                found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
            except ImportError:
                missing.append(name)
        if left := [name for name in missing if name in NEEDED]:
            raise EngineError(f"missing here: {', '.join(left)}: add these packages to this Python")
        importlib.import_module("edgeprune.pipeline.compile")  # all that the device half imports
        return {"python": sys.version.split()[0], "versions": found, "missing": missing}

    def gpu() -> Any:
        asked = "name,driver_version,power.limit,clocks.max.sm,temperature.gpu"
        if (line := smi(f"--query-gpu={asked} --format=csv,noheader")) is None:
            raise Skipped("needs an NVIDIA GPU that nvidia-smi finds")
        return dict(zip(asked.split(","), (text.strip() for text in line.split(",")), strict=False))

    def tests() -> Any:
        run.need_tensorrt()
        report = run.out / "smoke.xml"
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "tests/gpu/pytest.ini"), "-m", "smoke"]
        environment = os.environ | {
            "EDGEPRUNE_GPU_KIT": str(run.kit.resolve()), "EDGEPRUNE_GPU_WORK": str(run.work.resolve()),
            "EDGEPRUNE_DEVICE": run.device,
        }  # fmt: skip
        command += [str(ROOT / "tests/gpu"), "--junitxml", str(report)]
        done = child(command, run.seconds(SMOKE_S), environment)
        if not report.exists():
            raise EngineError(f"pytest ended with {done.returncode}: {done.stdout[-300:]} {done.stderr[-300:]}")
        return outcomes(report)

    return {"packages": packages, "gpu": gpu, "tests": tests}


def outcomes(report: Path) -> dict[str, str]:
    """Test by name: passed, or how it ended and the first line of the reason."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ends = [f"{end.tag}: {end.get('message', '')}" for end in case if end.tag in ("failure", "error", "skipped")]
        found[str(case.get("name"))] = ends[0].splitlines()[0][:200] if ends else "passed"
    return found


def parity(run: Run) -> Parts:
    """Step 2: every method, precision and batch against PyTorch's logits in fp32."""
    parts: Parts = {}
    for folder in models_for(run.kit, PARITY):
        names = sorted({path.stem for path in folder.glob("*-b*.onnx") if path.stem.startswith(("none", *REDUCERS))})
        names = [name for name in names if name.partition("-")[2].startswith(("whole-", "prefix-"))]
        for batch in sorted({int(name.rpartition("-b")[2]) for name in names}):
            mine = [name for name in names if name.endswith(f"-b{batch}")]
            for precision in PRECISIONS:
                key = f"{folder.name} {precision} b{batch}"
                parts[key] = lambda f=folder, n=mine, p=precision, b=batch: compared(run, f, n, p, b)  # type: ignore[misc]
        first = min(int(name.rpartition("-b")[2]) for name in names)
        for precision in PRECISIONS:
            parts[f"{folder.name} {precision} ranking"] = (  # type: ignore[misc]
                lambda f=folder, p=precision, b=first: rankings(run, f, p, b)
            )
    return parts


def pictures_of(folder: Path) -> tuple[Any, Any]:
    """Normalised pictures (images, 3, P, P) of a kit, and labels or None."""
    with np.load(folder / "pictures.npz") as held:
        pixels, labels = held["pixels"], held.get("labels", None)
    return normalise(pixels, load(folder / "preprocessing.json", Preprocessing)), labels


def compared(run: Run, folder: Path, names: list[str], precision: str, batch: int) -> Any:
    """Each engine's logits with PyTorch's of the same schedule, and with those of the unpruned model."""
    run.need(precision)
    specs = [EngineSpec(folder, name, precision, batch) for name in names]
    errors = run.build(specs)
    images, labels = pictures_of(folder)
    known = np.load(folder / "logits.npz")
    rows = []
    for spec in specs:
        row: dict[str, Any] = {"name": spec.name}
        rows.append(row)
        if spec in errors:
            row["error"] = errors[spec]
            continue
        with opened(run, spec) as session:
            found = np.concatenate([session.infer(part) for part in in_batches(images, batch)])
        wanted = known[spec.name.rpartition("-b")[0] + "-b0"]
        apart = stats.differences(found, wanted)
        row |= {"finite": bool(np.isfinite(found).all()), "median_difference": float(np.median(apart))}
        figures = CLASSIFY.fidelity(wanted, found, None if labels is None else labels.tolist())
        row |= {"largest_difference": float(apart.max()), "agreement": figures.agreement, "kl": figures.kl}
        row["agreement_unpruned"] = percent(CLASSIFY.agrees(known[variant("none", False, 0)], found))
        row["top1"] = figures.top1
    return {"images": len(images), "rows": rows}


def rankings(run: Run, folder: Path, precision: str, batch: int) -> Any:
    """Share of the tokens chosen by the first cut that an engine and ONNX Runtime in fp32 have in common."""
    run.need(precision)
    images, _ = pictures_of(folder)
    target, vit, shares = run.target(precision, batch), vit_of(folder), {}
    with np.load(folder / "ranking.npz") as known:
        for method in known.files:
            if time.time() > run.until:
                raise OutOfTime
            whole = onnx_in(folder, variant(method, False, batch), target.onnx_precision, run.converted)
            metadata = metadata_in(whole)
            assert metadata is not None
            part = whole.with_name(f"{whole.stem}-ranking.onnx")
            if not part.exists():
                save_graph(ranking_graph(onnx.load(whole)), part)
            with target.opener(part, weights_key(folder))() as session:
                found = np.concatenate([session.infer(piece) for piece in in_batches(images, batch)])
            leaving = metadata.schedule.tokens[metadata.schedule.cuts[0]]
            shares[method] = overlap(found, known[method], chosen(method, vit.tokens, leaving, vit.prefix))
    return {"images": len(images), "overlap": shares}


def kernels(run: Run) -> Parts:
    """Step 3: what the inspector tells of attention, and the kernels that ran, where there is a profiler."""
    parts: Parts = {}
    for folder in models_for(run.kit, PARITY):
        for method in ("none", "fold"):
            for precision in PRECISIONS:
                spec = EngineSpec(folder, variant(method, False, 1), precision, 1)
                key = f"{folder.name} {method} {precision}"
                parts[f"{key} inspector"] = lambda s=spec: inspected(run, s)  # type: ignore[misc]
                parts[f"{key} profiler"] = lambda s=spec: profiled(run, s)  # type: ignore[misc]
    return parts


def inspected(run: Run, spec: EngineSpec) -> Any:
    """Fused attention layers as edgeprune counts them, those expected, and the names that say attention."""
    run.need_tensorrt()
    run.need(spec.precision)
    from edgeprune.runtimes.trt_builder import tensorrt

    onnx_file, trt = run.onnx(spec), tensorrt()
    metadata = metadata_in(onnx_file)
    assert metadata is not None
    with opened(run, spec) as session:
        trt_session: TrtSession = session  # type: ignore[assignment]
        inspector = trt_session._engine.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        fused = trt_session.fused_attention()
    layers = [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
    tactics = {str(layer.get("TacticName", "")) for layer in layers} - {""}
    setup = run.target(spec.precision, spec.batch).setup
    return {
        "fused": fused,
        "expected": expected(onnx_file, metadata.schedule, setup),
        "layers": len(layers),
        "layer_types": sorted({str(layer.get("LayerType", "")) for layer in layers}),
        "attention": sorted(name for name in tactics if is_attention(name)),
        "tactics": sorted(tactics)[:60],
    }


def is_attention(name: str) -> bool:
    """Does the name of a kernel or tactic say fused attention?"""
    return any(word in name.lower() for word in ("mha", "attention"))


def profiled(run: Run, spec: EngineSpec) -> Any:
    """Kernels of a few inferences by Nsight Compute (ncu): name, launches, total time."""
    run.need_tensorrt()
    run.need(spec.precision)
    ncu = shutil.which("ncu")
    if ncu is None:
        raise Skipped("needs Nsight Compute (ncu)")
    run.opener(spec)
    engine = run.target(spec.precision, spec.batch).engine(run.onnx(spec), weights_key(spec.folder))
    command = [ncu, "--csv", "--metrics", "gpu__time_duration.sum", "--clock-control", "none", sys.executable]
    done = child([*command, str(ROOT / "benchmarks/gpu_run.py"), "--infer", str(engine)], run.seconds(SMOKE_S))
    found = kernels_in(done.stdout)
    if not found:
        last = " ".join((done.stdout + done.stderr).split())[-300:]
        raise EngineError(f"ncu listed no kernel ({last}): run it by hand on this GPU")
    return {"kernels": found, "attention": [row for row in found if is_attention(row["name"])]}


def kernels_in(text: str) -> list[dict[str, Any]]:
    """Kernels in the CSV that ncu prints between other lines; the slowest first."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    times: dict[str, list[float]] = defaultdict(list)
    for row in csv.DictReader(lines):
        if row.get("Metric Name") == "gpu__time_duration.sum":
            unit = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
            factor, value = unit.get(row["Metric Unit"]), row["Metric Value"].replace(",", "")
            if factor is not None and value.replace(".", "", 1).isdigit():  # "n/a" where it was not collected
                times[row["Kernel Name"]].append(float(value) * factor)
    rows = [
        {"name": name[:160], "launches": len(each), "total_us": round(sum(each), 2)} for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: -float(row["total_us"]))  # type: ignore[arg-type]


def timings(run: Run) -> Parts:
    """Step 4: by CUDA graph or launched one by one, on an idle stream or a queued one, event and wall clock."""
    parts: Parts = {}
    for folder in models_for(run.kit, PARITY):
        spec = EngineSpec(folder, variant("none", False, 1), "fp16", 1)
        parts[folder.name] = lambda s=spec: timed(run, s)  # type: ignore[misc]
    return parts


def timed(run: Run, spec: EngineSpec) -> Any:
    """Latencies of one engine, `samples` of each way, taken in turn."""
    run.need_tensorrt()
    samples: dict[str, list[float]] = defaultdict(list)
    with opened(run, spec) as opened_session:
        session: Any = opened_session
        ways = {"graph": session.graph, "plain": None} if session.graph is not None else {"plain": None}
        session.time_ms()  # loads the input
        for _ in range(run.samples):
            for launch, graph in ways.items():
                session.graph = graph
                for start in ("idle", "queued"):
                    event_ms, wall_ms = _once(session, start == "queued")
                    samples[f"{launch} {start} event"].append(event_ms)
                    samples[f"{launch} {start} wall"].append(wall_ms)
        session.graph = ways.get("graph")
        for _ in range(run.samples):
            samples["time_ms()"].append(session.time_ms())
            samples["end_to_end_ms()"].append(session.end_to_end_ms())
    ms = {way: Latency(samples_ms=tuple(values)).summary() for way, values in samples.items()}
    return {"engine": spec.name, "samples": run.samples, "graph": "graph" in ways, "ms": ms}


def _once(session: Any, queued: bool) -> tuple[float, float]:
    """One inference, ms by CUDA events, and from its launch to its end by the clock of the host."""
    if queued:
        session._launch()
    else:
        session._stream.synchronize()
    start = time.perf_counter_ns()
    session._begin.record(session._stream)
    session._launch()
    session._end.record(session._stream)
    session._end.synchronize()
    wall_ms = (time.perf_counter_ns() - start) / 1e6
    return float(session._end.time_since(session._begin)), wall_ms


def commands(run: Run) -> Parts:
    """Step 8: compile, verify, run, bench and ship to this machine over loopback, each in its own process."""
    parts: Parts = {}
    for folder in models_for(run.kit, PARITY):
        bundle = run.work / f"bundle-{folder.name}"
        options = ("--device", run.device, "--rounds", str(min(run.rounds, 50)), "--work", run.work)
        picture = next(iter(sorted(zoo.images_dir().glob("**/*.png"))))

        def compiled(folder: Path = folder, bundle: Path = bundle, options: tuple[Any, ...] = options) -> Any:
            kind = run.target("fp16", 1).onnx_precision
            names = variant("fold", True, 1), variant("none", False, 1)
            pair = [onnx_in(folder, name, kind, run.converted) for name in names]
            return command(run, "compile", pair[0], "--dense", pair[1], *options, "--out", bundle)

        name = folder.name
        parts |= {
            f"{name} compile": compiled,
            f"{name} verify": lambda b=bundle: command(run, "verify", b),  # type: ignore[misc]
            f"{name} run": lambda b=bundle, p=picture: command(run, "run", b, p),  # type: ignore[misc]
            f"{name} bench": lambda b=bundle: command(run, "bench", b, "--rounds", "50"),  # type: ignore[misc]
            f"{name} ship": lambda b=bundle: shipped(run, b),  # type: ignore[misc]
        }
    return parts


def child(words: Sequence[str], seconds: float, environment: Mapping[str, str] = os.environ) -> Any:
    """A finished process with its output as text. Raises EngineError where it takes longer."""
    try:
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        name = " ".join(map(str, words[1:4]))
        raise EngineError(f"{name} took more than {seconds:.0f} s: call this step again") from None


def command(run: Run, *args: object, **environment: str) -> Any:
    """What a command prints with --json. Raises EngineError with its last line where it fails."""
    words = [sys.executable, "-m", "edgeprune", *map(str, args), "--json"]
    where = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | environment
    done = child(words, run.seconds(SMOKE_S), where)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise EngineError(f"edgeprune {args[0]} ended with {done.returncode} ({last[:300]}): run it by hand")
    return json.loads(done.stdout.splitlines()[-1])


def shipped(run: Run, bundle: Path) -> Any:
    """Ship to an OpenSSH server of our own on loopback; twice, since the second time nothing is sent."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    from support.loopback import SSHD, server

    if SSHD is None:
        raise Skipped("needs sshd (Debian: openssh-server)")
    folder = (run.work / f"loopback-{time.time_ns()}").resolve()
    with server(folder) as there:
        program = folder / "edgeprune-here"  # ssh passes no environment on, and this Python may depend on it
        kept = ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "CUDA_MODULE_LOADING", "PATH")
        held = {name: os.environ[name] for name in kept if name in os.environ}
        held["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), held.get("PYTHONPATH")]))
        lines = ["#!/bin/sh", *(f"export {name}={shlex.quote(value)}" for name, value in held.items())]
        program.write_text("\n".join([*lines, f'exec {shlex.quote(sys.executable)} -m edgeprune "$@"', ""]))
        program.chmod(0o755)
        to = (f"{there.address}:{there.home}/models", "--host-program", program)
        return [command(run, "ship", bundle, *to, EDGEPRUNE_SSH=there.ssh) for _ in range(2)]

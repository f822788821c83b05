"""ONNX to a TensorRT plan: one code path for 8.6, 10 and 11; the precision is what the ONNX holds."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from edgeprune.errors import EngineError, MissingError
from edgeprune.io import replacing, writable
from edgeprune.records import Progress, TrtOptions, silent

log = logging.getLogger(__name__)

OLDEST = (8, 6)  # JetPack 6.0; JetPack 5 has 8.5 and Python 3.8
MIB = 1 << 20
LEAST_FREE = 256 * MIB  # below it no ViT was ever built
TYPES = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}  # what a weakly typed network may use

# What TensorRT says, and what it means to a user; the first that fits is told.
BUILD_TROUBLE = (
    (("out of memory", "outofmemory", "cuda failure: 2", "insufficient memory"), "memory ran out"),
    (("insufficient workspace",), "the workspace is too small"),
    (("could not find any implementation", "no implementation"), "no kernel for a layer fits"),
)
PLAN_TROUBLE = (
    (("version tag does not match", "serialization version", "incompatible version"), "another TensorRT version"),
    (("compute capability", "different gpu", "target gpu", "sm version", "generated for"), "another GPU"),
)


def tensorrt() -> Any:
    """The module. Raises MissingError without it, EngineError where it is older than JetPack 6's."""
    try:
        import tensorrt as trt
    except ImportError as error:
        raise MissingError(
            f"TensorRT is missing ({error}): on a Jetson it comes with JetPack (python3 -m venv "
            '--system-site-packages), elsewhere pip install "edgeprune[trt]"'
        ) from None
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST:
        raise EngineError(f"TensorRT {trt.__version__} is too old (JetPack 5 or before): upgrade to JetPack 6")
    return trt


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps its lines (`lines`: severity name, text), but not VERBOSE ones: a build gives
    thousands of those, and tactics that were skipped for want of memory are no reason of a failure.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name != "VERBOSE":
                self.lines.append((severity.name, message))

    return Logger()


def plan_from_onnx(
    onnx: Path,
    precision: str,
    options: TrtOptions,
    free_bytes: int,
    timing_cache: Path,
    logger: Any,
    progress: Progress = silent,
) -> bytes:
    """The serialized engine. `free_bytes` of GPU memory bound the workspace; tactics timed are kept.

    Raises EngineError with the nodes that TensorRT cannot take, or why it could not build.
    """
    trt = tensorrt()
    if free_bytes < LEAST_FREE:
        raise EngineError(f"only {free_bytes // MIB} MiB of GPU memory are free: close other programs")
    workspace = min(options.workspace_mib * MIB, free_bytes // 2)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt, options))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(os.fspath(onnx)):
        raise EngineError(f"{onnx}: TensorRT {trt.__version__} cannot read it: {_parser_errors(parser, onnx)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    for flag in TYPES[precision] if not is_strong(trt, options) else ():
        if not hasattr(trt.BuilderFlag, flag):
            raise EngineError(f"TensorRT {trt.__version__} has no {flag} flag: drop typing = 'weak'")
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if precision == "fp32" and hasattr(trt.BuilderFlag, "TF32"):  # fp32 means it: TF32 keeps 10 bits
        config.clear_flag(trt.BuilderFlag.TF32)
    _choose_tactics(trt, config, options)
    _load_timing(config, timing_cache)
    monitor = make_monitor(trt, progress)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise EngineError(f"{onnx}: TensorRT could not build it: {explained(logger, workspace, free_bytes)}")
    cache = config.get_timing_cache()
    if cache is not None:
        with writable(timing_cache), replacing(timing_cache) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    return bytes(plan)


def is_strong(trt: Any, options: TrtOptions) -> bool:
    """Is the network strongly typed: its types are the ONNX's own, nothing is lowered behind one's back?"""
    return options.typing == "strong" and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def network_flags(trt: Any, options: TrtOptions) -> int:
    """Bits for `create_network`; by name, since the numbers differ between versions."""
    flags = trt.NetworkDefinitionCreationFlag
    if is_strong(trt, options):
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH) if hasattr(flags, "EXPLICIT_BATCH") else 0


def _choose_tactics(trt: Any, config: Any, options: TrtOptions) -> None:
    """Only the sources asked for; on 8.x also keeps external libraries out of TensorRT's own layers."""
    if options.tactic_sources is None:
        return
    mask = 0
    for name in options.tactic_sources:
        if not hasattr(trt.TacticSource, name):
            raise EngineError(f"TensorRT {trt.__version__} has no tactic source {name}: correct the device file")
        mask |= 1 << int(getattr(trt.TacticSource, name))
    config.set_tactic_sources(mask)
    external = "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"
    if hasattr(trt.PreviewFeature, external):
        config.set_preview_feature(getattr(trt.PreviewFeature, external), True)


def _load_timing(config: Any, path: Path) -> None:
    """Take up the tactics timed before; an unreadable or foreign cache is as good as none."""
    known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("%s is of another TensorRT or GPU: timing anew", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def make_monitor(trt: Any, progress: Progress) -> Any:
    """Progress of a build and a way to stop it; None where TensorRT (8.6) has no IProgressMonitor."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:  # an exception may not leave through TensorRT
                progress(f"TensorRT: {phase_name}", step, self.steps.get(phase_name, step))
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

    return Monitor()


def _parser_errors(parser: Any, onnx: Path) -> str:
    from edgeprune.onnx_graph.graph import load_graph

    nodes = load_graph(onnx).graph.node
    told = []
    for index in range(min(parser.num_errors, 3)):
        error = parser.get_error(index)
        place = error.node()
        node = f"node {nodes[place].name} ({nodes[place].op_type}): " if 0 <= place < len(nodes) else ""
        told.append(node + error.desc())
    return ("; ".join(told) or "no reason given") + ": export it again with this version of edgeprune"


def explained(logger: Any, workspace: int, free_bytes: int) -> str:
    """Why a build failed, out of the log."""
    errors = [text for severity, text in logger.lines if severity in ("ERROR", "INTERNAL_ERROR")]
    what = _cause([text for _, text in logger.lines], BUILD_TROUBLE)
    last = errors[-1][:300] if errors else "no reason given"
    advice = (
        f"workspace {workspace // MIB} MiB, {free_bytes // MIB} MiB were free: close other programs or "
        "lower workspace_mib under [trt] of the device file"
    )
    return f"{what or last}: {advice}" + (f" ({last})" if what else "")


def plan_trouble(logger: Any) -> str:
    """Why a plan was refused, out of the log."""
    foreign = _cause([text for _, text in logger.lines], PLAN_TROUBLE)
    if foreign:
        return f"it was built for {foreign}: compile the ONNX here"
    return "it is truncated or no plan: compile the ONNX again"


def _cause(lines: list[str], table: tuple[tuple[tuple[str, ...], str], ...]) -> str | None:
    text = "\n".join(lines).lower()
    return next((meaning for signs, meaning in table if any(sign in text for sign in signs)), None)


class Fusion(NamedTuple):
    """Attention layers of an engine: those that run as one fused kernel, and the layers there are in all."""

    fused: int
    layers: int


def fusion_of(information: str) -> Fusion | None:
    """Counted in the inspector's JSON; None where the engine was built without details.

    Layers are objects (DETAILED) or bare names; a fused attention shows as `_mha` or `fmha` in a tactic, a
    kernel or a layer name (TensorRT 8.6 to 11; `Bindings` and `I/O Tensors` alike are left aside).
    """
    layers = json.loads(information).get("Layers", [])
    if not any(isinstance(layer, dict) for layer in layers):
        return None
    keys = ("TacticName", "LayerType", "Name", "KernelName")
    texts = [" ".join(str(layer.get(key, "")) for key in keys).lower() for layer in layers if isinstance(layer, dict)]
    return Fusion(sum("_mha" in text or "fmha" in text for text in texts), len(layers))

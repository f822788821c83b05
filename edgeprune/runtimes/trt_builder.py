"""ONNX to a TensorRT plan; the precision is what the ONNX holds.

TensorRT 10 and 11 keep its types (strong typing). 8.6 cannot: there flags allow types, and fp32 islands are fixed
layer by layer (trt_layers.py).
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from edgeprune.errors import EngineError, MissingError
from edgeprune.io import write_bytes
from edgeprune.onnx_graph.graph import load_graph, precision_of
from edgeprune.onnx_graph.value_types import computed_in
from edgeprune.records import Progress, TrtOptions, silent
from edgeprune.runtimes.interrupt import Interrupt, held_interrupts
from edgeprune.runtimes.trt_layers import keep_islands
from edgeprune.runtimes.trt_log import build_failure, is_mha_bug

log = logging.getLogger(__name__)

OLDEST = (8, 6)  # JetPack 6.0; JetPack 5 has 8.5 and Python 3.8
DEFAULT_LEVEL = 3  # TensorRT's own optimization level
# What a weakly typed network may use, by the precision of its file.
TYPES = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8"), "fp8": ("FP16", "FP8")}


def tensorrt() -> Any:
    """The tensorrt module. Raises MissingError where it is absent, EngineError where it is older than JetPack 6's."""
    try:
        import tensorrt as trt
    except ImportError as error:
        raise MissingError(
            f"TensorRT is missing ({error}): on a Jetson it comes with JetPack (python3 -m venv "
            "--system-site-packages), elsewhere pip install tensorrt"
        ) from None
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST:
        raise EngineError(f"TensorRT {trt.__version__} is too old (JetPack 5 or before): upgrade to JetPack 6")
    return trt


def plan_from_onnx(
    onnx: Path,
    options: TrtOptions,
    workspace: int,
    free_bytes: int,
    timing_cache: Path,
    logger: Any,
    progress: Progress = silent,
) -> bytes:
    """The serialized engine. `workspace` is the builder's limit in bytes; `timing_cache` is updated.

    Raises EngineError with the nodes that TensorRT does not support, or with the reason why it could not build.
    Ctrl-C stops it at the next step of the builder; 8.6, which reports no steps, finishes the engine first.
    """
    trt = tensorrt()
    with held_interrupts() as stop:
        builder = trt.Builder(logger)
        network = builder.create_network(network_flags(trt, options))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(os.fspath(onnx)):
            raise EngineError(f"{onnx}: TensorRT {trt.__version__} cannot read it: {_parser_errors(parser, onnx)}")
        config = _config(trt, builder, options, workspace, timing_cache)
        if not is_strong(trt, options):
            _weak_types(trt, network, config, onnx)
        if hasattr(config, "progress_monitor"):
            config.progress_monitor = make_monitor(trt, progress, stop)
        plan = builder.build_serialized_network(network, config)
        if plan is None and not stop.asked and is_mha_bug(logger):
            level = other_level(options)
            log.warning(
                "%s: TensorRT failed to fuse attention, building at optimization level %d instead", onnx, level
            )
            logger.lines.append(("WARNING", f"edgeprune: built again at optimization level {level}"))
            config.builder_optimization_level = level
            plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{onnx}: TensorRT could not build it: {build_failure(logger, workspace, free_bytes)}")
    cache = config.get_timing_cache()
    if cache is not None:
        write_bytes(timing_cache, bytes(cache.serialize()))
    return bytes(plan)


def _config(trt: Any, builder: Any, options: TrtOptions, workspace: int, timing_cache: Path) -> Any:
    """The builder's configuration. TF32 is always off: it has 10 bits of mantissa, and islands are fp32 for more."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    _choose_tactics(trt, config, options)
    _load_timing(config, timing_cache)
    return config


def _weak_types(trt: Any, network: Any, config: Any, onnx: Path) -> None:
    """Allow a weakly typed network the types of its file, and keep its fp32 islands fp32."""
    graph = load_graph(onnx)
    for flag in TYPES[precision_of(graph)]:
        if not hasattr(trt.BuilderFlag, flag):
            raise EngineError(
                f"TensorRT {trt.__version__} has no {flag} flag: remove typing = 'weak' from the device file"
            )
        config.set_flag(getattr(trt.BuilderFlag, flag))
    count = keep_islands(trt, network, config, computed_in(graph))
    log.info("%s: %d layers are fixed to fp32", onnx, count)


def other_level(options: TrtOptions) -> int:
    """The optimization level to try where TensorRT fails at the one asked for: one lower, or the default (3)."""
    asked = DEFAULT_LEVEL if options.optimization_level is None else options.optimization_level
    return asked - 1 if asked else DEFAULT_LEVEL


def is_strong(trt: Any, options: TrtOptions) -> bool:
    """Is the network strongly typed, that is, does TensorRT keep the types of the ONNX?"""
    return options.typing == "strong" and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def network_flags(trt: Any, options: TrtOptions) -> int:
    """Flags for `create_network`, looked up by name because their numbers differ between versions."""
    flags = trt.NetworkDefinitionCreationFlag
    if is_strong(trt, options):
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH) if hasattr(flags, "EXPLICIT_BATCH") else 0


def _choose_tactics(trt: Any, config: Any, options: TrtOptions) -> None:
    """Use only the tactic sources asked for; on 8.x also keep external libraries out of TensorRT's core layers."""
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
    """Use the tactics timed before; an unreadable cache, or one of another TensorRT or GPU, is ignored."""
    known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("%s is from another TensorRT or GPU: tactics are timed again", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def make_monitor(trt: Any, progress: Progress, stop: Interrupt) -> Any:
    """Reports the progress of a build and ends it once `stop` is asked for; None on 8.6, without IProgressMonitor."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:  # an exception must not pass through TensorRT
                progress(f"TensorRT: {phase_name}", step, self.steps.get(phase_name, step))
            except KeyboardInterrupt:
                stop.asked = True
            return not stop.asked

    return Monitor()


def _parser_errors(parser: Any, onnx: Path) -> str:
    nodes = load_graph(onnx).graph.node
    reasons = []
    for index in range(min(parser.num_errors, 3)):
        error = parser.get_error(index)
        place = error.node()
        node = f"node {nodes[place].name} ({nodes[place].op_type}): " if 0 <= place < len(nodes) else ""
        reasons.append(node + error.desc())
    return ("; ".join(reasons) or "no reason given") + ": export it again with this version of edgeprune"


class Fusion(NamedTuple):
    """Counts in an engine: attention layers that run as one fused kernel, and layers of all kinds."""

    fused: int
    layers: int


def fusion_of(information: str) -> Fusion | None:
    """Count layers in the JSON of the engine inspector; None where the engine was built without details.

    Layers are objects (DETAILED) or bare names. Fused attention has `_mha` or `fmha` in a tactic, kernel or layer
    name (TensorRT 8.6 to 11). `Bindings` and `I/O Tensors` are ignored.
    """
    layers = json.loads(information).get("Layers", [])
    if not any(isinstance(row, dict) for row in layers):
        return None
    keys = ("TacticName", "LayerType", "Name", "KernelName")
    texts = [" ".join(str(row.get(key, "")) for key in keys).lower() for row in layers if isinstance(row, dict)]
    return Fusion(sum("_mha" in text or "fmha" in text for text in texts), len(layers))

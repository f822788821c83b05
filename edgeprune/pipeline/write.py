"""A bundle from an ONNX file: compile the engine, run it once for the golden output, write everything at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgeprune.bundles.format import (
    BUILD_LOG,
    DEVICE,
    ONNX,
    PAGE,
    PLOT,
    TOLERANCE,
    TRACE,
    load_bundle,
    write_bundle,
)
from edgeprune.errors import REPORT, EdgepruneError, EngineError
from edgeprune.html_report.files import staircase_svg
from edgeprune.html_report.page import page_html
from edgeprune.io import code_key, encode, load, sha256_file
from edgeprune.onnx_graph import attention_fusion
from edgeprune.onnx_graph.graph import weights_of
from edgeprune.records import BuildTrace, Engine, Manifest, ModelMetadata, Report, Staircase, Vit
from edgeprune.runtimes import Inspected
from edgeprune.runtimes.target import Target
from edgeprune.tasks import Task, task_of, typically_off

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


def noise_batch(vit: Vit, batch: int) -> NDArray[np.float32]:
    """Noise with a fixed seed, (batch, 3, H, W): the golden input where there are no pictures."""
    return np.random.default_rng(0).standard_normal((batch, 3, *vit.size), dtype=np.float32)


def bundle_from_onnx(
    target: Target,
    out: Path,
    onnx: Path,
    metadata: ModelMetadata,
    report: Report,
    example: NDArray[np.float32],
    staircase: Staircase | None,
    expected: NDArray[np.float32] | None = None,
    trace: Callable[[], BuildTrace] = BuildTrace,
    asked: str = "",
) -> Manifest:
    """Compile, run `example` (one normalised batch) as the golden input, and write the bundle; its manifest.

    An identical bundle for the same goal, `asked`, that already exists is kept; `trace` is called only where one is
    written. Raises EngineError where the outputs are not finite, or in fp32 differ from `expected` on most images of
    the batch, and OutputError.
    """
    engine_file, weights = target.engine(onnx), {file.name: file for file in weights_of(onnx)}
    parts = (engine_file, *(weights.values() if engine_file == onnx else ()))
    engine = Engine(
        path=f"model{engine_file.suffix}",
        sha256=sha256_file(engine_file),
        onnx_sha256=sha256_file(onnx),
        size_bytes=sum(part.stat().st_size for part in parts),
        setup=target.setup,
    )
    with target.opener(onnx)() as session:
        golden = session.infer(example)
        fused = session.fused_attention() if isinstance(session, Inspected) else None
    check_golden(golden, expected, onnx, target, task_of(metadata.task, metadata.vit))
    attention_fusion.warn_if_lost(fused, report.fusable_attention, target.setup.precision)
    report = msgspec.structs.replace(report, fused_attention=fused)
    old = _bundle_in(out, asked)
    names = ("task", "schedule", "recovery", "preprocessing", "labels")
    same = (code_key(), engine, report, *(getattr(metadata, name) for name in names))
    if old and (old.code, old.engine, old.report, *(getattr(old, name) for name in names)) == same:
        log.info("bundle: reused %s", out)
        return old
    traced = msgspec.structs.replace(trace(), asked=asked)
    page = page_html(
        engine, metadata.schedule, report, metadata.preprocessing, staircase, traced, metadata.recovery, metadata.task
    )
    build_log = engine_file.with_suffix(".log")
    return write_bundle(
        out,
        task=metadata.task,
        vit=metadata.vit,
        files={engine.path: engine_file, ONNX: onnx, **weights}
        | ({BUILD_LOG: build_log} if build_log.is_file() else {}),
        engine=engine,
        schedule=metadata.schedule,
        staircase=staircase,
        report=report,
        preprocessing=metadata.preprocessing,
        labels=metadata.labels,
        recovery=metadata.recovery,
        golden=(example, golden),
        extra={DEVICE: encode(target.device), TRACE: encode(traced), PAGE: page.encode()}
        | ({PLOT: staircase_svg(staircase, metadata.schedule)} if staircase else {}),
    )


def check_golden(
    golden: NDArray[np.float32],
    expected: NDArray[np.float32] | None,
    onnx: Path,
    target: Target,
    task: Task,
) -> None:
    """Raise EngineError if outputs (batch, values) are not finite, or in fp32 typically differ from `expected`."""
    if not np.isfinite(golden).all():
        raise EngineError(f"{onnx}: outputs are not finite in {target.setup.precision}: build with --precision fp32")
    if expected is None:
        return
    off, most = typically_off(task, golden, expected), max(TOLERANCE, target.runtime.parity)
    log.info("golden output: differs by %.2g (median over images) from that of the bundle with this ONNX", off)
    if target.setup.precision == "fp32" and not off <= most:
        raise EngineError(f"{onnx}: outputs differ by {off:.2g} from those of its bundle, above {most}: {REPORT}")


def _bundle_in(out: Path, asked: str) -> Manifest | None:
    """The manifest of an existing bundle for this goal; None if there is none or it is damaged."""
    try:
        manifest = load_bundle(out)
        return manifest if load(out / TRACE, BuildTrace).asked == asked else None
    except EdgepruneError:
        return None

"""ONNX to bundle on the machine that will run it: compiled, measured, checked, written. Needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgeprune import fusion, measure
from edgeprune.bundle import (
    BUILD_LOG,
    DEVICE,
    GOLDEN,
    MANIFEST,
    ONNX,
    PAGE,
    PLOT,
    STORY,
    TOLERANCE,
    check_out,
    load_bundle,
    write_bundle,
)
from edgeprune.errors import REPORT, EdgepruneError, EngineError, InputError
from edgeprune.graph import card_of, input_shape, load_graph, weights_of
from edgeprune.html_report.files import staircase_svg
from edgeprune.html_report.page import page_html
from edgeprune.images import load_images, load_pixels, normalise
from edgeprune.job import ENGINES
from edgeprune.measure import Open
from edgeprune.records import (
    Card,
    Engine,
    Latency,
    Manifest,
    Report,
    Staircase,
    Story,
    code_key,
    encode,
    load,
    load_array,
    sha256_file,
)
from edgeprune.runtimes import Inspected
from edgeprune.staircase import predict_ms
from edgeprune.target import Target, alone

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What `compile` is given besides the target: the command line's options by name."""

    onnx: Path
    dense: Path | None = None  # the unpruned model's ONNX, beside which the pruned one is measured
    images: Path | None = None
    staircase: Path | None = None  # of this target, for the prediction
    rounds: int = 60
    out: Path | None = None


def compile_onnx(target: Target, given: Inputs) -> tuple[Path, Manifest]:
    """A bundle from an ONNX file that `export` wrote or that lies in a bundle.

    What cannot be known stays None: the speed-up without `dense`, top-1 without labelled `images`. Raises
    InputError for an ONNX that does not say which model it is, and what the target's runtime raises.
    """
    with alone(target.work):
        return _compiled(target, given)


def _compiled(target: Target, given: Inputs) -> tuple[Path, Manifest]:
    card, beside = described(given.onnx)
    setup, vit = target.setup, card.vit
    out = given.out or ENGINES / setup.device / vit.name / f"{card.schedule.method}-{setup.precision}-b{setup.batch}"
    check_out(out)
    if given.dense is not None and input_shape(load_graph(given.dense)) != input_shape(load_graph(given.onnx)):
        raise InputError(f"{given.dense} takes another shape than {given.onnx}: export both alike")
    staircase = load(given.staircase, Staircase) if given.staircase else None
    if staircase is not None and (staircase.setup != setup or staircase.vit != vit):
        raise InputError(f"{given.staircase} is of another model or setup: profile it on this device")
    files = {"pruned": given.onnx} | ({"dense": given.dense} if given.dense else {})
    fusable = fusion.foretold(given.onnx, card.schedule, setup)
    openers = {name: target.opener(file) for name, file in files.items()}
    samples = measure.interleave(openers, given.rounds, progress=target.progress, what="measuring")
    report = Report(
        latency=Latency(samples_ms=tuple(samples["pruned"]), warmup=measure.WARMUP), fusable_attention=fusable
    )
    if "dense" in samples:
        speedup, interval = measure.ratio(samples["dense"], samples["pruned"])
        report = msgspec.structs.replace(
            report,
            dense_latency=Latency(samples_ms=tuple(samples["dense"]), warmup=measure.WARMUP),
            speedup=speedup,
            speedup_interval=interval,
        )
    if staircase is not None:
        schedule = card.schedule
        predicted = predict_ms(staircase, schedule.tokens, schedule.method, schedule.prefix_last)
        report = msgspec.structs.replace(report, predicted_ms=predicted, probes=staircase.probes)
    if given.images is not None:
        report = _with_fidelity(target, report, card, openers, given.images)
    example, expected = example_of(card, setup.batch, given.images), None
    if beside is not None:
        example, expected = (load_array(given.onnx.parent / name) for name in GOLDEN)
    return out, bundle_from_onnx(target, out, given.onnx, card, report, example, staircase, expected)


def described(onnx: Path) -> tuple[Card, Manifest | None]:
    """What an ONNX file is, from the bundle that it lies in or from its own metadata. Raises InputError."""
    if onnx.name == ONNX and (onnx.parent / MANIFEST).is_file():
        manifest = load_bundle(onnx.parent)
        fields = {name: getattr(manifest, name) for name in ("vit", "schedule", "preprocessing", "labels")}
        return Card(**fields), manifest
    card = card_of(onnx)
    if card is None:
        raise InputError(f"{onnx} does not say which model it is: pass one that edgeprune export or build wrote")
    return card, None


def example_of(card: Card, batch: int, images: Path | None) -> NDArray[np.float32]:
    """One batch to keep as the golden input: the first pictures, or seeded noise without any."""
    if images is None:
        shape = (batch, 3, card.vit.image_px, card.vit.image_px)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    paths = load_images(images).paths
    return normalise(
        load_pixels([paths[i % len(paths)] for i in range(batch)], card.preprocessing), card.preprocessing
    )


def _with_fidelity(target: Target, report: Report, card: Card, openers: dict[str, Open], source: Path) -> Report:
    """Top-1 on labelled pictures; agreement and KL beside the unpruned engine."""
    pictures = load_images(source)
    pixels = load_pixels(pictures.paths, card.preprocessing)
    logits = {}
    for name, opened in openers.items():
        with opened() as session:
            logits[name] = measure.logits_of(session, pixels, card.preprocessing, target.setup.batch, target.progress)
    pruned, dense, labels = logits["pruned"], logits.get("dense"), pictures.labels
    return msgspec.structs.replace(
        report,
        images=len(pictures),
        top1=measure.top1(pruned, labels) if labels else None,
        dense_top1=measure.top1(dense, labels) if labels and dense is not None else None,
        agreement=measure.agreement(dense, pruned) if dense is not None else None,
        kl=measure.kl_divergence(dense, pruned) if dense is not None else None,
    )


def bundle_from_onnx(
    target: Target,
    out: Path,
    onnx: Path,
    card: Card,
    report: Report,
    example: NDArray[np.float32],
    staircase: Staircase | None,
    expected: NDArray[np.float32] | None = None,
    story: Callable[[], Story] = Story,
) -> Manifest:
    """Compile, run `example` (one normalised batch) as the golden input, write; the very same bundle stays.

    `story` is called only where a bundle is written. Raises EngineError where the outputs are not finite, or in
    fp32 not those `expected`.
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
    if not np.isfinite(golden).all():
        raise EngineError(f"{onnx}: outputs are not finite in {target.setup.precision}: build fp32")
    if expected is not None:
        typical, most = measure.typical_difference(golden, expected), max(TOLERANCE, target.runtime.parity)
        log.info("golden output: differs by %.2g from that of the bundle the ONNX lies in", typical)
        if target.setup.precision == "fp32" and not typical <= most:
            raise EngineError(f"{onnx}: logits differ by {typical:.2g} from its bundle's, above {most}: {REPORT}")
    fusion.tell(fused, report.fusable_attention, target.setup.precision)
    report = msgspec.structs.replace(report, fused_attention=fused)
    old = _bundle_in(out)
    if old and (old.code, old.engine, old.schedule, old.report) == (code_key(), engine, card.schedule, report):
        log.info("bundle: reused %s", out)
        return old
    told = story()
    page = page_html(engine, card.schedule, report, card.preprocessing, staircase, told)
    build_log = engine_file.with_suffix(".log")
    return write_bundle(
        out,
        vit=card.vit,
        files={engine.path: engine_file, ONNX: onnx, **weights}
        | ({BUILD_LOG: build_log} if build_log.is_file() else {}),
        engine=engine,
        schedule=card.schedule,
        staircase=staircase,
        report=report,
        preprocessing=card.preprocessing,
        labels=card.labels,
        golden=(example, golden),
        extra={DEVICE: encode(target.device), STORY: encode(told), PAGE: page.encode()}
        | ({PLOT: staircase_svg(staircase, card.schedule)} if staircase else {}),
    )


def _bundle_in(out: Path) -> Manifest | None:
    """The bundle that is there, None where there is none or it is damaged."""
    try:
        return load_bundle(out)
    except EdgepruneError:
        return None

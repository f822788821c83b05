"""A staircase for a model on a target: exports the probes, measures them, resumes what was interrupted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeprune import export, graph, zoo
from edgeprune.adaptive import FEW, probe
from edgeprune.errors import InputError
from edgeprune.measure import Open
from edgeprune.precision import CONVERSIONS
from edgeprune.records import Staircase, Vit, load, read_bytes, save, write_bytes
from edgeprune.reducers import check_method
from edgeprune.staircase import DENSE, FIXED, SampleKey, Samples, block
from edgeprune.target import Target

if TYPE_CHECKING:
    from edgeprune.models import Model

log = logging.getLogger(__name__)

ROUNDS = 3 * FEW
Sought = tuple[tuple[int, ...], ...]


def cut_pairs(vit: Vit) -> tuple[tuple[int, int], ...]:
    """Token counts (entering, leaving) on which the cost of a cut is measured."""
    shares = ((1.0, 0.6), (0.5, 0.3))
    lowest = vit.prefix + 2
    return tuple((max(round(a * vit.tokens), lowest + 1), max(round(b * vit.tokens), lowest)) for a, b in shares)


def export_probes(model: Model, methods: Sequence[str], batch: int, folder: Path, precision: str = "fp32") -> None:
    """Write trunk, block, fixed and dense ONNX files, and a cut block per pair; those that exist stay.

    `vit.json` beside them says what they are: with it the folder is all that `profile --trunk` needs. INT8
    ranges are nominal: latency does not depend on them.
    """
    import torch

    from edgeprune.prune import CutBlock, Fixed, LastBlock, PrunedViT, Trunk
    from edgeprune.reducers import reducer_named

    vit, module, family = model.vit, model.module, model.family
    blocks: Any = module.blocks
    middle = blocks[vit.depth // 2]
    for method in methods:
        check_method(method)
    _check_probes(folder, vit, batch, precision)
    stream = torch.zeros(batch, vit.tokens, vit.width)
    images = torch.zeros(batch, 3, vit.image_px, vit.image_px)
    dense = PrunedViT(module, family, vit, (vit.tokens,) * vit.depth, None)
    convert = CONVERSIONS.get(precision)

    def missing(name: str, write: Callable[[Path], None]) -> None:
        if not (folder / name).exists():
            write(folder / name)

    missing("vit.json", lambda p: save(vit, p))
    missing("trunk.onnx", lambda p: export.trunk_from_module(Trunk(list(blocks), family), stream, p, convert=convert))
    missing("fixed.onnx", lambda p: export.onnx_from_module(Fixed(module, family), images, p, convert=convert))
    missing("dense.onnx", lambda p: export.onnx_from_module(dense, images, p, convert=convert))
    missing("block.onnx", lambda p: export.trunk_from_module(Trunk([middle], family), stream, p, convert=convert))
    if vit.prefix_pooled:
        last = LastBlock(middle, family, vit.prefix)
        missing("last.onnx", lambda p: export.trunk_from_module(last, stream, p, convert=convert))
    for method in methods:
        reducer = reducer_named(method)
        for entering, leaving in cut_pairs(vit) if reducer else ():
            assert reducer is not None
            cut = CutBlock(middle, family, vit, leaving, reducer)
            example = stream[:, :1].expand(-1, entering, -1).contiguous()
            name = f"cut-{method}-{entering}-{leaving}.onnx"
            missing(name, lambda p, c=cut, e=example: export.onnx_from_module(c, e, p, ("x", "y"), convert))  # type: ignore[misc]


def _check_probes(folder: Path, vit: Vit | None, batch: int, precision: str) -> None:
    """Raise InputError where a folder holds probes of another model, batch size or precision."""
    if vit is not None and (folder / "vit.json").exists() and load(folder / "vit.json", Vit) != vit:
        raise InputError(f"{folder} holds the probes of another model: choose another --out")
    if (folder / "trunk.onnx").exists():
        trunk = graph.load_graph(folder / "trunk.onnx")
        if (found := trunk.graph.input[0].type.tensor_type.shape.dim[0].dim_value) != batch:
            raise InputError(
                f"{folder} holds probes of batch {found}, not {batch}: pass --batch {found} or export anew"
            )
        if (held := graph.precision_of(trunk)) != precision:
            raise InputError(
                f"{folder} holds probes in {held}, not {precision}: pass --precision {held} or export anew"
            )


def probes_folder(target: Target, vit: Vit) -> Path:
    """Where the probes of a model lie in the work folder."""
    return target.path("probes", "", vit, target.setup.batch, target.onnx_precision)


def staircase_of_model(
    target: Target, model: Model, methods: Sequence[str], exhaustive: bool = False, sought: Sought = ()
) -> Staircase:
    """The staircase of a model with the cost of these methods' cuts; reused or resumed from the work folder.

    `sought` holds the counts of the schedules so far whose edges are to be found as well, one tuple after another.
    """
    folder = probes_folder(target, model.vit)

    def make() -> Path:
        target.progress("exporting probes", 0, 1)
        export_probes(model, methods, target.setup.batch, folder, target.onnx_precision)
        target.progress("exporting probes", 1, 1)
        return folder

    return _measured(target, model.vit, methods, exhaustive, make, sought)


def staircase_of_folder(target: Target, trunk: Path, methods: Sequence[str], exhaustive: bool = False) -> Staircase:
    """The staircase of exported probes, without torch. Raises InputError where one is missing."""
    folder = trunk.parent
    for name in ("trunk.onnx", "fixed.onnx", "dense.onnx", "vit.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing: make the folder with edgeprune export --trunk")
    if trunk.name != "trunk.onnx":
        raise InputError(f"{trunk}: pass the trunk.onnx that edgeprune export --trunk wrote")
    for method in methods:
        check_method(method)
    _check_probes(folder, None, target.setup.batch, target.onnx_precision)
    return _measured(target, load(folder / "vit.json", Vit), methods, exhaustive, lambda: folder)


def staircase_simulated(target: Target, vit: Vit, exhaustive: bool = False) -> Staircase:
    """The staircase of the tail-effect model from a model's shape alone: no torch, no ONNX file."""
    from edgeprune.runtimes.simulated import SimulatedProducts, products_of_ends, products_of_trunk

    device, setup = target.device, target.setup
    ends, batch = products_of_ends(vit, setup.batch), setup.batch

    def opens(products: Any) -> Open:
        return lambda: SimulatedProducts(products, device, setup.precision)

    others = {FIXED: opens(ends), DENSE: opens(ends + products_of_trunk(vit, vit.tokens, batch))}
    staircase, _ = probe(
        vit, setup, lambda n: opens(products_of_trunk(vit, n, batch)), others, 1, exhaustive,
        progress=target.progress,
    )  # fmt: skip
    return staircase


def vit_of(name: str) -> Vit:
    """The shape of a model; of the embedded one without torch. Raises ModelError, MissingError."""
    if name == zoo.EMBEDDED:
        return load(zoo.RECORD, Vit)
    from edgeprune.models import load_model

    return load_model(name, "random").vit


def _measured(
    target: Target,
    vit: Vit,
    methods: Sequence[str],
    exhaustive: bool,
    folder_made: Callable[[], Path],
    sought: Sought = (),
) -> Staircase:
    rounds = 1 if target.setup.noiseless else ROUNDS
    parts = (vit, target.setup, methods, exhaustive, rounds)
    partial = target.path("samples", ".json", *parts, sought)

    def make(path: Path) -> None:
        folder = folder_made()
        samples = _resumed(partial)
        if sought and not samples:
            samples = _resumed(target.path("probed", ".json", *parts, sought[:-1]))
        staircase, samples = probe(
            vit,
            target.setup,
            lambda n: _static(target, vit, folder / "trunk.onnx", n),
            _others(target, vit, methods, folder),
            rounds,
            exhaustive,
            samples,
            lambda state: _keep(state, partial),
            target.progress,
            keep_open=_fits(folder / "trunk.weights", target.runtime.free_bytes()),
            used=sought[-1] if sought else (),
        )
        _keep(samples, target.path("probed", ".json", *parts, sought))
        save(staircase, path)
        partial.unlink(missing_ok=True)

    return load(target.step("staircase", ".json", (*parts, sought), make), Staircase)


def _others(target: Target, vit: Vit, methods: Sequence[str], folder: Path) -> Mapping[SampleKey, Open]:
    others = {key: target.opener(folder / f"{key.kind}.onnx") for key in (FIXED, DENSE)}
    if (folder / "last.onnx").is_file():
        for n in sorted({n for pair in cut_pairs(vit) for n in pair}):
            others[block(n)] = _static(target, vit, folder / "block.onnx", n)
            others[SampleKey("last", (n,))] = _static(target, vit, folder / "last.onnx", n)
    for method in methods:
        for entering, leaving in cut_pairs(vit):
            cut = folder / f"cut-{method}-{entering}-{leaving}.onnx"
            if cut.is_file():
                others[SampleKey("cut", (entering, leaving), method)] = target.opener(cut)
                for n in (entering, leaving):
                    others[block(n)] = _static(target, vit, folder / "block.onnx", n)
    return others


def _static(target: Target, vit: Vit, trunk: Path, tokens: int) -> Open:
    """The trunk fixed to `tokens` and compiled; opened when called."""
    static = trunk.with_name(f"{trunk.stem}-{tokens}.onnx")
    if not static.exists():
        graph.fix_tokens(trunk, tokens, static)
    return target.opener(static, vit.weights_sha256)


def _keep(samples: Samples, path: Path) -> None:
    """Write samples as pairs: a JSON object takes no records as keys."""
    write_bytes(path, msgspec.json.encode(list(samples.items())))


def _resumed(partial: Path) -> Samples:
    """Samples of an interrupted run; none where there are none or they cannot be read."""
    if not partial.exists():
        return {}
    try:
        samples = dict(msgspec.json.decode(read_bytes(partial), type=list[tuple[SampleKey, list[float]]]))
    except msgspec.DecodeError:
        log.warning("%s cannot be read: measuring anew", partial)
        return {}
    log.info("staircase: going on with %d samples", sum(map(len, samples.values())))
    return samples


def _fits(weights: Path, free_bytes: int | None) -> bool:
    """Do some thirty sessions, each with its own copy of the weights, fit half of the free memory?"""
    return free_bytes is None or weights.stat().st_size * 3 * 40 < free_bytes / 2

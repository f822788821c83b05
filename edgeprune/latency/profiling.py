"""The staircase of a folder of ONNX files, measured on a target; an interrupted measurement resumes. No torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgeprune.errors import InputError
from edgeprune.io import encode, load, read_bytes, save, sha256_bytes, write_bytes
from edgeprune.latency.depth import PAIR, depth_check
from edgeprune.latency.probing import FEW, all_counts, probe, unconfirmed
from edgeprune.latency.staircase import DENSE, FIXED, SampleKey, Samples, block
from edgeprune.latency.timing import UNLIMITED, Room
from edgeprune.onnx_graph import graph
from edgeprune.records import Conditions, DepthCheck, Staircase, Vit
from edgeprune.runtimes import Observed
from edgeprune.runtimes.inference import Open
from edgeprune.runtimes.steps import PROFILING_MODELS
from edgeprune.runtimes.target import Target

log = logging.getLogger(__name__)

ROUNDS = 3 * FEW
Pairs = list[tuple[SampleKey, list[float]]]  # how samples are stored: keys of a JSON object are strings only


def cut_pairs(vit: Vit) -> tuple[tuple[int, int], ...]:
    """Token counts (entering, leaving) at which the cost of a cut is measured."""
    shares = ((1.0, 0.6), (0.5, 0.3))
    lowest = vit.prefix + 2
    return tuple((max(round(a * vit.tokens), lowest + 1), max(round(b * vit.tokens), lowest)) for a, b in shares)


def cut_file(folder: Path, method: str, pair: tuple[int, int]) -> Path:
    """The ONNX file of a block with a cut, in a folder of profiling models."""
    entering, leaving = pair
    return folder / f"cut-{method}-{entering}-{leaving}.onnx"


def check_profiling_models(folder: Path, vit: Vit | None, batch: int, precision: str) -> None:
    """Raise InputError where a folder holds profiling models of another model, batch size or precision."""
    if vit is not None and (folder / "vit.json").exists() and load(folder / "vit.json", Vit) != vit:
        raise InputError(f"{folder} belongs to another model: choose another --out")
    if (folder / "trunk.onnx").exists():
        trunk = graph.load_graph(folder / "trunk.onnx")
        if (found := trunk.graph.input[0].type.tensor_type.shape.dim[0].dim_value) != batch:
            raise InputError(
                f"{folder} holds models of batch {found}, not {batch}: pass --batch {found} or export again"
            )
        if (holds := graph.onnx_precision_of(trunk)) != precision:
            held, wanted = (each.partition("-")[0] for each in (holds, precision))
            if held == wanted:
                raise InputError(f"{folder} holds {held} models for another runtime: export again with --device")
            raise InputError(f"{folder} holds {held} models, not {wanted}: pass --precision {held} or export again")


def models_folder(target: Target, vit: Vit, task: str) -> Path:
    """The folder in the work folder for the profiling models of a model; `task` is what its output is for."""
    parts = (vit, task, target.setup.batch, target.onnx_precision, target.for_tensorrt)
    return target.work.file(PROFILING_MODELS, "", *parts)


def staircase_of_folder(target: Target, trunk: Path, methods: Sequence[str], exhaustive: bool = False) -> Staircase:
    """The staircase of the models that `export --trunk` wrote. Raises InputError where a file is missing."""
    folder = trunk.parent
    for name in ("trunk.onnx", "fixed.onnx", "dense.onnx", "vit.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing: write the folder with edgeprune export --trunk")
    if trunk.name != "trunk.onnx":
        raise InputError(f"{trunk}: pass the trunk.onnx that edgeprune export --trunk wrote")
    check_profiling_models(folder, None, target.setup.batch, target.onnx_precision)
    vit = load(folder / "vit.json", Vit)
    for method in methods:
        if method != "none" and not all(cut_file(folder, method, pair).is_file() for pair in cut_pairs(vit)):
            raise InputError(
                f"{folder} has no cuts by {method}: export it with --method {method}, or pass --method none"
            )
    return measured_staircase(target, vit, methods, lambda: folder, exhaustive)


def simulated_staircase(target: Target, vit: Vit, exhaustive: bool = False) -> Staircase:
    """The staircase of a simulated device from the shape of a model alone: no torch, no ONNX file."""
    from edgeprune.runtimes.simulated import SimulatedKernels, operations_of_ends, operations_of_trunk

    device, setup = target.device, target.setup
    ends, batch = operations_of_ends(vit, setup.batch), setup.batch

    def opens(operations: Any) -> Open:
        return lambda: SimulatedKernels(operations, device, setup.precision)

    others = {FIXED: opens(ends), DENSE: opens(ends + operations_of_trunk(vit, vit.tokens, batch))}
    staircase, _ = probe(
        vit, setup, lambda n: opens(operations_of_trunk(vit, n, batch)), others, 1, exhaustive,
        progress=target.progress,
    )  # fmt: skip
    return staircase


def measured_staircase(
    target: Target,
    vit: Vit,
    methods: Sequence[str],
    models: Callable[[], Path],
    exhaustive: bool = False,
    base: Staircase | None = None,
    tokens: Iterable[int] = (),
) -> Staircase:
    """The staircase of the ONNX files in the folder that `models` returns, with the cost of these methods' cuts.

    With `base`: that staircase after measuring the unconfirmed right ends of the treads that contain `tokens`.
    Reused or resumed from the work folder; `models` is called only where something has to be measured. Raises
    EngineError, OutputError, HostError.
    """
    confirm = unconfirmed(base, tokens) if base else ()
    if base is not None and not confirm:
        return base
    rounds = 1 if target.setup.noiseless else ROUNDS
    parts = (vit, target.setup, methods, exhaustive, rounds, _digest(base) if base else None, confirm)
    partial = target.work.file("samples", ".json", *parts)

    def make(path: Path) -> None:
        folder = models()
        samples, conditions = _stored(partial)
        if samples:
            log.info("staircase: resuming, %d samples are already measured", sum(map(len, samples.values())))
        elif base is not None:
            samples, conditions = _stored(target.work.file("probed", ".json", _digest(base)))
        with target.alone():
            staircase, samples = timed(folder, samples, conditions)
        _keep(samples, conditions, target.work.file("probed", ".json", _digest(staircase)))
        save(staircase, path)
        partial.unlink(missing_ok=True)

    def timed(folder: Path, samples: Samples, conditions: list[Conditions]) -> tuple[Staircase, Samples]:
        room = _room(folder / "trunk.weights", target.runtime.free_bytes())
        depth, part = _part(target, vit, folder, rounds, room)
        staircase, samples = probe(
            vit,
            target.setup,
            lambda n: _static(target, vit, part, n),
            _others(target, vit, methods, folder),
            rounds,
            exhaustive,
            samples,
            lambda state: _keep(state, conditions, partial),
            target.progress,
            room,
            used=confirm,
            conditions=conditions,
            gpu_state=target.runtime.gpu_state if isinstance(target.runtime, Observed) else lambda: None,
            trunk_ms=depth.trunk_ms if depth else None,
        )
        return msgspec.structs.replace(staircase, depth=depth), samples

    path = target.work.step("staircase", ".json", parts, make)
    found = load(path, Staircase)
    _warn_if_throttled(found, base, path)
    return found


def _part(target: Target, vit: Vit, folder: Path, rounds: int, room: Room) -> tuple[DepthCheck | None, Path]:
    """What is timed at every token count: with TensorRT two blocks if they predict the trunk, else the trunk."""
    trunk, pair = folder / "trunk.onnx", folder / PAIR
    if target.setup.runtime != "trt" or not pair.is_file():
        return None, trunk
    counts = all_counts(vit)
    depth = depth_check(
        target, vit, counts, rounds,
        lambda n: _static(target, vit, trunk, n), lambda n: _static(target, vit, pair, n), room,
    )  # fmt: skip
    return depth, pair if depth else trunk


def _digest(staircase: Staircase) -> str:
    return sha256_bytes(encode(staircase))


def _others(target: Target, vit: Vit, methods: Sequence[str], folder: Path) -> Mapping[SampleKey, Open]:
    others = {key: target.opener(folder / f"{key.kind}.onnx") for key in (FIXED, DENSE)}
    if (folder / "last.onnx").is_file():
        for n in sorted({n for pair in cut_pairs(vit) for n in pair}):
            others[block(n)] = _static(target, vit, folder / "block.onnx", n)
            others[SampleKey("last", (n,))] = _static(target, vit, folder / "last.onnx", n)
    for method in methods:
        for entering, leaving in cut_pairs(vit):
            cut = cut_file(folder, method, (entering, leaving))
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


def _warn_if_throttled(staircase: Staircase, base: Staircase | None, path: Path) -> None:
    """Every time that the file of a staircase is used; what its base has measured is in the file of that."""
    known = base.conditions if base else ()
    reasons = sorted({reason for stage in staircase.conditions if stage not in known for reason in stage.throttled})
    if reasons:
        log.warning(
            "clocks were lowered while the staircase was measured (%s): cool the device or choose a lower power "
            "mode, delete %s and run the same command again", ", ".join(reasons), path,
        )  # fmt: skip


def _keep(samples: Samples, conditions: list[Conditions], path: Path) -> None:
    write_bytes(path, msgspec.json.encode((list(samples.items()), conditions)))


def _stored(path: Path) -> tuple[Samples, list[Conditions]]:
    """Samples and conditions of an earlier run; empty where there are none or they cannot be read."""
    if not path.exists():
        return {}, []
    try:
        pairs, conditions = msgspec.json.decode(read_bytes(path), type=tuple[Pairs, list[Conditions]])
    except msgspec.DecodeError:
        log.warning("%s cannot be read: measuring again", path)
        return {}, []
    return dict(pairs), conditions


def _room(weights: Path, free_bytes: int | None) -> Room:
    """Half of the free memory; a session that does not know its size holds up to three copies of the weights."""
    return UNLIMITED if free_bytes is None else Room(free_bytes / 2, 3 * weights.stat().st_size)

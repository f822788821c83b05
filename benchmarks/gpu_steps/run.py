"""What all steps share: the state of a run, its parts and their results, how engines are built and timed."""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from edgeprune.errors import DeviceError, EdgepruneError, EngineError, MissingError
from edgeprune.latency.timing import UNLIMITED, Room, interleave
from edgeprune.pipeline.measure import OPEN_SHARE
from edgeprune.runtimes import Session
from edgeprune.runtimes.target import Target, target_for
from edgeprune.runtimes.trt import TensorRT
from edgeprune.runtimes.trt_log import MIB
from gpu_steps import green_context
from gpu_steps.kit import onnx_in, read_json, static_onnx, weights_key, write_json

ATTEMPTS = 2  # at a part that ended its process; then it counts as failed and the others go on
BUILDER_BYTES = 2048 * MIB  # of a GPU, that a builder takes besides its workspace
GRACE_S = 90  # that a child may take after `until`, before the call is killed
PR_SET_PDEATHSIG = 1  # prctl(2)
K = TypeVar("K", bound=Hashable)
Parts = dict[str, Callable[[], Any]]


class Skipped(Exception):
    """A part that cannot run on this machine; the message is the reason."""


class OutOfTime(Exception):
    """The time of this call is used up: the part is left for the next call."""


class EngineSpec(NamedTuple):
    """An engine: a graph of a model in the kit, in a precision; `tokens` fixes the token axis of a block.

    `form` is a form of ONNX files (kit.FORMS) other than the one that edgeprune exports for the precision.
    """

    folder: Path
    name: str
    precision: str
    batch: int
    tokens: int | None = None
    form: str = ""


@dataclass(frozen=True)
class Run:
    """One call. `out` gets the results, `work` keeps engines; `until` is when no new work starts, by time.time()."""

    kit: Path
    out: Path
    work: Path
    device: str = "cuda"
    simulated: str = "h100"
    jobs: int = 8
    samples: int = 300  # of step 4
    rounds: int = 200  # of step 7
    stairs: int = 30  # rounds of step 5
    sm_limit: int | None = None
    until: float = float("inf")
    only: str = "*"  # parts whose name matches
    graphs: Path | None = None  # where converted graphs are kept; None: in `work`

    def target(self, precision: str, batch: int) -> Target:
        """The target that is measured. Raises DeviceError, MissingError."""
        return _target(self.device, precision, batch, self.work)

    @property
    def converted(self) -> Path:
        """Where converted graphs are kept: they do not depend on the number of SMs."""
        return self.graphs or self.work

    def seconds(self, most: float) -> float:
        """How long a child process may take: `most`, but not far beyond `until`."""
        return max(min(most, self.until + GRACE_S - time.time()), 1.0)

    def need_tensorrt(self) -> None:
        """Raise Skipped where the device is not run by TensorRT."""
        if self.target("fp32", 1).setup.runtime != "trt":
            raise Skipped(f"needs TensorRT, and {self.device} runs on ONNX Runtime")

    def need(self, precision: str) -> None:
        """Raise Skipped where the runtime or the GPU has no such precision."""
        try:
            self.target(precision, 1)
        except DeviceError as error:
            raise Skipped(str(error)) from None

    def onnx(self, spec: EngineSpec) -> Path:
        """The ONNX file of an engine."""
        kind = spec.form or self.target(spec.precision, spec.batch).onnx_precision
        if spec.tokens is None:
            return onnx_in(spec.folder, spec.name, kind, self.converted)
        return static_onnx(spec.folder, spec.name, kind, spec.tokens, self.converted)

    def opener(self, spec: EngineSpec) -> Callable[[], Session]:
        """A function that opens an engine, compiled now if it is not in the work folder. Raises OutOfTime."""
        if time.time() > self.until:
            raise OutOfTime
        return self.target(spec.precision, spec.batch).opener(self.onnx(spec), weights_key(spec.folder))

    def build(self, specs: Sequence[EngineSpec], timed: bool = False) -> dict[EngineSpec, str]:
        """Compile engines; the errors of those that failed.

        Engines that will be `timed` are compiled one after another, as edgeprune itself does: while other builds use
        the GPU, the fastest tactics are not found (NVIDIA/TensorRT#3543). Others are compiled in up to `jobs`
        processes, and TensorRT's timing cache of these is thrown away. Raises OutOfTime, EngineError where a process
        was killed.
        """
        jobs = 1 if timed else builds_at_once(self.target("fp32", 1), self.jobs)
        if jobs == 1:
            results = [_built(self, spec) for spec in specs]
        else:
            for spec in specs:
                self.onnx(spec)
            context = multiprocessing.get_context("spawn")
            with (
                tempfile.TemporaryDirectory() as timings,
                ProcessPoolExecutor(jobs, context, _begin, (self.sm_limit,)) as pool,
            ):
                count = len(specs)
                try:
                    results = list(pool.map(_built, [self] * count, specs, [Path(timings)] * count))
                except BrokenProcessPool:
                    raise EngineError(
                        "a process that built engines was killed, probably because memory ran out: call this step "
                        "again with --jobs 1"
                    ) from None
        if None in results:
            raise OutOfTime
        return {spec: error for spec, error in zip(specs, results, strict=True) if error}

    def interleaved(self, engines: Mapping[K, EngineSpec], rounds: int) -> tuple[dict[K, list[float]], dict[K, Any]]:
        """Samples, ms, of built engines in the same rounds, and whether each ran as one CUDA graph."""
        openers = {key: self.opener(spec) for key, spec in engines.items()}
        free_bytes = self.target("fp32", 1).runtime.free_bytes()
        room = UNLIMITED if free_bytes is None else Room(OPEN_SHARE * free_bytes)
        graphs: dict[K, bool | None] = {}
        return interleave(openers, rounds, stable=True, room=room, graphs=graphs), graphs

    @cached_property
    def about(self) -> dict[str, Any]:
        """What was measured: GPU, versions, options."""
        setup = msgspec.to_builtins(self.target("fp32", 1).setup)
        keys = ("machine", "gpu", "sm_count", "compute_capability", "runtime", "runtime_version", "options")
        about = {"device": self.device, "sm_limit": self.sm_limit, "jobs": self.jobs}
        return about | {key: setup.get(key) for key in keys}


@lru_cache(maxsize=32)
def _target(device: str, precision: str, batch: int, work: Path) -> Target:
    """Asked for once: it starts programs that name the GPU and its power limit."""
    return target_for(device, precision, batch, work=work)


def _begin(sm_limit: int | None) -> None:
    """Of a process that builds engines: it ends with the one that started it, and has as many SMs."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    green_context.limit(sm_limit)


def builds_at_once(target: Target, most: int) -> int:
    """How many engines can be compiled at the same time: one where the GPU uses the CPU's memory."""
    runtime, setup = target.runtime, target.setup
    if not isinstance(runtime, TensorRT):
        return most
    if runtime.shared:
        return 1
    return max(min(most, runtime.free_bytes() // ((setup.workspace_mib or 0) * MIB + BUILDER_BYTES)), 1)


def _built(run: Run, spec: EngineSpec, timings: Path | None = None) -> str | None:
    """Compile one engine: "" where that succeeded, the error where not, None where the time is used up.

    `timings` is the folder of TensorRT's timing cache, if not that of the engine.
    """
    if time.time() > run.until:
        return None
    try:
        target = run.target(spec.precision, spec.batch)
        if isinstance(target.runtime, TensorRT):
            target.runtime.timings = timings  # of this spec alone: the target is used again
        target.engine(run.onnx(spec), weights_key(spec.folder))
    except EdgepruneError as error:
        return " ".join(str(error).split())
    return ""


def carried_out(run: Run, step: int, title: str, parts: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run the parts of a step that are not finished; the content of OUT/step-N.json, which is written after each.

    Finished parts are kept; those that were skipped or failed, or that lack engines, are tried again. A part that
    twice ended its process, by a crash or the time limit of a call, counts as failed, unless it made engines that the
    next attempt finds. Raises EngineError where the GPU's context is lost, so that a new process has to go on.
    """
    path, begun = run.out / f"step-{step}.json", time.time()
    before = read_json(path) if path.exists() else {}
    attempts: dict[str, int] = before.get("attempts", {})
    spent: float = before.get("seconds", 0.0)
    state: dict[str, Any] = {"step": step, "title": title, "about": run.about, "parts": before.get("parts", {})}
    state |= {"skipped": {}, "failed": {}, "left": list(parts), "attempts": attempts, "engines": engines(run)}
    if state["engines"] > before.get("engines", state["engines"]):
        attempts.clear()

    def keep() -> None:
        write_json(path, state | {"complete": not state["left"], "seconds": round(spent + time.time() - begun, 1)})

    for name, work in parts.items():
        if lacking := lacks(state["parts"].get(name)):
            state["failed"][name] = lacking
        if name not in state["parts"] or lacking:
            if time.time() > run.until or not fnmatch.fnmatchcase(name, run.only):
                continue
            state["failed"].pop(name, None)
            if attempts.get(name, 0) >= ATTEMPTS:
                state["failed"][name] = f"the process ended in {ATTEMPTS} attempts: see the output of those calls"
                state["left"].remove(name)
                continue
            attempts[name] = attempts.get(name, 0) + 1
            keep()
            try:
                where, found = outcome(work)
            except OutOfTime:
                del attempts[name]
                continue
            state[where][name] = found
            if lacking := lacks(state["parts"].get(name)):
                state["failed"][name] = lacking
            if name in state["failed"] and context_is_lost(run):
                keep()
                raise EngineError(f"{name}: {state['failed'][name]}; the GPU's context is lost: call this step again")
            del attempts[name]
        state["left"].remove(name)
    keep()
    written: dict[str, Any] = read_json(path)
    return written


def outcome(work: Callable[[], Any]) -> tuple[str, Any]:
    """Where the result of a part belongs in the state, and the result or the reason. Raises OutOfTime."""
    try:
        return "parts", work()
    except OutOfTime:
        raise
    except (Skipped, MissingError) as reason:
        return "skipped", str(reason)
    except Exception as error:  # whatever it is, the other parts go on
        kind = "" if isinstance(error, EdgepruneError) else f"{type(error).__name__}: "
        return "failed", kind + " ".join(str(error).split())


def lacks(part: Any) -> str | None:
    """Why a finished part lacks engines, None where it has all."""
    if not isinstance(part, dict):
        return None
    rows = [
        row["error"] for row in part.get("rows", ()) if isinstance(row, dict) and "error" in row and "name" in row
    ]
    errors = [*(part.get("errors") or {}).values(), *rows]
    return f"{len(errors)} engines could not be built: {errors[0]}" if errors else None


def engines(run: Run) -> int:
    """How many engines the work folder holds."""
    return sum(1 for _ in run.work.glob("*.engine"))


def context_is_lost(run: Run) -> bool:
    """Does every further call into CUDA fail, as after an illegal access?"""
    try:
        runtime = run.target("fp32", 1).runtime
        if isinstance(runtime, TensorRT):
            runtime.free_bytes()
    except Exception:
        return True
    return False


@contextlib.contextmanager
def opened(run: Run, spec: EngineSpec) -> Iterator[Session]:
    """A session of an engine."""
    with run.opener(spec)() as session:
        yield session
